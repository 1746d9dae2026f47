"""The tools that read the whole repository find nothing: ruff, basedpyright, import-linter, deptry."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

COMMANDS = {
    "ruff check": ["ruff", "check", "--quiet", "--no-cache", "."],
    "ruff format": ["ruff", "format", "--check", "--no-cache", "."],
    "basedpyright": ["basedpyright", "--pythonpath", sys.executable],
    "lint-imports": ["lint-imports", "--no-cache"],
    "deptry": ["deptry", "--no-ansi", "momoe_titan", "benchmarks", "scripts"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_finds_nothing(name):
    tool, *arguments = COMMANDS[name]
    path = shutil.which(tool, path=BIN)
    if path is None:
        pytest.skip(f"needs {tool} (pip install '.[test]')")
    done = subprocess.run(
        [path, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
