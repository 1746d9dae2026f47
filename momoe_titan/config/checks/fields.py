"""Checks types and ranges of single fields, which TorchTitan 0.2.2 does not check in a TOML file."""

from dataclasses import fields, is_dataclass

from torchtitan.config import JobConfig

from momoe_titan.config.field_types import check_types

OPTIMIZERS = ("Adam", "AdamW")  # all that torchtitan.components.optimizer builds


def check_fields(config: JobConfig) -> None:
    """Refuse a value that has the wrong type, or that no job can have.

    Leaves out `[momoe]`, which checks its own fields when it is built.

    Raises:
        ValueError: names the field, as written in TOML, its value, and what it must be.
    """
    for section in fields(config):
        values = getattr(config, section.name)
        if section.name != "momoe" and is_dataclass(values):
            check_types(section.name, values)
    _check_counts(config)
    _check_optimizer(config)
    if not (norm := config.training.max_norm) > 0:  # a negative one would turn the gradients round
        raise ValueError(f"training.max_norm is {norm}, must be above 0; inf clips nothing")


def _check_counts(config: JobConfig) -> None:
    at_least_1 = ["training.local_batch_size", "training.seq_len", "training.steps"]
    at_least_1 += ["training.gc_freq", "metrics.log_freq"]
    if config.validation.enable:
        at_least_1 += ["validation.local_batch_size", "validation.seq_len", "validation.freq"]
    for path in at_least_1:
        section, name = path.split(".")
        if (value := getattr(getattr(config, section), name)) < 1:
            raise ValueError(f"{path} is {value}, must be at least 1")
    if config.validation.enable and (steps := config.validation.steps) < 1 and steps != -1:
        raise ValueError(f"validation.steps is {steps}, must be at least 1, or -1 for all data")


def _check_optimizer(config: JobConfig) -> None:
    optimizer = config.optimizer
    for name in ("lr", "eps", "weight_decay"):
        if not (value := getattr(optimizer, name)) >= 0:  # so that NaN is refused too
            raise ValueError(f"optimizer.{name} is {value}, must be at least 0")
    for name in ("beta1", "beta2"):
        if not 0 <= (value := getattr(optimizer, name)) < 1:
            raise ValueError(f"optimizer.{name} is {value}, must be from 0 to below 1")
    if optimizer.name not in OPTIMIZERS:
        raise ValueError(f"optimizer.name is {optimizer.name!r}, must be one of {', '.join(map(repr, OPTIMIZERS))}")
