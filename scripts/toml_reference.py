#!/usr/bin/env python
"""Write docs/toml_reference.md from the [momoe] section's dataclass.

python scripts/toml_reference.py            # write it
python scripts/toml_reference.py --check    # exit status 1 if it is not up to date
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
import types
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/toml_reference.md"
INTRO = """\
# The section [momoe]

Written by scripts/toml_reference.py from momoe_titan/config/section.py: change that, not this.

```toml
[job]
custom_config_module = "momoe_titan.job_config"   # adds the section
```

Every field can also be given on the command line, where it wins over the file: `--momoe.FIELD
VALUE`, lists as `VALUE VALUE`. A value that cannot be used is refused before training, by name. All
other sections are TorchTitan's: `python -m momoe_titan.train --help` lists them with these.
"""
NAMES = {float: "number", int: "integer", str: "string", bool: "true or false"}


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a class."""
    (statement,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(statement, ast.ClassDef)
    docs = {}
    for field, below in itertools.pairwise(statement.body):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            docs[ast.unparse(field.target)] = inspect.cleandoc(str(below.value.value))
    return docs


def describe(hint: Any) -> str:
    """A type in the words of TOML."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(f"`{literal(part)}`" for part in parts)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(part) for part in parts)
    if origin is list:
        return "tables" if dataclasses.is_dataclass(parts[0]) else f"list ({describe(parts[0])})"
    return NAMES[hint]


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value)


def page() -> str:
    """The whole text.

    Raises:
        ValueError: a field that nothing is said about.
    """
    from momoe_titan.config.section import DataSource, Momoe

    fields = _fields(Momoe, "##") + ["# The tables [[momoe.data]]\n", *_fields(DataSource, "###")]
    return "\n".join([INTRO, *fields])


def _fields(cls: type, heading: str) -> list[str]:
    docs, hints, parts = field_docs(cls), typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        if field.name not in docs:
            raise ValueError(f"{cls.__name__.lower()}.{field.name} has no docstring in momoe_titan/config/section.py")
        default = field.default_factory() if callable(field.default_factory) else field.default
        kind = f"{describe(hints[field.name])}; default `{literal(default)}`"
        parts.append(f"{heading} {field.name}\n\n{kind}\n\n{docs[field.name]}\n")
    return parts


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Write docs/toml_reference.md from the [momoe] section's dataclass.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if not parser.parse_args(argv).check:
        PAGE.write_text(page())
        return 0
    if not PAGE.is_file() or PAGE.read_text() != page():
        print(f"{PAGE} is not up to date: run python scripts/toml_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
