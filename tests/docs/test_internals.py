"""docs/internals.md lists every private name in use and every patch, and the places it names exist."""

import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests.docs.private_names import private_names

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "momoe_titan"
PAGE = (ROOT / "docs/internals.md").read_text()


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)[1]


def rows(text: str) -> list[list[str]]:
    """The rows of all tables of a text, without heads."""
    lines = text.splitlines()
    after_head = [i for i, line in enumerate(lines) if line.startswith("| ---")]
    found = []
    for i in after_head:
        for line in lines[i + 1 :]:
            if not line.startswith("|"):
                break
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def in_ticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_private_name_is_listed():
    listed = {name for row in rows(section("Private names of other libraries")) for name in in_ticks(row[0])}
    ends = {name.split(".")[-1] for name in listed}
    used = private_names()
    missing = {
        name: sorted(users)
        for name, users in used.items()
        if name.split(".")[-1] not in ends and not any(name.startswith(listed_name + ".") for listed_name in listed)
    }
    assert not missing


@pytest.mark.parametrize("row", rows(section("Private names of other libraries")), ids=lambda row: row[0])
def test_a_listed_name_is_in_use_where_it_says(row):
    names, places, _, tests = row
    files = [PACKAGE / place for place in in_ticks(places)]
    assert all(file.exists() for file in files), places
    sources = [p.read_text() for f in files for p in (f.rglob("*.py") if f.is_dir() else [f])]
    for name in in_ticks(names):
        assert not files or any(name.split(".")[-1] in source for source in sources), name
    for test in in_ticks(tests):
        assert (ROOT / test).exists(), test


def test_every_patch_is_listed_and_there_are_at_most_eight():
    listed = Counter(in_ticks(row[0])[0] for row in rows(section("What is replaced in other libraries")))
    assert listed.total() <= 8
    patched = Counter()
    for path in PACKAGE.rglob("*.py"):
        patches = len(re.findall(r"mock\.patch[.(]", path.read_text()))
        if patches:
            patched[path.relative_to(PACKAGE).as_posix()] = patches
    assert patched == Counter({file: n for file, n in listed.items() if file != "model/parallel/pipeline.py"})


def test_the_tree_has_every_folder_and_every_layer():
    tree = section("The tree")
    folders = {path.parent.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    missing = {f for f in folders - {"momoe_titan", "momoe_titan/config/checks"} if f"`{f}/`" not in tree}
    assert not missing
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    contract = [re.sub(r" : \(\w+\)", "", layer).replace(" : ", ", ") for layer in layers]
    assert contract == re.findall(r"^    (\S.*)$", tree, flags=re.MULTILINE)


def test_places_to_change_exist():
    for row in rows(section("Where to change what")):
        for place in in_ticks(" ".join(row[1:])):
            if "/" in place and " " not in place:
                assert (ROOT / place).exists(), place
