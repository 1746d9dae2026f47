"""Saves and finds checkpoints: which one a job resumes from, and how an incomplete one is recognised."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
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
from torchtitan.tools.utils import GarbageCollection

from momoe_titan.components.checksums import find_changed_bytes, metadata_has_changed, write_metadata_sum
from momoe_titan.components.resumed_settings import apply_job_settings, log_differences, save_job
from momoe_titan.config.section import STOCK_BACKEND
from momoe_titan.data.loader import TextDataloader
from momoe_titan.data.streamed import StreamedDataloader
from momoe_titan.model.moe import BalancedMoE
from momoe_titan.model.stock_moe import StockMoE

BALANCE_STATE = ("expert_bias", "tokens_per_expert")
RANK_PREFIX = f"{DATALOADER}.dp_rank_"  # of the position of each data-parallel rank
BESIDE_WEIGHTS = {OPTIMIZER, LR_SCHEDULER, DATALOADER, TRAIN_STATE}
# Whatever torch raises of a full disk; what another rank raises comes as a CheckpointException, which is no Exception.
FAULTS_OF_A_SAVE = (Exception, CheckpointException)
ONLY_WEIGHTS = "it holds only weights (checkpoint.last_save_model_only)"


class CheckpointError(ValueError):
    """A checkpoint that the configuration names cannot be loaded.

    The message names the field of the configuration, the folder and the reason.
    """


class SaveError(RuntimeError):
    """A checkpoint could not be written. The message names the folder, the reason, and what is left on the disk."""


def read_metadata(path: str) -> Metadata:
    """The metadata of a torch.distributed.checkpoint folder that holds all that was to be saved.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or no such checkpoint.
    """
    if not os.path.isdir(path):
        raise CheckpointError("there is no such folder")
    try:
        if metadata_has_changed(path):  # before anything in it is unpickled
            raise CheckpointError("its .metadata has changed since it was written (metadata.sha256)")
        metadata = FileSystemReader(path).read_metadata()
    except CheckpointError:
        raise
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
    """Why this folder cannot be loaded; None where it can.

    Args:
        exclude_from_loading: the job's field; without effect where `model_only`.
        model_only: only weights are to be loaded, as from a seed checkpoint (step 0).
    """
    try:
        saved = read_metadata(path).state_dict_metadata
    except CheckpointError as e:
        return str(e)
    needs_state = not model_only and not BESIDE_WEIGHTS.issubset(exclude_from_loading)
    if needs_state and f"{TRAIN_STATE}.step" not in saved:
        return ONLY_WEIGHTS
    return None


def find_step(
    folder: str, exclude_from_loading: list[str], known_faults: Mapping[int, str] | None = None
) -> tuple[int, dict[int, str]]:
    """The last step that training can resume from, or -1; and for each later step why it cannot be loaded.

    Args:
        known_faults: of steps that are not to be taken.
    """
    faults: dict[int, str] = dict(known_faults or {})
    for step in sorted(saved_steps(folder), reverse=True):
        if step in faults:
            continue
        fault = find_fault(step_folder(folder, step), exclude_from_loading, model_only=step == 0)
        if fault is None:
            return step, faults
        faults[step] = fault
    return -1, faults


def step_folder(folder: str, step: int) -> str:
    """The folder of one step below checkpoint.folder."""
    return os.path.join(folder, f"step-{step}")


def saved_steps(folder: str) -> list[int]:
    """Steps that have a folder, complete or not."""
    if not os.path.isdir(folder):
        return []
    steps = [name.removeprefix("step-") for name in os.listdir(folder) if name.startswith("step-")]
    return [int(step) for step in steps if step.isdecimal()]


class CheckpointManager(titan.CheckpointManager):
    """TorchTitan's checkpoint manager, for runs that can be killed at any moment and resume on other numbers of ranks.

    - Resumes from the last whole checkpoint, and warns of later ones that it passed over. All ranks together read it
      once before, and take the one before it where a byte has changed (`checksums`). Where none is whole, the run
      starts as a new run does, from the initial_load fields; TorchTitan would ignore these.
    - Makes a folder incomplete before it writes the folder again.
    - Keeps the latest k whole checkpoints, besides the one that is being written.
    - Shares out the position in the data anew where the number of data-parallel ranks has changed.
    - Keeps the job's configuration in the checkpoint; a resumed job's own settings hold, see `resumed_settings`.
    - Keeps the dtype of the balancing bias and counts in an export to another dtype.
    """

    before_save: Callable[[], None] = staticmethod(lambda: None)  # called when a save is due
    written = ""  # the folder of the save under way, or empty
    saved_step = -1  # of the last save

    @torch.no_grad()
    def load(self, step: int = -1) -> bool:
        """As TorchTitan's.

        Raises:
            CheckpointError: names the field by which this checkpoint was asked for, and what to set.
        """
        if not self.enable:
            return super().load(step)
        if step != -1:
            self._check_step(step)
        elif os.path.exists(self.folder):
            step = self._find_load_step()
        if step == -1:
            return self._load_new_run()
        loaded = super().load(step)
        if step > 0:  # a seed holds weights alone
            self._settle(self._create_checkpoint_id(step))
        return loaded

    def _settle(self, path: str) -> None:
        """After all of a checkpoint was loaded: let the job's own settings hold, and say which are new."""
        apply_job_settings(self.states[OPTIMIZER], self.states[LR_SCHEDULER])
        job_config = getattr(self.states.get(TRAIN_STATE), "job_config", None)
        if job_config is not None and _rank() == 0:
            log_differences(path, job_config)

    def _save_job(self, path: str) -> None:
        """Keep the job's configuration beside its tensors."""
        job_config = getattr(self.states.get(TRAIN_STATE), "job_config", None)
        if job_config is None:
            return
        try:
            save_job(path, job_config)
        except OSError as e:  # raised here, it would leave the other ranks in the planning of the save
            logger.warning(f"the configuration could not be written to {path!r}: {e}")

    @torch.no_grad()
    def save(self, curr_step: int, last_step: bool = False) -> None:
        """As TorchTitan's.

        Raises:
            SaveError: this checkpoint, or the asynchronous one before it, could not be written.
        """
        begin = time.monotonic()
        self.written = ""
        try:
            super().save(curr_step, last_step)
        except FAULTS_OF_A_SAVE as e:
            raise SaveError(_what_failed(self.folder, e)) from e
        if self.written:
            verb = "Saved" if last_step or self.async_mode == titan.AsyncMode.DISABLED else "Saving"
            logger.info(f"{verb} the checkpoint {self.written} ({time.monotonic() - begin:.1f} s)")

    def save_now(self, step: int) -> None:
        """Save this step, due or not, unless that was done already; return when all is on the disk.

        Raises:
            SaveError: as `save`.
        """
        if not self.enable or self.load_only:
            return
        interval, async_mode = self.interval, self.async_mode
        try:
            if self.save_future is not None:
                self.save_future.result()
                self.save_future = None
        except FAULTS_OF_A_SAVE as e:
            raise SaveError(_what_failed(self.folder, e)) from e
        if os.path.isfile(os.path.join(self._create_checkpoint_id(step), ".metadata")) and self.saved_step == step:
            return
        self.interval, self.async_mode = 1, titan.AsyncMode.DISABLED
        self.save(step)
        self.interval, self.async_mode = interval, async_mode

    def _check_step(self, step: int) -> None:
        if not os.path.exists(self.folder):
            raise CheckpointError(
                f"checkpoint.load_step is {step}, but job.dump_folder and checkpoint.folder name "
                f"{self.folder!r}, and there is no such folder; load_step -1 starts a new run"
            )
        path = self._create_checkpoint_id(step)
        fault = find_fault(path, self.exclude_from_loading, model_only=step == 0)
        _check(
            "checkpoint.load_step",
            path,
            _changed_bytes(path) if fault is None else fault,
            "load_step -1 takes the last that holds more; a run of another job.dump_folder can "
            "start from it by checkpoint.initial_load_path",
        )

    def _load_new_run(self) -> bool:
        """Load what the initial_load fields name. Returns whether they name anything.

        TorchTitan's `load` does this only where there is no checkpoint folder, not where no checkpoint in it is whole.
        """
        if self.enable_ft_dataloader_checkpoints:
            self._ft_load()
        from_hf, model_only = self.initial_load_in_hf, self.initial_load_model_only
        path = self.initial_load_path or ""
        if from_hf:
            path = self._hf_folder(path)
        elif path:
            fault = find_fault(path, self.exclude_from_loading, model_only)
            if fault is None:
                fault = _changed_bytes(path, self._states_to_load(model_only) if model_only else None)
            _check("checkpoint.initial_load_path", path, fault, "set checkpoint.initial_load_model_only to true")
        else:
            return False
        logger.info(f"Loading the checkpoint from {path}.")
        begin = time.monotonic()
        self.dcp_load(self._states_to_load(model_only), path, from_hf, self.initial_load_in_hf_quantized)
        GarbageCollection.collect("GC collection for checkpoint loading.")
        logger.info(f"Finished loading the checkpoint in {time.monotonic() - begin:.2f} seconds.")
        if not model_only:
            self._settle(path)
        return True

    def _hf_folder(self, path: str) -> str:
        """The folder of Hugging Face weights that initial_load_in_hf means: this one, or else the tokenizer's."""
        if not self.initial_load_model_only:
            raise CheckpointError(
                "checkpoint.initial_load_model_only is false, must be true with checkpoint.initial_load_in_hf"
            )
        field = "checkpoint.initial_load_path" if path else "model.hf_assets_path"
        if not path and self.sd_adapter is not None:
            path = self.sd_adapter.hf_assets_path or ""
        if not os.path.isdir(path):
            raise CheckpointError(f"{field} {path!r} is not a folder, and checkpoint.initial_load_in_hf is true")
        return path

    def _find_load_step(self, folder: str = "") -> int:
        if folder:  # that of a replica under torchft
            return super()._find_load_step(folder)
        faults: dict[int, str] = {}
        while True:
            # One rank looks, so that all ranks load the same checkpoint.
            found = [(-1, faults)]
            if _rank() == 0:
                found = [find_step(self.folder, self.exclude_from_loading, faults)]
            if dist.is_initialized():
                dist.broadcast_object_list(found, src=0)
            step, faults = found[0]
            changed = _changed_bytes(self._create_checkpoint_id(step)) if step >= 0 else None
            if changed is None:
                break
            faults[step] = changed
        for passed, fault in sorted(faults.items(), reverse=True):
            logger.warning(f"PASSED OVER the checkpoint {self._create_checkpoint_id(passed)}: {fault}")
        return step

    @torch.no_grad()
    def dcp_save(self, state_dict: dict[str, Any], checkpoint_id: str, *args, **kwargs) -> Any:
        self.before_save()
        self.written = checkpoint_id
        self.saved_step = self.states[TRAIN_STATE].step if TRAIN_STATE in self.states else -1
        # No rank writes a file before this one has joined the planning of the save.
        if _rank() == 0:
            _empty(checkpoint_id)
            if not kwargs.get("to_hf"):
                self._save_job(checkpoint_id)
        # An export to another dtype has cast the balancing state too: take it from the model again. As copies, because
        # the next forward changes the counts, while a save through pinned memory ends before the next optimizer step.
        whole = self.states[MODEL].state_dict()
        kept = {k: whole[k].clone() for k in state_dict if k.endswith(BALANCE_STATE) and k in whole}
        if self.async_mode == titan.AsyncMode.ASYNC_WITH_PINNED_MEM and torch.accelerator.is_available():
            # The save reads on a stream of its own, which does not wait for this one.
            torch.accelerator.current_stream().synchronize()
        under_way = super().dcp_save({**state_dict, **kept}, checkpoint_id, *args, **kwargs)
        if _rank() == 0 and not kwargs.get("to_hf"):
            _keep_sum(checkpoint_id, under_way)
        return under_way

    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        loader = state_dict.get(DATALOADER)
        if isinstance(loader, (TextDataloader, StreamedDataloader)):
            saved = FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
            ranks = sum(key.startswith(RANK_PREFIX) for key in saved)
            if ranks not in (0, loader.dp_world_size):
                state_dict[DATALOADER] = _OtherRanks(loader, ranks)
                super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
                # each rank counts its own tokens
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
    """Takes the place of the loader in a state dict, to load the positions of all ranks of a checkpoint."""

    def __init__(self, loader: TextDataloader | StreamedDataloader, ranks: int):
        self.loader = loader
        self.keys = [f"dp_rank_{rank}" for rank in range(ranks)]

    def state_dict(self) -> dict[str, Any]:
        return dict.fromkeys(self.keys, b"")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loader.load_ranks([state_dict[key] for key in self.keys])


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _changed_bytes(path: str, names: Collection[str] | None = None) -> str | None:
    """Why this checkpoint is not as it was written, or None. Each rank reads a part of it, and all get one answer.

    Args:
        names: look only at these keys of the state dict; all if None.
    """
    begin = time.monotonic()
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    try:
        fault = find_changed_bytes(path, FileSystemReader(path).read_metadata(), names, _rank(), num_ranks)
    except Exception as e:  # raised here, it would leave the other ranks waiting
        fault = repr(e)
    faults = [fault] * num_ranks
    if num_ranks > 1:
        dist.all_gather_object(faults, fault)
    logger.info(f"Checked the bytes of the checkpoint {path} ({time.monotonic() - begin:.1f} s)")
    return next((fault for fault in faults if fault is not None), None)


