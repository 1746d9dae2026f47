"""What compiling made of each kernel, so that only kernels that have changed are compiled again.

tests/kernels/compiled.json has the registers, spills and shared memory of every kernel that compile_ahead.py and
compile_hopper.py compile, by a hash of all that decides them: the kernel's code as Triton's compiler gets it (without
line numbers), its options, the GPU, and the versions of Triton and ptxas. What is not in the file is compiled, and so
is one kernel of 16 that is, whose numbers must be those of the file. A kernel that changes has another hash, so that no
number of the file outlives the code that it was measured on; a file that is out of date only takes time.

    python tests/support/compiled.py         # compile what the file lacks, and write the file
    python tests/support/compiled.py --all   # compile every kernel
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

FILE = Path(__file__).parents[1] / "kernels" / "compiled.json"
NUMBERS = "reg", "stack", "local", "spills", "shared", "w_rows"
SETS = [("compile_ahead.py", "sm80"), ("compile_ahead.py", "sm90"), ("compile_ahead.py", "sm100")]
SETS += [("compile_hopper.py",), ("compile_hopper.py", "others")]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack a thread, and how many instructions store to the stack (spills)."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout

        usage = {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
        # what is spilled lies on the stack, and to disassemble a kernel takes longer than to compile it
        spills = len(re.findall(r"\bSTL\b", dump("-sass"))) if usage["stack"] or usage["local"] else 0
        return usage | {"spills": spills}


class _NoDevice:
    """The part of a driver that the compiler asks for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("meta")

    def map_python_to_cpp_type(self, name):
        return name


PLACE = re.compile(r" loc\((?:#loc\d*|unknown|\"[^\"]*\"(?:\([^()]*\)|:\d+:\d+)?)\)")


def without_places(code: str) -> str:
    """An IR's text without the files and lines that its operations come from."""
    return "\n".join(PLACE.sub("", line) for line in code.splitlines() if not line.startswith("#loc"))


def is_checked(key: str) -> bool:
    """Whether a kernel of the file is compiled all the same: one of 16 is, another one when it changes."""
    return key.startswith("0")


class _Known:
    """Triton's hook for a compilation's stages: they do nothing for a kernel whose numbers are known."""

    def __init__(self, file: str):
        self.rows: dict[str, dict[str, int]] = json.loads(file)
        self.file = hashlib.sha256(file.encode()).hexdigest()

    def is_known(self, key: str) -> bool:
        return key in self.rows and not is_checked(key)

    def __call__(self, backend: Any = None, stages: Any = None, options: Any = None, *about: Any):
        if stages is None:
            return self.file, self.file  # part of the keys of Triton's own cache
        made, first = dict(stages), next(iter(stages))

        def begin(module, metadata):
            whole = "\n".join([triton.__version__, backend.hash(), options.hash(), *map(str, about)])
            key = hashlib.sha256(f"{whole}\n{without_places(str(module))}".encode()).hexdigest()[:32]
            metadata["key"] = key
            if not self.is_known(key):
                return made[first](module, metadata)
            metadata.update(name=key, shared=self.rows[key]["shared"])
            return module

        def follow(stage: str):
            nothing = b"" if stage == "cubin" else ""
            return lambda code, data: nothing if self.is_known(data["key"]) else made[stage](code, data)

        stages.update({stage: begin if stage == first else follow(stage) for stage in stages})


def print_numbers(capability: int, describe: Callable[[], dict[str, Any]]) -> None:
    """Compile what is launched from now on, once each, for a GPU that is not there, and print a line of JSON for it.

    The line has the kernel's name, what `describe` says when it is compiled, and its numbers: registers and bytes of
    stack a thread, instructions that spill, bytes of shared memory a block, and how often its code names `w_rows`.
    """
    driver.set_active(_NoDevice(capability))
    knobs.compilation.disable_line_info = True  # a sixth of the time; the code that it makes is the same
    known = _Known(FILE.read_text() if FILE.exists() else "{}")
    knobs.runtime.add_stages_inspection_hook = known
    run, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **options):
        """Gives nothing back that a launch could keep and start another time."""
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        key = compiled.metadata.key
        numbers = known.rows.get(key)
        if not known.is_known(key):
            words = len(re.findall(r"%w_rows\b", compiled.asm["ttgir"]))
            measured = resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared, "w_rows": words}
            if numbers not in (None, measured):
                sys.exit(f"{FILE.name} has {numbers} for {self.fn.__name__}, which is {measured}: write it anew")
            numbers = measured
        print(json.dumps({"kernel": self.fn.__name__, **describe(), **numbers, "key": key}), flush=True)

    JITFunction.run = compile_only


def main(*words: str) -> None:
    if "--all" in words:
        FILE.unlink(missing_ok=True)
    rows = {}
    for script, *arguments in SETS:
        command = [sys.executable, Path(__file__).with_name(script), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for row in map(json.loads, done.stdout.splitlines()):
            rows[row["key"]] = {name: row[name] for name in NUMBERS}
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(numbers)}" for key, numbers in sorted(rows.items()))
        FILE.write_text(f"{{\n{lines}\n}}\n")
        print(*command[1:], f"{len(rows)} kernels in all", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
