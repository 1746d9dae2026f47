"""What compiling made of each kernel, so that only kernels that have changed are compiled again.

tests/kernels/compiled.json has the registers, spills and shared memory of every kernel that compile_ahead.py and
compile_hopper.py compile, by a hash of all that decides them, as Triton's own cache has it but for line numbers: the
source of the kernel and of what it calls, types and constants, options, the GPU, and the versions of Triton and ptxas.
What is not in the file is compiled, and so is one kernel of 16 that is, whose numbers must be those of the file. A
kernel that changes has another hash, so that no number of the file outlives the code that it was measured on; a file
that is out of date only takes time.

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
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITCallable, JITFunction

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


def is_checked(key: str) -> bool:
    """Whether a kernel of the file is compiled all the same: one of 16 is, another one when it changes."""
    return key.startswith("0")


class _Found(NamedTuple):
    """A kernel's key, and what compiling made of it unless the file has its numbers."""

    key: str
    compiled: CompiledKernel | None


def print_numbers(capability: int, describe: Callable[[], dict[str, Any]]) -> None:
    """Compile what is launched from now on, once each, for a GPU that is not there, and print a line of JSON for it.

    The line has the kernel's name, what `describe` says when it is compiled, and its numbers: registers and bytes of
    stack a thread, instructions that spill, bytes of shared memory a block, and how often its code names `w_rows`.
    """
    driver.set_active(_NoDevice(capability))
    knobs.compilation.disable_line_info = True  # a sixth of the time; the code that it makes is the same
    JITCallable.starting_line_number = property(lambda self: 0, lambda self, line: None)  # which is part of its hash
    rows = json.loads(FILE.read_text()) if FILE.exists() else {}
    run, compile_it, seen = JITFunction.run, JITFunction._do_compile, set()

    def compile_unless_known(self, in_cache, signature, device, constants, options, attributes, warmup):
        cache, _, _, backend, _ = self.device_caches[device]
        source = self.ASTSource(self, signature, constants, attributes)
        decide = triton.__version__, backend.hash(), options.hash(), source.hash()
        key = hashlib.sha256("\n".join(decide).encode()).hexdigest()[:32]
        is_known = key in rows and not is_checked(key)
        same = in_cache, signature, device, constants, options, attributes, warmup
        cache[in_cache] = _Found(key, None if is_known else compile_it(self, *same))
        return cache[in_cache]

    def compile_only(self, *args, grid, warmup, **options):
        """Gives nothing back that a launch could keep and start another time."""
        key, compiled = run(self, *args, grid=grid, warmup=True, **options)
        if (self, key) in seen:
            return
        seen.add((self, key))
        numbers = rows.get(key)
        if compiled is not None:
            words = len(re.findall(r"%w_rows\b", compiled.asm["ttgir"]))
            measured = resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared, "w_rows": words}
            if numbers not in (None, measured):
                sys.exit(f"{FILE.name} has {numbers} for {self.fn.__name__}, which is {measured}: write it anew")
            numbers = measured
        print(json.dumps({"kernel": self.fn.__name__, **describe(), **numbers, "key": key}), flush=True)

    JITFunction.run, JITFunction._do_compile = compile_only, compile_unless_known


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
