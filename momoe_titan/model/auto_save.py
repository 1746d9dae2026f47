"""`momoe.save_percent = "auto"`: as much as fits into `momoe.memory_budget`.

At the start the plan of the job (`momoe_titan.plan`) says which share of z fits. After
`MEASURED_STEPS` optimizer steps the memory that they took corrects the choice, once. Every rank
makes the same choice: from one plan, and from the least room that any rank has. The choice is kept
in the dump folder, so that a resumed run starts with it.

The result of training does not depend on any of this: save_percent changes memory and time only.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.plan.memory import budget_bytes, context_bytes, GIB, MemoryPlan, PLAN_FAILED

from .args import AUTO
from .moe import MomoeExperts
from .shedding import Ledger

FILE_NAME = "save_percent.json"
MEASURED_STEPS = 3  # the optimizer state exists from the first on
# Until it is measured, what the plan may be wrong by.
PLAN_ERROR = 0.05
# What every layer of a rank may receive beyond its fair share, with expert parallelism, before z is shed.
IMBALANCE = 0.05
# What the choice depends on; a stored one is taken where all of it is as it was.
_SECTIONS = ("model", "training", "parallelism", "activation_checkpoint", "compile", "optimizer")
_NOT_MEMORY = {"steps", "dataset", "dataset_path", "lr", "gc_freq", "max_norm", "dataloader", "hf_assets_path"}


class DeviceMemory(Protocol):
    """The memory of this rank's GPU, in bytes."""

    def total(self) -> int: ...

    def outside(self) -> int:
        """What PyTorch's allocator does not hold: contexts, communication, other processes."""

    def peak_reserved(self) -> int:
        """The most that PyTorch's allocator has held."""

    def give_back(self) -> None:
        """Give the GPU back what PyTorch's allocator holds and nobody uses."""


class CudaMemory:
    """`DeviceMemory` of the current CUDA device."""

    def total(self) -> int:
        return torch.cuda.mem_get_info()[1]

    def outside(self) -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved()

    def give_back(self) -> None:
        torch.cuda.empty_cache()


class AutoSavePercent:
    """Sets `save_percent` of a model's MoE layers, and corrects it after the first steps. Where the
    plan has growth, its layers get a `Ledger` too.

    Args:
        layers: the MoE layers that have a dial, in the plan's order.
        plan: of the job.
        budget: momoe.memory_budget.
        memory: of this rank's GPU.
        file: where the choice is kept.
        job: what the choice depends on, as JSON.
        correct: whether to correct it.

    Attributes:
        choice: save_percent by layer.
        room: bytes that PyTorch may hold by the plan, the same on all ranks.
        ledger: or None.
    """

    def __init__(
        self,
        layers: Sequence[MomoeExperts],
        plan: MemoryPlan,
        budget: float,
        memory: DeviceMemory,
        file: Path,
        job: dict[str, Any],
        correct: bool = True,
    ):
        self.layers, self.plan, self.memory, self.file, self.job = list(layers), plan, memory, file, job
        self.budget = budget_bytes(budget, memory.total())
        self.steps_left = MEASURED_STEPS if correct else 0
        self.ledger = Ledger(plan, self.layers) if plan.layer_growth else None
        self._imbalanced = plan.with_rows(IMBALANCE) if plan.layer_growth else plan
        needs = ["save_percent", "corrected"] + ["room"] * (self.ledger is not None)
        stored = _on_rank_0(lambda: _read(file, job, needs))
        if stored is not None:
            self.choice, self.room = stored["save_percent"], stored.get("room", 0)
            if stored["corrected"]:
                self.steps_left = 0
            logger.info(f"save_percent = auto: {describe(self.choice)}, as {file} has it")
        else:
            # contexts and communication grow in the first steps
            outside = max(memory.outside(), context_bytes(_world_size()))
            room = _least(self.budget - outside)
            self.room = int(room / (1 + PLAN_ERROR))
            self.choice = self._imbalanced.fill(self.room)
            self._store(corrected=False)
            taken = plan.active(self.choice) + plan.slack
            logger.info(
                f"save_percent = auto: {describe(self.choice)} by the plan, with which PyTorch will "
                f"hold {taken / GIB:.2f} GiB of {room / GIB:.2f}"
            )
            if taken > room:
                logger.warning(
                    f"momoe.memory_budget leaves {room / GIB:.2f} GiB for PyTorch, but by the plan even "
                    f"save_percent 0 takes {taken / GIB:.2f} GiB"
                )
        self._apply()

    def __call__(self, *hook_args) -> None:
        """Optimizer step post-hook; its arguments are not read. Waits for the other ranks once."""
        if self.steps_left == 0:
            return
        self.steps_left -= 1
        if self.steps_left == 0:
            self._correct()

    def _correct(self) -> None:
        measured = self.memory.peak_reserved()
        # what was measured, in the plan's terms, is a plan that is wrong by so much
        planned = self.plan.active(self.choice) + self.plan.slack
        if self.ledger is not None and self.ledger.least_peak:  # for the rows that came
            planned = self.ledger.least_peak
        error = measured - planned
        self.room = _least(self.budget - self.memory.outside() - error)
        before, self.choice = self.choice, self._imbalanced.fill(self.room)
        self._store(corrected=True)
        self._apply()
        if self.choice != before:
            # z cut out of the cached blocks of other buffers would have those reserved once more
            self.memory.give_back()
        logger.info(
            f"save_percent = auto: {describe(self.choice)} from here on, was {describe(before)}; PyTorch held "
            f"{measured / GIB:.2f} GiB on this rank, {error / GIB:+.2f} against the plan"
        )

    def _apply(self) -> None:
        for layer, percent in zip(self.layers, self.choice, strict=True):
            layer.save_percent = percent
            layer.ledger = self.ledger
        if self.ledger is not None:
            self.ledger.room, self.ledger.quiet = self.room, False

    def _store(self, corrected: bool) -> None:
        if _rank() != 0:
            return
        content = {"save_percent": self.choice, "corrected": corrected, "room": self.room, "job": self.job}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.file.with_suffix(".tmp")
            scratch.write_text(json.dumps(content, indent=1))
            scratch.replace(self.file)
        except OSError as e:
            logger.warning(f"save_percent = auto: {self.file} cannot be written ({e}); a resumed run chooses anew")


