"""docs/reliability.md names a test for every bad input and fault, and the tests are there."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/reliability.md"
ROWS = 55
CELL = r"\| *(\d*) *\|[^|]*\|[^|]*\| `(tests/[\w/]+\.py)::(\w+)` \| (CPU|GPU|both) \|"


def rows() -> list[tuple[int, str, str, str]]:
    """(number, file, test, where it runs); a row without a number goes on with the one above."""
    found, number = [], 0
    for line in PAGE.read_text().splitlines():
        if match := re.fullmatch(CELL, line):
            number = int(match[1] or number)
            found.append((number, *match.groups()[1:]))
        else:
            assert "::test_" not in line, f"not a row of the table: {line}"
    return found


@cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_fault_has_a_row():
    assert sorted({number for number, *_ in rows()}) == list(range(1, ROWS + 1))


@pytest.mark.parametrize("number, file, test, where", rows(), ids=lambda value: str(value))
def test_the_named_test_is_there_and_runs_where_the_table_says(number, file, test, where):
    function = functions(file).get(test)
    assert function is not None, f"row {number}: {file} has no {test}"
    marks = {ast.unparse(decorator) for decorator in function.decorator_list}
    needs_gpu = "pytest.mark.gpu" in marks or "pytestmark = pytest.mark.gpu" in (ROOT / file).read_text()
    on_both = "device" in {argument.arg for argument in function.args.args}
    assert where == ("GPU" if needs_gpu else "both" if on_both else "CPU"), f"row {number}: {test}"


def test_every_requirement_has_an_upper_end():
    """A new release of anything is tried before it is taken."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    required = [name for names in (project["dependencies"], *extras) for name in names]
    assert [name for name in required if not re.search(r"<|==|^momoe_titan\[", name)] == []


def test_modules_and_tests_that_faults_are_put_into_are_there():
    rooms = tomllib.loads((ROOT / "tests/trust/concerns.toml").read_text())
    modules = {module for room in rooms.values() for module in room}
    tests = {test for room in rooms.values() for named in room.values() for test in named}
    assert sorted(name for name in modules | tests if not (ROOT / name).exists()) == []
