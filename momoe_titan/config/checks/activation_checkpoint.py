"""Checks the section `[activation_checkpoint]`."""

from torchtitan.config import JobConfig
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.tools.logging import logger

from momoe_titan.config.compile import compiles_model
from momoe_titan.config.model_args import ModelArgs
from momoe_titan.config.section import STOCK_BACKEND


def check_activation_checkpoint(args: ModelArgs, job_config: JobConfig) -> None:
    """Refuse settings that cannot work; log those without effect.

    Raises:
        ValueError: names the field and its value.
    """
    config = job_config.activation_checkpoint
    by_op = config.mode == "selective" and config.selective_ac_option == "op"
    if config.mode == "selective" and not (by_op or config.selective_ac_option.isdigit()):
        raise ValueError(
            f"activation_checkpoint.selective_ac_option is {config.selective_ac_option!r}, must be "
            "'op' or a number n for every n-th layer"
        )
    ours = args.backend != STOCK_BACKEND
    if config.debug and (by_op or (ours and config.mode in ("full", "selective"))):
        raise ValueError(
            f"activation_checkpoint.debug is true with mode {config.mode!r}: torch's checkpoint takes no debug beside "
            "a choice of what is recomputed, which the experts, or selective_ac_option 'op', need"
        )
    if config.mode == "memory_budget":
        _check_memory_budget(job_config)
    _log_without_effect(job_config)


def _check_memory_budget(job_config: JobConfig) -> None:
    if not compiles_model(job_config):
        raise ValueError(
            "activation_checkpoint.mode is 'memory_budget', which needs compile.enable and "
            f"'model' in compile.components; they are {job_config.compile.enable} and "
            f"{job_config.compile.components}"
        )
    if not 0 <= (budget := job_config.activation_checkpoint.memory_budget) <= 1:
        raise ValueError(f"activation_checkpoint.memory_budget is {budget}, must be from 0 to 1")


def _log_without_effect(job_config: JobConfig) -> None:
    config, default = job_config.activation_checkpoint, ActivationCheckpoint()
    compiled = compiles_model(job_config)
    for name, has_effect in (
        ("selective_ac_option", config.mode == "selective"),
        ("memory_budget", config.mode == "memory_budget"),
        ("early_stop", config.mode in ("full", "selective") and not compiled),
    ):
        if getattr(config, name) != getattr(default, name) and not has_effect:
            logger.warning(
                f"activation_checkpoint.{name} = {getattr(config, name)!r} has no effect with "
                f"activation_checkpoint.mode = {config.mode!r}"
                + (" and a compiled model" if name == "early_stop" and compiled else "")
            )
