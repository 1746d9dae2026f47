"""Compiled kernels' numbers that tests/kernels/compiled.json has (tests/support/compiled.py) are those of the code."""

import json
import textwrap

from tests.support import commands

KERNEL = """
    import triton
    import triton.language as tl


    TWO = tl.constexpr(2)


    @triton.jit
    def more(x):
        return x + TWO


    @triton.jit
    def add(x_ptr, y_ptr):
        at = tl.arange(0, 64)
        tl.store(y_ptr + at, more(tl.load(x_ptr + at)))
"""
PROGRAM = """
import importlib.util
import sys
from pathlib import Path

import torch

from tests.support import compiled

folder = Path(sys.argv[1])
compiled.FILE = folder / "compiled.json"
compiled.is_checked = lambda key: "checked" in sys.argv[2:]
compiled.print_numbers(90, lambda: {})
for name in sys.argv[2].split(","):
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    x = torch.empty(64, device="meta")
    for _ in range(2):  # once each
        module.add[(1,)](x, x)
"""


def test_a_kernel_is_compiled_again_where_its_code_changes_and_nowhere_else(tmp_path):
    kernel = textwrap.dedent(KERNEL)
    (tmp_path / "first.py").write_text(kernel)
    (tmp_path / "moved.py").write_text(kernel.replace("@triton", "# a line more\n@triton"))
    (tmp_path / "changed.py").write_text(kernel.replace("x + TWO", "x - TWO"))  # in what it calls
    (tmp_path / "constant.py").write_text(kernel.replace("constexpr(2)", "constexpr(3)"))

    def run(*words: str, status: int = 0) -> tuple[list[dict], str]:
        env = commands.environment(TRITON_CACHE_DIR=str(tmp_path / words[-1]))
        done = commands.run("-c", PROGRAM, tmp_path, *words, env=env)
        assert done.returncode == status, done.stderr[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

    (first, moved, changed, constant), _ = run("first,moved,changed,constant")
    assert first == moved and len({row["key"] for row in (first, changed, constant)}) == 3
    assert first["kernel"] == "add" and first["reg"] > 0 and first["spills"] == first["shared"] == 0

    known = {name: 0 for name in ("stack", "local", "spills", "shared", "w_rows")} | {"reg": 99}
    (tmp_path / "compiled.json").write_text(json.dumps({first["key"]: known}))
    again, _ = run("first,moved,changed")
    assert again == [first | known, moved | known, changed]  # what the file has is not compiled
    _, error = run("first", "checked", status=1)
    assert "'reg': 99" in error and "for add, which is" in error
