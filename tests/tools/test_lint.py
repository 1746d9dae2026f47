"""The tools that read the whole repository find nothing: ruff, basedpyright, import-linter, deptry."""

import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

COMMANDS = {
    "ruff check": ["ruff", "check", "--quiet", "--no-cache", "."],
    "ruff format": ["ruff", "format", "--check", "--no-cache", "."],
    "basedpyright": ["basedpyright", "--pythonpath", sys.executable],
    "lint-imports": ["lint-imports", "--no-cache"],
    "deptry": ["deptry", "--no-ansi", "momoe_titan", "benchmarks", "scripts"],
}


def is_allowed(package: str) -> bool:
    """Whether the release that is installed lies in the range of pyproject.toml."""
    wanted = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    (specifier,) = (w.specifier for w in wanted if w.name == package)
    return specifier.contains(metadata.version(package))


@pytest.mark.parametrize("name", COMMANDS)
def test_finds_nothing(name):
    if name == "basedpyright" and not is_allowed("triton"):
        pytest.skip("type hints of another release of Triton describe the inside of kernels in another way")
    tool, *arguments = COMMANDS[name]
    path = shutil.which(tool, path=BIN)
    if path is None:
        pytest.skip(f"needs {tool} (pip install '.[test]')")
    done = subprocess.run(
        [path, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
