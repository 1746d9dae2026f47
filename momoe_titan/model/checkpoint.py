"""Starting from a checkpoint that has no load-balancing state."""

import os

from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torchtitan.components.checkpoint import CheckpointManager, MODEL
from torchtitan.config import JobConfig

from .moe import BalancedMoE

BALANCE_STATE = ("expert_bias", "tokens_per_expert")


def checkpoint_to_load(job_config: JobConfig) -> str | None:
    """The torch.distributed.checkpoint folder that TorchTitan will load for this job, if any.

    Follows `torchtitan.components.checkpoint.CheckpointManager.load`. None also for a checkpoint
    in Hugging Face's format.
    """
    config = job_config.checkpoint
    if not config.enable:
        return None
    folder = os.path.join(job_config.job.dump_folder, config.folder)
    if not os.path.exists(folder):
        return config.initial_load_path if not config.initial_load_in_hf else None
    step = config.load_step
    if step == -1:
        step = CheckpointManager._find_load_step(None, folder)
    if step == -1 or (step > 0 and MODEL in config.exclude_from_loading):
        return None
    return os.path.join(folder, f"step-{step}")


def allow_missing_balance_state(model: nn.Module, job_config: JobConfig) -> None:
    """Make a checkpoint loadable that lacks the bias or counts of some MoE layers.

    TorchTitan's loader refuses a checkpoint that lacks any key of the model's state dict. What
    this checkpoint lacks is left out of the state dict until it has been loaded; the layer then
    starts these buffers at zero, with a warning for the bias.

    Args:
        model: has a ModuleDict `layers` of blocks, not yet wrapped.
    """
    path = checkpoint_to_load(job_config)
    if path is None or not os.path.isfile(os.path.join(path, ".metadata")):
        return
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    for layer_id, block in model.layers.items():
        moe = getattr(block, "moe", None)
        if not isinstance(moe, BalancedMoE):
            continue
        for name in BALANCE_STATE:
            if f"layers.{layer_id}.moe.{name}" not in saved:
                moe.omit_from_next_load(name)
