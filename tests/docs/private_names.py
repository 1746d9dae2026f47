"""Private names of other libraries that the package uses, found in its syntax trees.

python tests/docs/private_names.py    # each with the files that use it
"""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "triton", "torchtitan", "torchdata", "datasets")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def dotted(node: ast.expr) -> list[str] | None:
    """`a.b.c` as a list, None for other expressions."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


def own_names(trees: list[ast.AST]) -> set[str]:
    """Private names that the package itself defines: functions, classes, attributes, variables."""
    names = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if dotted(node.value) in (["self"], ["cls"]):
                    names.add(node.attr)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return {name for name in names if is_private(name)}


def private_names_in(tree: ast.AST, own: set[str]) -> set[str]:
    """Private names of other libraries in one file, with their modules where the file shows them."""
    roots: dict[str, str] = {}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] in LIBRARIES:
                    roots[name.asname or name.name.split(".")[0]] = name.asname and name.name or name.name.split(".")[0]
                    if any(map(is_private, name.name.split("."))):
                        found.add(name.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            for name in node.names:
                full = f"{node.module}.{name.name}"
                roots[name.asname or name.name] = full
                if any(map(is_private, full.split("."))):
                    found.add(full)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("torch._"):
            found.add(node.value)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if is_private(node.attr) and (chain := dotted(node)) and chain[0] in roots:
            found.add(".".join([roots[chain[0]], *chain[1:]]))
        elif is_private(node.attr) and node.attr not in own and dotted(node.value) not in (["self"], ["cls"]):
            found.add(node.attr)
    # of a chain with two private parts the longer one says it all
    return {name for name in found if not any(other.startswith(name + ".") for other in found)}


def private_names() -> dict[str, set[str]]:
    """Each private name, with the files of the package that use it."""
    files = sorted((ROOT / "momoe_titan").rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    own = own_names(list(trees.values()))
    users = defaultdict(set)
    for path, tree in trees.items():
        for name in private_names_in(tree, own):
            users[name].add(path.relative_to(ROOT / "momoe_titan").as_posix())
    return dict(users)


if __name__ == "__main__":
    for name, paths in sorted(private_names().items()):
        print(f"{name:70} {', '.join(sorted(paths))}")
