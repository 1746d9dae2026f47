"""Runs all checks of a job's settings.

`python -m momoe_titan.train` and the planner call `check_job` before anything is built. Under TorchTitan's own command
the same checks run when its trainer calls `MomoeLlamaArgs.update_from_config`. What only a training run needs of its
machine, mainly folders, tokenizer and data, is checked by `checks.folders_and_data`.
"""

import copy
import dataclasses
import os
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.checks.activation_checkpoint import check_activation_checkpoint
from momoe_titan.config.checks.checkpoint import check_checkpoint, check_hugging_face, warn_of_bias_without_place
from momoe_titan.config.checks.converter import check_converter, converts
from momoe_titan.config.checks.expert_parallel import check_expert_parallel
from momoe_titan.config.checks.fields import check_fields
from momoe_titan.config.checks.model_args import check_model_args
from momoe_titan.config.checks.parallelism import check_parallelism
from momoe_titan.config.flavor import flavor_args, import_custom_module
from momoe_titan.config.machine import Machine, machine
from momoe_titan.config.model_args import ModelArgs
from momoe_titan.config.section import STOCK_BACKEND
from momoe_titan.save_percent import AUTO

MISSING_UNDER_TORCHTITAN = (
    "This job was not started by momoe_titan.train, which takes the same options. It lacks: checks of folders, data "
    "and tokenizer before anything is built; resuming from the last whole checkpoint, with the job's own learning "
    "rate and a list of what has changed; training without a GPU; config.json and tokenizer beside Hugging Face "
    "weights; a loss without whole logits (momoe.loss_chunk_mib)"
)
FLEX_HEAD_DIM = 16  # the least
_CHECKED = "_checked_by_momoe_titan"  # attribute of a job's configuration


@dataclasses.dataclass
class _Checked:
    """What has been checked already, so that the trainer's own call neither checks nor logs it again.

    Args:
        settings: of the job.
        args: of the model, before it took these settings; None if only the job's fields were checked.
        machine: that the job was checked for.
    """

    settings: dict[str, Any]
    args: Any
    machine: Machine


def check_job(job_config: JobConfig) -> Any:
    """Refuse a job that cannot work; log fields without effect. Imports `experimental.custom_import`.

    Returns:
        The model's arguments with the job's settings.

    Raises:
        ValueError: names the field, as written in TOML, its value, and the reason.
    """
    check_fields(job_config)
    vars(job_config)[_CHECKED] = _Checked(dataclasses.asdict(job_config), None, machine())
    import_custom_module(job_config)
    if converts(job_config):
        check_converter(job_config)
    args = flavor_args(job_config)
    args.update_from_config(job_config)
    return args


def configure(args: ModelArgs, job_config: JobConfig) -> None:
    """Give a model's arguments the settings of a job; refuse what cannot work, and log fields without effect.

    Args:
        args: of the model; takes over the settings.

    Raises:
        ValueError: names the field, as written in TOML, its value, and the reason.
    """
    before: _Checked | None = getattr(job_config, _CHECKED, None)
    now = _Checked(dataclasses.asdict(job_config), copy.deepcopy(args), machine())
    if before == now:
        args.take_settings(job_config)
        return
    if before is None:
        logger.warning(MISSING_UNDER_TORCHTITAN)
    if before is None or before.settings != now.settings:
        check_fields(job_config)
    if not hasattr(job_config, "momoe"):
        logger.info(
            "No [momoe] section: the flavor's own settings are used. Set "
            'job.custom_config_module = "momoe_titan.job_config" to have one.'
        )
    longest = args.max_seq_len
    args.take_settings(job_config)
    if args.max_seq_len > longest:
        logger.warning(f"training.seq_len is {args.max_seq_len}, longer than the model's own maximum, {longest}")
    check_model_args(args, section="momoe.")
    check_backend(args, now.machine)
    check_document_mask(args, now.machine)
    check_save_percent(args, job_config)
    check_activation_checkpoint(args, job_config)
    check_converters_and_validation(job_config)
    check_checkpoint(job_config, now.machine)
    check_hugging_face(args, job_config)
    warn_of_bias_without_place(args)
    check_expert_parallel(args, job_config, now.machine)
    check_parallelism(args, job_config, now.machine)
    vars(job_config)[_CHECKED] = now


def check_document_mask(args: ModelArgs, machine: Machine) -> None:
    """Refuse heads that flex attention has no kernel for."""
    if args.document_mask and machine.has_gpu and args.attention_head_dim < FLEX_HEAD_DIM:
        raise ValueError(
            f"momoe.document_mask is true, but the model's heads are {args.attention_head_dim} wide, must be at least "
            f"{FLEX_HEAD_DIM}: flex attention has no kernel for them"
        )


def check_backend(args: ModelArgs, machine: Machine) -> None:
    """Refuse Triton's kernels on a machine that cannot run them."""
    if args.backend == "triton" and not machine.has_gpu and os.environ.get("TRITON_INTERPRET", "0") == "0":
        raise ValueError("momoe.backend is 'triton', but this machine has no GPU; 'auto' and 'torch' work here")


def check_save_percent(args: ModelArgs, job_config: JobConfig) -> None:
    """Refuse "auto" with pipeline stages; log what TorchTitan's own MoE layers ignore."""
    section: Any = getattr(job_config, "momoe", None)
    auto = section is not None and section.save_percent == AUTO
    if auto and (degree := job_config.parallelism.pipeline_parallel_degree) != 1:
        raise ValueError(
            f"momoe.save_percent is {AUTO!r}, which knows no pipeline stages, but "
            f"parallelism.pipeline_parallel_degree is {degree}"
        )
    if args.backend == STOCK_BACKEND:
        if auto or any(args.save_percent):
            logger.warning(
                f"momoe.save_percent has no effect with momoe.backend = {STOCK_BACKEND!r}: "
                "TorchTitan's MoE saves what autograd saves."
            )
        if args.check_ids:
            logger.warning(f"momoe.check_ids has no effect with momoe.backend = {STOCK_BACKEND!r}.")


def check_converters_and_validation(job_config: JobConfig) -> None:
    """Refuse validation on longer sequences than the model has positions for, and TorchTitan's converters."""
    training, validation = job_config.training, job_config.validation
    if validation.enable and validation.seq_len > training.seq_len:
        raise ValueError(
            f"validation.seq_len is {validation.seq_len}, must be at most training.seq_len, "
            f"{training.seq_len}: the model has no positions beyond"
        )
    # TorchTitan's converters swap modules by type; float8 experts would need kernels of their own.
    if job_config.model.converters:
        raise ValueError(
            f"model.converters is {job_config.model.converters}, must be empty: quantised experts are not supported"
        )
