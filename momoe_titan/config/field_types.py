"""Checks that the fields of a dataclass match their type hints. Imports no TorchTitan."""

import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Fields that work with more values than TorchTitan's type hint allows.
_WIDER_HINTS = {"training.mixed_precision_reduce": Literal["float32", "bfloat16"]}


def check_types(name: str, values: Any) -> None:
    """Refuse a dataclass one of whose fields does not hold what its type hint says.

    Args:
        name: of the section, put before the names of the fields.
        values: the dataclass; dataclasses in it are checked too.

    Raises:
        ValueError: names the field, its value, and what it must be.
    """
    hints = get_type_hints(type(values))
    for field in fields(values):
        path, value = f"{name}.{field.name}", getattr(values, field.name)
        hint = _WIDER_HINTS.get(path, hints[field.name])
        if is_dataclass(value):
            check_types(path, value)
        elif not _fits(value, hint):
            raise ValueError(f"{path} is {value!r}, must be {_describe(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether the value has the type. True for every type that a TOML file cannot write."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def _describe(hint: Any) -> str:
    """A type in the words of an error message."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list of {get_args(hint)[0].__name__}"
    return {bool: "true or false", type(None): "left out"}.get(hint, f"of type {getattr(hint, '__name__', hint)}")