def describe(choice: Sequence[float]) -> str:
    """The choice in words."""
    if len(set(choice)) <= 1:
        return f"{choice[0]:g}" if choice else "no MoE layer"
    return f"{sum(choice) / len(choice):.0f} on average, by layer {' '.join(f'{c:g}' for c in choice)}"


def set_up_auto_save_percent(model: nn.Module, job_config: JobConfig) -> None:
    """Choose the save_percent of this model's layers now; `model.auto_save_percent` is what
    corrects it later, for `build_momoe_optimizers`.

    Call it on every rank, before the model is compiled. Does nothing unless the job says "auto".
    Without a GPU, or where the plan cannot be made, all is 0.
    """
    layers = [module for module in model.modules() if isinstance(module, MomoeExperts)]
    momoe = getattr(job_config, "momoe", None)
    if momoe is None or momoe.save_percent != AUTO or not layers:
        return
    if not torch.cuda.is_available():
        logger.info("save_percent = auto: 0, since there is no GPU whose memory would be planned")
        return
    plan = _on_rank_0(lambda: plan_in_child(job_config))
    if plan is None:
        return
    memory = CudaMemory()
    compiled = job_config.compile.enable
    if compiled:
        logger.info("save_percent = auto: not corrected by measurement, which would compile the model again")
    model.auto_save_percent = AutoSavePercent(
        layers,
        MemoryPlan.from_dict(plan),
        momoe.memory_budget,
        memory,
        Path(job_config.job.dump_folder) / FILE_NAME,
        {**job_fields(job_config), "gpu_bytes": memory.total(), "world_size": _world_size()},
        correct=not compiled,
    )


def job_fields(job_config: JobConfig) -> dict[str, Any]:
    """What of a job decides over its memory, roughly: a stored choice is good for the same."""
    fields = {f"momoe.{name}": getattr(job_config.momoe, name) for name in ("memory_budget", "backend", "vocab_size")}
    for section in _SECTIONS:
        for name, value in dataclasses.asdict(getattr(job_config, section)).items():
            if name not in _NOT_MEMORY:
                fields[f"{section}.{name}"] = value
    return fields


def plan_in_child(job_config: JobConfig) -> dict | None:
    """The plan as `MemoryPlan.to_dict` has it, made in a process of its own that has no GPU; None,
    with a warning, where that fails.

    In this process TorchTitan knows the GPU, and the process group is in use.
    """
    values = dataclasses.asdict(job_config)
    values["job"]["custom_config_module"] = values["job"]["custom_config_module"] or "momoe_titan.job_config"
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    command = [sys.executable, "-m", "momoe_titan.plan", "--job_json", "--json"]
    command += ["--world_size", str(_world_size()), "--capability", f"{major}.{minor}"]
    logger.info("save_percent = auto: planning the memory of this job")
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.run(command, input=json.dumps(values), text=True, stdout=subprocess.PIPE, stderr=errors)
        if child.returncode == 0:
            return json.loads(child.stdout)["plan"]
        errors.seek(0)
        said = errors.read().strip()
    _, named, reason = said.rpartition(PLAN_FAILED)
    if not named:  # killed, or not even started
        reason = "".join(said.splitlines()[-1:]) or f"the plan's process ended with exit status {child.returncode}"
    logger.warning(f"save_percent = auto: 0, since the memory could not be planned: {' '.join(reason.split())}")
    return None


def _read(file: Path, job: dict[str, Any], needs: Sequence[str]) -> dict | None:
    """The stored choice, if it is for this job and has what it needs."""
    try:
        stored = json.loads(file.read_text())
        then, rest = stored["job"], {name: stored[name] for name in needs}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        logger.warning(f"save_percent = auto: {file} cannot be used ({e!r}); choosing anew")
        return None
    job = json.loads(json.dumps(job))
    if changed := sorted(name for name in job.keys() | then.keys() if job.get(name) != then.get(name)):
        logger.info(f"save_percent = auto: choosing anew, since the choice in {file} is for other {', '.join(changed)}")
        return None
    return rest


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _on_rank_0(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank."""
    value = [make() if _rank() == 0 else None]
    if _world_size() > 1:
        dist.broadcast_object_list(value)
    return value[0]


def _least(num_bytes: int) -> int:
    """The least of all ranks."""
    if _world_size() == 1:
        return num_bytes
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    least = torch.tensor(num_bytes, dtype=torch.int64, device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)
