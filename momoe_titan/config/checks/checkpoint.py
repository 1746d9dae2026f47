"""Checks the section `[checkpoint]`, and loading from and saving to Hugging Face's format."""

import os

from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
)
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.hugging_face import FORMATS_WITH_BIAS, folder_to_load
from momoe_titan.config.machine import Machine
from momoe_titan.config.model_args import ModelArgs

STATES = [MODEL, OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE]  # what a checkpoint holds


def check_checkpoint(job_config: JobConfig, machine: Machine) -> None:
    """Refuse fields of `[checkpoint]` that exclude one another, or that TorchTitan cannot use.

    Raises:
        ValueError: names the field and its value.
    """
    checkpoint = job_config.checkpoint
    if checkpoint.create_seed_checkpoint:
        if not checkpoint.enable:
            raise ValueError("checkpoint.create_seed_checkpoint is true, but checkpoint.enable is false")
        if (processes := machine.world_size or 1) > 1:
            raise ValueError(
                f"checkpoint.create_seed_checkpoint is true, which takes one process, but there are {processes}"
            )
    if not checkpoint.enable:
        return
    if not checkpoint.load_only:
        if checkpoint.interval < 1:
            raise ValueError(f"checkpoint.interval is {checkpoint.interval}, must be at least 1")
        # While the next one is written, the last one must not be deleted.
        if checkpoint.keep_latest_k == 1 or checkpoint.keep_latest_k < 0:
            raise ValueError(f"checkpoint.keep_latest_k is {checkpoint.keep_latest_k}, must be 0 (all) or at least 2")
    excluded = checkpoint.exclude_from_loading
    if isinstance(excluded, str) or not set(excluded) <= set(STATES):
        raise ValueError(f"checkpoint.exclude_from_loading is {excluded!r}, must be a list of some of {STATES}")
    _check_exclusive_fields(job_config)


def _check_exclusive_fields(job_config: JobConfig) -> None:
    c = job_config.checkpoint
    for is_bad, message in (
        (
            c.initial_load_in_hf_quantized,
            "checkpoint.initial_load_in_hf_quantized is true, must be false: momoe_llama does not load quantized "
            "weights",
        ),
        (
            c.initial_load_in_hf and not c.initial_load_model_only,
            "checkpoint.initial_load_model_only is false, must be true with checkpoint.initial_load_in_hf: a Hugging "
            "Face folder holds weights only",
        ),
        (
            c.last_save_in_hf and not c.last_save_model_only,
            "checkpoint.last_save_model_only is false, must be true with checkpoint.last_save_in_hf: a Hugging Face "
            "folder holds weights only. To have both, set last_save_in_hf to false and convert the last checkpoint "
            "with python -m momoe_titan.export",
        ),
        (
            c.last_save_in_hf and c.create_seed_checkpoint,
            "checkpoint.last_save_in_hf is true, must be false with checkpoint.create_seed_checkpoint: no run starts "
            "from a seed in Hugging Face's format",
        ),
    ):
        if is_bad:
            raise ValueError(message)


def check_hugging_face(args: ModelArgs, job_config: JobConfig) -> None:
    """Refuse a model that cannot be loaded from, or saved to, Hugging Face's format as the job asks.

    Raises:
        ValueError: names the field and its value.
    """
    checkpoint = job_config.checkpoint
    if not checkpoint.enable:
        return
    if checkpoint.initial_load_in_hf:
        _hf_format(args, "initial_load_in_hf")
    if checkpoint.last_save_in_hf:
        name = _hf_format(args, "last_save_in_hf")
        moves_bias = any(args.layer_load_balance_rate(i) for i in args.moe_layer_ids)
        if moves_bias and name not in FORMATS_WITH_BIAS:
            raise ValueError(
                f"checkpoint.last_save_in_hf is true, but {name!r} cannot hold the bias that "
                "load balancing moves: set momoe.load_balance_rate to 0, or convert the "
                "checkpoint with python -m momoe_titan.export, which writes the bias beside the weights"
            )
    resumes = os.path.exists(os.path.join(job_config.job.dump_folder, checkpoint.folder))
    if checkpoint.initial_load_in_hf and not resumes:
        folder = folder_to_load(job_config)
        for field, theirs, ours in args.differences_from_hf(folder):
            raise ValueError(
                f"checkpoint.initial_load_in_hf is true, but by its config.json the model in "
                f"{folder!r} has {field} {theirs!r} and this one {ours!r}; "
                'model.flavor "hf" takes all from there'
            )


def warn_of_bias_without_place(args: ModelArgs) -> None:
    """Log that balancing moves a bias for which the model's Hugging Face format has no place, if so."""
    if not any(args.layer_load_balance_rate(i) for i in args.moe_layer_ids):
        return
    try:
        name = args.hf_format()
    except ValueError:
        return
    if name not in FORMATS_WITH_BIAS:
        logger.warning(
            f"momoe.load_balance_rule {args.load_balance_rule!r} moves a bias of each expert, for which Hugging Face's "
            f"format {name!r} has no place: other programs will choose other experts than this run. "
            "momoe.load_balance_rate = 0 with momoe.aux_loss_weight = 0.01 balances without a bias"
        )


def _hf_format(args: ModelArgs, field: str) -> str:
    try:
        return args.hf_format()
    except ValueError as e:
        raise ValueError(f"checkpoint.{field} is true, but {e}") from e
