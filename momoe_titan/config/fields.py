"""Fields of a job that TorchTitan 0.2.2 takes as they come, checked one by one when the configuration is read."""

import copy
import os
import types
from dataclasses import fields, is_dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from torchtitan.config import JobConfig

OPTIMIZERS = ("Adam", "AdamW")  # of torchtitan.components.optimizer
# What works beyond what TorchTitan's types say.
_HINTS = {"training.mixed_precision_reduce": Literal["float32", "bfloat16"]}


def check_fields(config: "JobConfig") -> None:
    """Types and ranges, which TorchTitan does not check in a TOML file; those of `[momoe]` are checked by itself.

    Raises:
        ValueError: names the field, as written in TOML, its value, and what it must be.
    """
    for section in fields(config):
        values = getattr(config, section.name)
        if section.name != "momoe" and is_dataclass(values):
            _check_types(section.name, values)
    _check_ranges(config)


def check_flavor(config: "JobConfig") -> Any:
    """A copy of the model arguments that `model.flavor` names, before the job's own settings.

    Raises:
        ValueError: `model.name` or `model.flavor` is not known.
    """
    from torchtitan.protocols.train_spec import get_train_spec

    try:
        spec = get_train_spec(config.model.name)
    except ValueError as e:
        raise ValueError(f"model.name {config.model.name!r}: {e}") from e
    if config.model.flavor not in spec.model_args:
        raise ValueError(f"model.flavor {config.model.flavor!r} is none of {', '.join(map(repr, spec.model_args))}")
    return copy.deepcopy(spec.model_args[config.model.flavor])


def _check_types(name: str, values: Any) -> None:
    hints = get_type_hints(type(values))
    for field in fields(values):
        path, value = f"{name}.{field.name}", getattr(values, field.name)
        hint = _HINTS.get(path, hints[field.name])
        if is_dataclass(value):
            _check_types(path, value)
        elif not _is(value, hint):
            raise ValueError(f"{path} is {value!r}, must be {_said(hint)}")


def _is(value: Any, hint: Any) -> bool:
    """Whether the value is of the type, of those that a TOML file can have; of another, it is."""
    origin = get_origin(hint)
    if origin is Literal:
        return value in get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_is(value, each) for each in get_args(hint))
    if origin is list:
        return isinstance(value, (list, tuple)) and all(_is(item, get_args(hint)[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def _said(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_said, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list of {get_args(hint)[0].__name__}"
    return {bool: "true or false", type(None): "left out"}.get(hint, f"of type {getattr(hint, '__name__', hint)}")


def _check_ranges(config: "JobConfig") -> None:
    at_least_1 = [
        "training.local_batch_size",
        "training.seq_len",
        "training.steps",
        "training.gc_freq",
        "metrics.log_freq",
    ]
    if config.validation.enable:
        at_least_1 += ["validation.local_batch_size", "validation.seq_len", "validation.freq"]
    for path in at_least_1:
        section, name = path.split(".")
        if (value := getattr(getattr(config, section), name)) < 1:
            raise ValueError(f"{path} is {value}, must be at least 1")
    for name in ("lr", "eps", "weight_decay"):
        if not (value := getattr(config.optimizer, name)) >= 0:
            raise ValueError(f"optimizer.{name} is {value}, must be at least 0")
    for name in ("beta1", "beta2"):
        if not 0 <= (value := getattr(config.optimizer, name)) < 1:
            raise ValueError(f"optimizer.{name} is {value}, must be from 0 to below 1")
    if config.validation.enable and (steps := config.validation.steps) < 1 and steps != -1:
        raise ValueError(f"validation.steps is {steps}, must be at least 1, or -1 for all data")
    if not (norm := config.training.max_norm) > 0:  # a negative one turns the gradients round
        raise ValueError(f"training.max_norm is {norm}, must be above 0; inf clips nothing")
    if (name := config.optimizer.name) not in OPTIMIZERS:
        raise ValueError(f"optimizer.name is {name!r}, must be one of {', '.join(map(repr, OPTIMIZERS))}")
    if config.checkpoint.create_seed_checkpoint:
        if not config.checkpoint.enable:
            raise ValueError("checkpoint.create_seed_checkpoint is true, but checkpoint.enable is false")
        if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(
                f"checkpoint.create_seed_checkpoint is true, which takes one process, but there are {world}"
            )