def _keep_sum(path: str, under_way: Any) -> None:
    """Keep the sum of a checkpoint's .metadata once that is written: now, or at the end of an asynchronous save.

    Args:
        under_way: what dcp.save or dcp.async_save returns: its futures, if it has any.
    """
    future = getattr(under_way, "upload_completion", under_way)

    def keep(done: Any = None) -> None:
        # The save itself has failed, or a purge has removed the folder: others say so, and without a sum it loads too.
        with contextlib.suppress(OSError):
            write_metadata_sum(path)

    if isinstance(future, Future):
        future.add_done_callback(keep)
    else:
        keep()


def _check(field: str, path: str, fault: str | None, advice: str) -> None:
    """Raise CheckpointError for a fault of a checkpoint. The advice is for a checkpoint that holds only weights."""
    if fault is not None:
        raise CheckpointError(
            f"{field}: the checkpoint {path!r} cannot be loaded: {fault}"
            + (f"; {advice}" if fault == ONLY_WEIGHTS else "")
        )


def _what_failed(folder: str, error: BaseException) -> str:
    """One sentence on a checkpoint that could not be written, and one on what is left."""
    reasons: list[str] = []
    seen: list[BaseException | None] = [error]
    while seen:
        cause = seen.pop()
        if cause is None or len(reasons) > 20:
            continue
        # torch collects what the ranks have raised, each with its traceback, in the failures of one exception
        failures: dict[int, Any] = getattr(cause, "failures", {})
        seen += [cause.__cause__, cause.__context__, *(failure[0] for failure in failures.values())]
        if not failures:
            reasons.append(f"{type(cause).__name__}: {cause}".splitlines()[0])
    system = [reason for reason in reasons if reason.startswith(("OSError", "PermissionError", "FileNotFoundError"))]
    step, _ = find_step(folder, [])
    left = f"{step_folder(folder, step)} is whole" if step >= 0 else "there is no whole checkpoint"
    try:
        usage = shutil.disk_usage(folder)
        space = f"{usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB are free there"
    except OSError as e:
        space = str(e)
    return f"a checkpoint could not be written to {folder!r}: {(system or reasons)[0]} ({space}). On the disk: {left}"


