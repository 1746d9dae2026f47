"""What `[activation_checkpoint]` and `[compile]` ask for, and what of it cannot work."""

from torchtitan.config import JobConfig
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.tools.logging import logger

from momoe_titan.config.section import STOCK_BACKEND


def compiles_model(job_config: JobConfig) -> bool:
    """Whether `[compile]` asks for the model, not only for the loss."""
    return job_config.compile.enable and "model" in job_config.compile.components


def check_activation_checkpoint(job_config: JobConfig) -> None:
    """Refuse an `[activation_checkpoint]` that cannot work; log fields without effect.

    Raises:
        ValueError: names the field and its value.
    """
    config = job_config.activation_checkpoint
    compiled = compiles_model(job_config)
    by_op = config.mode == "selective" and config.selective_ac_option == "op"
    if config.mode == "selective" and not (by_op or config.selective_ac_option.isdigit()):
        raise ValueError(
            f"activation_checkpoint.selective_ac_option is {config.selective_ac_option!r}, must be "
            "'op' or a number n for every n-th layer"
        )
    ours = getattr(getattr(job_config, "momoe", None), "backend", None) != STOCK_BACKEND
    if config.debug and (by_op or (ours and config.mode in ("full", "selective"))):
        raise ValueError(
            f"activation_checkpoint.debug is true with mode {config.mode!r}: torch's checkpoint takes no debug beside "
            "a choice of what is recomputed, which the experts, or selective_ac_option 'op', need"
        )
    if config.mode == "memory_budget":
        if not compiled:
            raise ValueError(
                "activation_checkpoint.mode is 'memory_budget', which needs compile.enable and "
                f"'model' in compile.components; they are {job_config.compile.enable} and "
                f"{job_config.compile.components}"
            )
        if not 0 <= config.memory_budget <= 1:
            raise ValueError(f"activation_checkpoint.memory_budget is {config.memory_budget}, must be from 0 to 1")
    default = ActivationCheckpoint()
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
