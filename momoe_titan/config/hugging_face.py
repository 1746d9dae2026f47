"""What a job asks of Hugging Face's format: weights to start from, weights to leave."""

import os

from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
)
from torchtitan.config import JobConfig

from momoe_titan.config.model_args import ModelArgs

FORMATS_WITH_BIAS = ("glm4_moe",)  # formats, by transformers' `model_type`, that have a place for the balancing bias


def folder_to_load(job_config: JobConfig) -> str:
    """The Hugging Face folder of a job, as TorchTitan's checkpoint manager picks it."""
    checkpoint = job_config.checkpoint
    if checkpoint.initial_load_in_hf and checkpoint.initial_load_path:
        return checkpoint.initial_load_path
    return job_config.model.hf_assets_path


def check_hugging_face(args: ModelArgs, job_config: JobConfig) -> None:
    """Refuse a job whose model cannot be loaded from or saved to Hugging Face's format as asked, or
    that leaves out of a checkpoint what is in none.

    Raises:
        ValueError: names the field and its value.
    """
    checkpoint = job_config.checkpoint
    if not checkpoint.enable:
        return
    states = [MODEL, OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE]
    excluded = checkpoint.exclude_from_loading
    if isinstance(excluded, str) or not set(excluded) <= set(states):
        raise ValueError(f"checkpoint.exclude_from_loading is {excluded!r}, must be a list of some of {states}")
    if checkpoint.initial_load_in_hf_quantized:
        raise ValueError(
            "checkpoint.initial_load_in_hf_quantized is true, must be false: momoe_llama does not "
            "load quantized weights"
        )
    if checkpoint.initial_load_in_hf and not checkpoint.initial_load_model_only:
        raise ValueError(
            "checkpoint.initial_load_model_only is false, must be true with "
            "checkpoint.initial_load_in_hf: a Hugging Face folder holds weights only"
        )
    if checkpoint.last_save_in_hf and not checkpoint.last_save_model_only:
        raise ValueError(
            "checkpoint.last_save_model_only is false, must be true with checkpoint.last_save_in_hf: "
            "a Hugging Face folder holds weights only. To have both, set last_save_in_hf to false and "
            "convert the last checkpoint with python -m momoe_titan.export"
        )
    if checkpoint.last_save_in_hf and checkpoint.create_seed_checkpoint:
        raise ValueError(
            "checkpoint.last_save_in_hf is true, must be false with "
            "checkpoint.create_seed_checkpoint: no run starts from a seed in Hugging Face's format"
        )
    for field in ("initial_load_in_hf", "last_save_in_hf"):
        if getattr(checkpoint, field):
            try:
                name = args.hf_format()
            except ValueError as e:
                raise ValueError(f"checkpoint.{field} is true, but {e}") from e
    if checkpoint.last_save_in_hf and name not in FORMATS_WITH_BIAS:
        if any(args.layer_load_balance_rate(i) for i in args.moe_layer_ids):
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
