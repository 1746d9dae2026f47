"""Checkpoints: which one a job resumes from, and what is done to keep it whole."""

import os
import shutil
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.stateful import Stateful
from torchtitan.components import checkpoint as titan
from torchtitan.components.checkpoint import (
    DATALOADER,
    LR_SCHEDULER,
    MODEL,
    OPTIMIZER,
    TRAIN_STATE,
)
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.section import STOCK_BACKEND
from momoe_titan.data.loader import TextDataloader
from momoe_titan.model.moe import BalancedMoE
from momoe_titan.model.stock_moe import StockMoE

BALANCE_STATE = ("expert_bias", "tokens_per_expert")
RANK_PREFIX = f"{DATALOADER}.dp_rank_"  # of the position of each data-parallel rank
BESIDE_WEIGHTS = {OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE}
ONLY_WEIGHTS = "it holds only weights (checkpoint.last_save_model_only)"


class CheckpointError(ValueError):
    """A checkpoint that the configuration names cannot be loaded.

    The message names the field of the configuration, the folder and the reason.
    """


def read_metadata(path: str) -> Metadata:
    """What a torch.distributed.checkpoint folder says of itself.

    Raises:
        CheckpointError: the folder does not hold all that was to be saved, or is none.
    """
    if not os.path.isdir(path):
        raise CheckpointError("there is no such folder")
    try:
        metadata = FileSystemReader(path).read_metadata()
    except FileNotFoundError:
        if os.path.isfile(os.path.join(path, "model.safetensors.index.json")):
            raise CheckpointError("it is in Hugging Face's format") from None
        # .metadata is written last, when all else is on the disk
        raise CheckpointError("it was not written to its end (no .metadata)") from None
    except Exception as e:  # whatever unpickling a damaged file raises
        raise CheckpointError(f"its .metadata cannot be read: {e!r}") from e
    sizes: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        name, end = stored.relative_path, stored.offset + stored.length
        sizes[name] = max(sizes.get(name, 0), end)
    for name, size in sizes.items():
        file = os.path.join(path, name)
        if not os.path.isfile(file):
            raise CheckpointError(f"its file {name} is missing")
        if os.path.getsize(file) < size:
            raise CheckpointError(f"its file {name} has {os.path.getsize(file)} of {size} bytes")
    return metadata


def find_fault(path: str, exclude_from_loading: list[str], model_only: bool) -> str | None:
    """Why this folder cannot be loaded, or None.

    Args:
        exclude_from_loading: of the job; without effect where `model_only`.
        model_only: only weights are to be loaded, as from step 0, a seed checkpoint.
    """
    try:
        saved = read_metadata(path).state_dict_metadata
    except CheckpointError as e:
        return str(e)
    needs_state = not model_only and not BESIDE_WEIGHTS.issubset(exclude_from_loading)
    if needs_state and f"{TRAIN_STATE}.step" not in saved:
        return ONLY_WEIGHTS
    return None


def find_step(folder: str, exclude_from_loading: list[str]) -> tuple[int, dict[int, str]]:
    """The last step that training can resume from, or -1, and why not from each later one."""
    faults: dict[int, str] = {}
    for step in sorted(saved_steps(folder), reverse=True):
        fault = find_fault(step_folder(folder, step), exclude_from_loading, model_only=step == 0)
        if fault is None:
            return step, faults
        faults[step] = fault
    return -1, faults


def step_folder(folder: str, step: int) -> str:
    return os.path.join(folder, f"step-{step}")


def saved_steps(folder: str) -> list[int]:
    """Steps of which there is a folder, complete or not."""
    if not os.path.isdir(folder):
        return []
    steps = [name.removeprefix("step-") for name in os.listdir(folder) if name.startswith("step-")]
    return [int(step) for step in steps if step.isdecimal()]