def _empty(folder: str) -> None:
    """Remove what an earlier save left in a folder: first .metadata, which marks the checkpoint as complete."""
    if not os.path.isdir(folder):
        return
    for name in sorted(os.listdir(folder), key=lambda name: name != ".metadata"):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def checkpoint_to_load(job_config: JobConfig) -> str | None:
    """The torch.distributed.checkpoint folder that `CheckpointManager` will load the model from.

    None where it will load nothing, or a checkpoint in Hugging Face's format.
    """
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


def resumed_checkpoint(job_config: JobConfig) -> str | None:
    """The checkpoint that a job will go on from with all of its states, not with the weights alone."""
    config = job_config.checkpoint
    path = checkpoint_to_load(job_config)
    if path is None or config.create_seed_checkpoint or os.path.basename(path) == "step-0":
        return None
    is_initial = config.initial_load_path is not None and path == config.initial_load_path
    return None if is_initial and config.initial_load_model_only else path


def allow_missing_balance_state(model: nn.Module, job_config: JobConfig) -> None:
    """Let the job load a checkpoint that lacks the bias or counts of some MoE layers.

    TorchTitan refuses a checkpoint that lacks any key of the model's state dict. The state dict therefore leaves out
    what this checkpoint lacks until it has been loaded. The layer then starts these buffers at zero, with a warning for
    the bias.

    Args:
        model: has a ModuleDict `layers` of blocks, not yet wrapped by any parallelism.

    Raises:
        CheckpointError: the experts' weights are those of another `momoe.backend`.
    """
    path = checkpoint_to_load(job_config)
    if path is None or not os.path.isfile(os.path.join(path, ".metadata")):
        return
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    for layer_id, block in cast(nn.ModuleDict, model.layers).items():
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
