import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from momoe_titan.kernels import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ONE_MODULE = ROOT / "momoe_titan/kernels/versions.py"


def bounds(requirements):
    return {found.name: found.specifier for found in map(Requirement, requirements)}


def test_the_names_are_functions_of_gluon():
    for name in ("tma_load", "tma_store", "cp_async", "reinterpret"):
        function = getattr(versions, name)
        assert function.__module__.startswith("triton.") and getattr(function, "__triton_builtin__", False), name


def test_names_that_differ_stand_in_one_module():
    differ = re.compile(r"async_copy_global_to_shared|async_copy_shared_to_global|_reinterpret\b|make_launcher")
    using = {path for path in (ROOT / "momoe_titan").rglob("*.py") if differ.search(path.read_text())}
    assert using == {ONE_MODULE}


@pytest.mark.parametrize("release", [(3, 5), *versions.HOPPER_RELEASES, (3, 8), (3, 9), (3, 10)])
def test_which_releases_take_the_hopper_kernels(release, monkeypatch):
    monkeypatch.delenv(versions.ANY_RELEASE, raising=False)
    monkeypatch.setattr(versions, "TRITON", release)
    assert versions.takes_hopper_kernels() is (release in versions.HOPPER_RELEASES)
    for word in ("0", "yes", ""):
        monkeypatch.setenv(versions.ANY_RELEASE, word)
        assert versions.takes_hopper_kernels() is (release in versions.HOPPER_RELEASES)


@pytest.mark.parametrize("library, major", [("torch", 2), ("triton", 3)])
def test_the_table_of_releases_has_what_can_be_installed(library, major):
    rows = json.loads((ROOT / "benchmarks/results/versions.json").read_text())["rows"]
    allowed = {
        f"{major}.{minor}" for minor in range(40) if f"{major}.{minor}.1" in bounds(PROJECT["dependencies"])[library]
    }
    assert {".".join(row[library].split(".")[:2]) for row in rows} >= allowed
    for row in rows:
        release = tuple(map(int, row["triton"].split(".")[:2]))
        installs = all(f"{row[name]}.1" in bounds(PROJECT["dependencies"])[name] for name in ("torch", "triton"))
        assert installs == (row["used"] == "yes")
        assert row["used"] == ("yes" if release in versions.HOPPER_RELEASES else "no")
