"""Limits that no tool checks: lengths, arguments and type hints of functions, circles of files, replaced attributes.

Kernels (functions under a `jit`) are free of them, and implementations of registered ops may take many arguments,
because an op's schema is flat.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.joinpath("momoe_titan").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# The layers' arguments are those of the seed, which users pass by position.
FIXED_SIGNATURES = {"momoe_titan/moe/layers.py:__init__"}
MAX_LINES, MAX_POSITIONAL, MAX_PATCHES = 60, 8, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def parse(name: str) -> ast.Module:
    return ast.parse(ROOT.joinpath(name).read_text())


def decorators(function: Function) -> list[str]:
    return [ast.unparse(decorator) for decorator in function.decorator_list]


def functions(tree: ast.Module) -> Iterator[Function]:
    """Every function but kernels."""
    for node in ast.walk(tree):
        if isinstance(node, Function) and not any(re.search(r"\bjit\b", text) for text in decorators(node)):
            yield node


def assert_none(found: dict) -> None:
    assert not found, "\n".join(f"{where}: {what}" for where, what in found.items())


def positional(function: Function) -> list[str]:
    """The names of positional arguments but self and cls."""
    every = [argument.arg for argument in function.args.posonlyargs + function.args.args]
    return [name for name in every if name not in ("self", "cls", "ctx")]


def op_implementations(tree: ast.Module) -> set[str]:
    """Names in a call `library.impl(...)`, or in the table that a loop around one goes through."""
    loops = [node for node in ast.walk(tree) if isinstance(node, ast.For)]
    impls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".impl")]
    names = {name.id for call in impls for name in ast.walk(call) if isinstance(name, ast.Name)}
    for loop in loops:
        if any(call in ast.walk(loop) for call in impls):
            names |= {name.id for name in ast.walk(loop.iter) if isinstance(name, ast.Name)}
    return names


def num_lines(function: Function) -> int:
    """Without the docstring."""
    first = function.body[0]
    doc = first if ast.get_docstring(function) is not None else None
    return function.end_lineno - function.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)


def test_no_function_is_long():
    lines = {f"{name}:{node.name}": num_lines(node) for name in NAMES for node in functions(parse(name))}
    assert_none({function: count for function, count in lines.items() if count > MAX_LINES})


def test_no_function_takes_many_positional_arguments():
    many = {}
    for name in NAMES:
        tree = parse(name)
        ops = op_implementations(tree)
        for node in functions(tree):
            is_op = node.name in ops or any(re.search("register_fake|custom_op", text) for text in decorators(node))
            if len(positional(node)) > MAX_POSITIONAL and not is_op:
                many[f"{name}:{node.name}"] = len(positional(node))
    assert_none({name: count for name, count in many.items() if name not in FIXED_SIGNATURES})


def test_public_functions_are_hinted():
    """At the top level of a module or a public class: every argument, and what comes back."""
    missing = {}
    for name in NAMES:
        tree = parse(name)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        bodies = [tree.body, *(node.body for node in classes)]
        for node in functions(tree):
            if node.name.startswith("_") or not any(node in body for body in bodies):
                continue
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            without = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
            if without or node.returns is None:
                missing[f"{name}:{node.name}"] = [*without, *(["return"] if node.returns is None else [])]
    assert_none(missing)


def test_no_circle_of_files():
    """Imports inside functions and under TYPE_CHECKING count."""
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in NAMES}
    graph = {}
    for module, name in modules.items():
        imported = set()
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: write absolute imports"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    imported.add(inner if inner in modules else node.module)
        graph[module] = {other for other in imported if other in modules and other != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(" <- ".join(e.args[1]))


OWN_ATTRIBUTES = {
    attribute
    for name in NAMES
    for attribute in re.findall(r"self\.(\w+)\b[^=\n]*=[^=]", ROOT.joinpath(name).read_text())
}
# Set by whoever wants to be called: Triton's triton.knobs.compilation.listener.
HOOKS = {"listener"}


class Replaced(ast.NodeVisitor):
    """Fills `found` with (line, what) of everything that replaces a part of another's object or module.

    That is a call of mock.patch, an attribute of a module (by setattr too), a private attribute of another object by
    something that may be called, and a public one by a function of this file.
    """

    def __init__(self, tree: ast.Module):
        self.found: list[tuple[int, str]] = []
        nodes = list(ast.walk(tree))
        imports = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        self.modules = {(alias.asname or alias.name).split(".")[0] for alias in imports}
        variables = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        self.functions = {node.name for node in nodes if isinstance(node, Function)} - variables
        constants = [n for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)]
        self.constants = {ast.unparse(target): node.value for node in constants for target in node.targets}
        self.visit(tree)

    def text(self, node: ast.expr) -> str:
        node = self.constants.get(ast.unparse(node), node)
        return str(node.value) if isinstance(node, ast.Constant) else ast.unparse(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if re.fullmatch(r"(mock\.)?patch(\.object|\.dict|\.multiple)?", called):
            what = self.text(node.args[1] if called.endswith("object") else node.args[0])
            self.found.append((node.lineno, what.rpartition(".")[2]))
        elif called == "setattr":
            what = self.text(node.args[1])
            if root(node.args[0]) in self.modules or what.startswith("_"):
                self.found.append((node.lineno, what))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        is_function = isinstance(node.value, ast.Lambda) or ast.unparse(node.value) in self.functions
        for target in node.targets:
            if not isinstance(target, ast.Attribute) or root(target) in ("self", "cls"):
                continue
            is_private = target.attr.startswith("_") and not target.attr.startswith("__")
            is_theirs = is_private or target.attr not in OWN_ATTRIBUTES | HOOKS
            may_be_called = is_function or (is_private and isinstance(node.value, ast.Call))
            if root(target) in self.modules or (is_theirs and may_be_called):
                self.found.append((node.lineno, target.attr))
        self.generic_visit(node)


def root(node: ast.expr) -> str:
    return ast.unparse(node).split(".")[0].split("(")[0]


def test_few_attributes_are_replaced_and_each_has_a_reason_in_the_internals_page():
    page = ROOT.joinpath("docs/internals.md").read_text()
    places = [(f"{name}:{line}", what) for name in NAMES for line, what in Replaced(parse(name)).found]
    assert_none({place: what for place, what in places if what not in page})
    assert len(places) <= MAX_PATCHES, places


@pytest.mark.parametrize(
    "text, what",
    [
        ("mock.patch('a.b', 1)", "b"),
        ("mock.patch.object(module, 'name', 1)", "name"),
        ("mock.patch.dict(os.environ, A='1')", "environ"),
        ("NAME = 'name'\nmock.patch.object(module, NAME, 1)", "name"),
        ("import module\nsetattr(module, 'name', 1)", "name"),
        ("import module\nmodule.name = 1", "name"),
        ("stage._name = wrapped(stage._name)", "_name"),
        ("def f(): pass\nstage.of_theirs = f", "of_theirs"),
        ("stage.of_theirs = lambda: 0", "of_theirs"),
        ("self._name = 1; ctx.name = x; options._threads = 1", None),
    ],
)
def test_replaced_attributes_are_seen(text, what):
    assert [found for _, found in Replaced(ast.parse(text)).found] == ([] if what is None else [what])
