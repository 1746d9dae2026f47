"""Chooses the largest save_percent that fits into `momoe.memory_budget`, for `momoe.save_percent = "auto"`.

At the start the plan of the job (`momoe_titan.plan`) says how much of z fits. After `MEASURED_STEPS`
optimizer steps the memory that they took corrects the choice, once. Every rank makes the same choice: from
one plan, and from the least room that any rank has. The choice is stored in the dump folder, so that a
resumed run starts with it.

The result of training does not depend on any of this: save_percent changes memory and time only.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torchtitan.tools.logging import logger

from momoe_titan.memory.activation_eviction import ActivationBudget
from momoe_titan.memory.plan import GIB, MemoryPlan, budget_bytes, context_bytes

FILE_NAME = "save_percent.json"
MEASURED_STEPS = 3  # the optimizer state exists after the first step
# The error that the plan may have, until the memory is measured.
PLAN_ERROR = 0.05
# With expert parallelism, how much more than its even share each layer of a rank may receive before z is evicted.
IMBALANCE = 0.05


class DeviceMemory(Protocol):
    """The memory of this rank's GPU, in bytes."""

    def total(self) -> int: ...

    def outside(self) -> int:
        """Memory in use outside of PyTorch's allocator: contexts, communication, other processes."""
        ...

    def peak_reserved(self) -> int:
        """The most that PyTorch's allocator has held."""
        ...

    def give_back(self) -> None:
        """Return unused memory of PyTorch's allocator to the GPU."""


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
    plan has growth, the layers get an `ActivationBudget` too.

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
        activation_budget: what evicts z where a routing leaves no room for it, or None.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
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
        self.activation_budget = ActivationBudget(plan, self.layers) if plan.layer_growth else None
        self._imbalanced = plan.with_rows(IMBALANCE) if plan.layer_growth else plan
        needs = ["save_percent", "corrected"] + ["room"] * (self.activation_budget is not None)
        stored = _on_rank_0(lambda: _read(file, job, needs))
        if stored is not None:
            self.choice, self.room = stored["save_percent"], stored.get("room", 0)
            if stored["corrected"]:
                self.steps_left = 0
            logger.info(f"save_percent = auto: {describe(self.choice)}, as {file} has it")
        else:
            # contexts and communication grow in the first steps
            outside = max(memory.outside(), context_bytes(_world_size())) + plan.staging
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
        if self.activation_budget is not None and self.activation_budget.least_peak:  # for the rows that came
            planned = self.activation_budget.least_peak
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
            layer.save_percent = percent  # pyright: ignore[reportArgumentType] - no part of the module
            layer.activation_budget = self.activation_budget  # pyright: ignore[reportArgumentType] - the same
        if self.activation_budget is not None:
            self.activation_budget.room, self.activation_budget.quiet = self.room, False

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