class CheckpointManager(titan.CheckpointManager):
    """TorchTitan's, for runs that can be killed at any moment and go on with other ranks.

    Resumes from the last checkpoint that is whole, and says which later ones it passed over; with
    none, starts as a new run does (TorchTitan then forgets checkpoint.initial_load_path). A folder
    that is written again is first made an incomplete one. The latest k whole checkpoints are kept,
    beside the one being written. The position in the data is shared out anew where the number of
    data-parallel ranks has changed. Bias and counts of load balancing keep their dtype in an
    export.
    """

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """As TorchTitan's.

        Raises:
            CheckpointError: names the field by which this checkpoint was asked for, and what to set.
        """
        if not self.enable:
            return super().load(step)
        excluded = self.exclude_from_loading
        if step != -1:
            if not os.path.exists(self.folder):
                raise CheckpointError(
                    f"checkpoint.load_step is {step}, but job.dump_folder and checkpoint.folder name "
                    f"{self.folder!r}, and there is no such folder; load_step -1 starts a new run"
                )
            _check(
                "checkpoint.load_step",
                self._create_checkpoint_id(step),
                find_fault(self._create_checkpoint_id(step), excluded, model_only=step == 0),
                "load_step -1 takes the last that holds more; a run of another job.dump_folder can "
                "start from it by checkpoint.initial_load_path",
            )
            return super().load(step)
        if not os.path.exists(self.folder):
            if (path := self.initial_load_path) and not self.initial_load_in_hf:
                _check(
                    "checkpoint.initial_load_path",
                    path,
                    find_fault(path, excluded, self.initial_load_model_only),
                    "set checkpoint.initial_load_model_only to true",
                )
            return super().load(step)
        step = self._find_load_step()
        if step != -1:
            return super().load(step)
        folder = self.folder
        try:
            # one that does not exist: only then TorchTitan looks at the initial_load fields
            self.folder = os.path.join(folder, "none")
            return self.load()
        finally:
            self.folder = folder

    def _find_load_step(self, folder: str = "") -> int:
        if folder:  # of a replica under torchft
            return super()._find_load_step(folder)
        # One rank looks, so that all load the same one.
        found = [find_step(self.folder, self.exclude_from_loading) if _rank() == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(found, src=0)
        step, faults = found[0]
        for passed, fault in faults.items():
            logger.warning(f"PASSED OVER the checkpoint {self._create_checkpoint_id(passed)}: {fault}")
        return step

    @torch.no_grad()
    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args, **kwargs) -> Any:
        # No rank writes a file before this one has joined the planning of the save.
        if _rank() == 0:
            _empty(checkpoint_id)
        # An export to another dtype has cast them too. Copies, because the counts change in the next
        # forward, while a save through pinned memory is waited for before the next optimizer step.
        whole = self.states[MODEL].state_dict()
        kept = {k: whole[k].clone() for k in state_dict if k.endswith(BALANCE_STATE) and k in whole}
        if self.async_mode == titan.AsyncMode.ASYNC_WITH_PINNED_MEM and torch.accelerator.is_available():
            # It reads on a stream of its own, which does not wait for this one.
            torch.accelerator.current_stream().synchronize()
        return super().dcp_save({**state_dict, **kept}, checkpoint_id, *args, **kwargs)

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        loader = state_dict.get(DATALOADER)
        if isinstance(loader, TextDataloader):
            saved = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
            ranks = sum(key.startswith(RANK_PREFIX) for key in saved)
            if ranks not in (0, loader.dp_world_size):
                state_dict[DATALOADER] = _OtherRanks(loader, ranks)
                super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
                # counted per rank
                trainer = self.states[TRAIN_STATE]
                trainer.ntokens_seen = trainer.ntokens_seen * ranks // loader.dp_world_size
                return
        super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)

    def _purge_stale_checkpoints(self) -> None:
        if not self.keep_latest_k or _rank() != 0:
            return
        found = 0
        for step in sorted(saved_steps(self.folder), reverse=True):
            path = self._create_checkpoint_id(step)
            if found >= self.keep_latest_k:
                self.purge_queue.put(path)
            elif find_fault(path, [], model_only=step == 0) is None:
                found += 1


class _OtherRanks(Stateful):
    """Stands for a loader while the positions of all ranks of a checkpoint are loaded."""

    def __init__(self, loader: TextDataloader, ranks: int):
        self.loader = loader
        self.keys = [f"dp_rank_{rank}" for rank in range(ranks)]

    def state_dict(self) -> dict[str, Any]:
        return dict.fromkeys(self.keys, b"")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loader.load_ranks([state_dict[key] for key in self.keys])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _check(field: str, path: str, fault: str | None, advice: str) -> None:
    """Raise CheckpointError for a fault of a checkpoint; the advice is for one of weights only."""
    if fault is not None:
        raise CheckpointError(
            f"{field}: the checkpoint {path!r} cannot be loaded: {fault}"
            + (f"; {advice}" if fault == ONLY_WEIGHTS else "")
        )


def _empty(folder: str) -> None:
    """Remove what an earlier save left in a folder, first that which calls it complete."""
    if not os.path.isdir(folder):
        return
    for name in sorted(os.listdir(folder), key=lambda name: name != ".metadata"):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def checkpoint_to_load(job_config: JobConfig) -> str | None:
    """The torch.distributed.checkpoint folder that `CheckpointManager` will load the model from,
    if any. None also for a checkpoint in Hugging Face's format."""
    config = job_config.checkpoint
    if not config.enable:
        return None
    folder = os.path.join(job_config.job.dump_folder, config.folder)
    step = config.load_step
    if os.path.exists(folder):
        if step == -1:
            step, _ = find_step(folder, config.exclude_from_loading)
        if step != -1:
            skipped = step > 0 and MODEL in config.exclude_from_loading
            return None if skipped else step_folder(folder, step)
    return config.initial_load_path if not config.initial_load_in_hf else None


def allow_missing_balance_state(model: nn.Module, job_config: JobConfig) -> None:
    """Make a checkpoint loadable that lacks the bias or counts of some MoE layers.

    TorchTitan's loader refuses a checkpoint that lacks any key of the model's state dict. What
    this checkpoint lacks is left out of the state dict until it has been loaded; the layer then
    starts these buffers at zero, with a warning for the bias.

    Args:
        model: has a ModuleDict `layers` of blocks, not yet wrapped.

    Raises:
        CheckpointError: the experts' weights are those of another `momoe.backend`.
    """
    path = checkpoint_to_load(job_config)
    if path is None or not os.path.isfile(os.path.join(path, ".metadata")):
        return
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    for layer_id, block in model.layers.items():
        moe = getattr(block, "moe", None)
        if not isinstance(moe, BalancedMoE):
            continue
        prefix = f"layers.{layer_id}.moe."
        is_stock, was_stock = isinstance(moe, StockMoE), f"{prefix}experts.w3" in saved
        if is_stock != was_stock and f"{prefix}experts.w1" in saved:
            raise CheckpointError(
                f"momoe.backend must {'' if was_stock else 'not '}be {STOCK_BACKEND!r} to load "
                f"the checkpoint {path!r}, which was written so: the experts' weights of "
                "TorchTitan's MoE and of ours have different shapes"
            )
        for name in BALANCE_STATE:
            if prefix + name not in saved:
                moe.omit_from_next_load(name)
