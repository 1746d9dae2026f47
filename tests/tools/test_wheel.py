"""What an installation by pip has: every module, and the files that are read at run time."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import momoe_titan

ROOT = Path(__file__).resolve().parents[2]
DATA = ["py.typed", "dashboard/page.html", "assets/tokenizer/tokenizer.json", "assets/tokenizer/tokenizer_config.json"]


def test_wheel_has_every_module_and_data_file(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools >= 77 (pip install '.[test]')")
    source = tmp_path / "source"  # a build leaves files beside the sources
    shutil.copytree(ROOT / "momoe_titan", source / "momoe_titan", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.split("-")[1] == momoe_titan.__version__
    modules = {str(path.relative_to(source)) for path in source.joinpath("momoe_titan").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        assert modules | {f"momoe_titan/{name}" for name in DATA} <= set(archive.namelist())
