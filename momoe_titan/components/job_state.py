"""Collects a log step's values from all ranks, with one reduction and one copy to the host, which need not wait."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch

from momoe_titan.model.moe import BalancedMoE

T = TypeVar("T")


class RankState(NamedTuple, Generic[T]):
    """What a rank reports of itself: memory in GiB, and what it has counted since it started.

    Attributes:
        in_use: on a GPU what tensors took at the peak; on a CPU what is resident.
        peak: the most that was reserved (on a GPU) or resident (on a CPU).
        experts_saved: the part that our experts save for the backward, computed from shapes as if nothing was evicted.
        experts_saved_at_100: what that would be at save_percent 100.
        skipped_steps: optimizer steps not taken, the same on all ranks; a tensor on the device or a number.
        experts_evicted: the part of experts_saved that the last forward had no room to save.
        loss: of the log step, the same; below 0 on pipeline stages that do not know it.
    """

    in_use: T
    peak: T
    capacity: T
    alloc_retries: T
    ooms: T
    kernel_compiles: T
    experts_saved: T
    experts_saved_at_100: T
    skipped_steps: T
    experts_evicted: T
    loss: T


@dataclasses.dataclass(frozen=True)
class JobState:
    """Arrays on the host, the same on all ranks. L MoE layers of all pipeline stages, W ranks.

    Attributes:
        layer_ids: layers that have been counted; none before the first step.
        counts_LE: tokens per expert of the last step.
        bias_LE: the balancing bias.
        entropy_L: entropy of the router's scores, from 0 (decided) to 1 (undecided); NaN where it was not recorded.
        aux_loss_L, z_loss_L: the routers' losses, unweighted; NaN where they were not recorded.
        save_percent_L: NaN for layers whose experts are not ours.
        ranks: one array (W) per field.
    """

    layer_ids: list[int]
    counts_LE: np.ndarray
    bias_LE: np.ndarray
    entropy_L: np.ndarray
    aux_loss_L: np.ndarray
    z_loss_L: np.ndarray
    save_percent_L: np.ndarray
    ranks: RankState[np.ndarray]

    @property
    def ours(self) -> bool:
        """Whether there are MoE layers and all their experts are ours."""
        return bool(self.layer_ids) and not np.isnan(self.save_percent_L).any()

    @property
    def load_LE(self) -> np.ndarray:
        """Tokens of an expert relative to the mean of its layer; 0 in a layer without tokens."""
        mean_L1 = self.counts_LE.mean(axis=1, keepdims=True)
        return self.counts_LE / np.where(mean_L1 > 0, mean_L1, 1)

    @property
    def maxvio_L(self) -> np.ndarray:
        """(max count - mean count) / mean count (arXiv 2408.15664, equation 4), 0 without tokens."""
        return np.maximum(self.load_LE.max(axis=1) - 1, 0)


def to_device(numbers: Sequence[float], device: torch.device) -> torch.Tensor:
    """These numbers, float64, on the device; the host does not wait."""
    host = torch.tensor(numbers, dtype=torch.float64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def to_host(numbers: torch.Tensor) -> Callable[[], np.ndarray]:
    """Start to copy numbers from the device; what is returned gives them, after waiting for the copy alone."""
    if numbers.device.type != "cuda":
        copy = numbers.clone()
        return lambda: np.array(copy.tolist())
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> np.ndarray:
        copied.synchronize()
        return np.array(copy.tolist())

    return read


def gather(
    layers: Mapping[int, tuple[BalancedMoE, torch.Tensor]],
    layer_ids: Sequence[int],
    num_experts: int,
    here: RankState[float | torch.Tensor],
    device: torch.device,
) -> Callable[[], JobState]:
    """The state of the job, to be called for: the host waits for the device only then. A collective over all ranks of
    the job, where it has more than one.

    Args:
        layers: this rank's MoE layers by id, each with the tokens per expert (E) that all ranks of the layer counted
            in the last step.
        layer_ids: the MoE layers of all pipeline stages.
        here: the state of this rank.
        device: where the reduction runs.
    """
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    table_LC = _layer_table(layers, layer_ids, num_experts, device)
    table_WC = torch.zeros(world, len(here), dtype=torch.float64, device=device)
    table_WC[rank] = to_device([0.0 if isinstance(x, torch.Tensor) else x for x in here], device)
    for column, value in enumerate(here):
        if isinstance(value, torch.Tensor):
            table_WC[rank, column] = value
    flat = torch.cat([table_LC.flatten(), table_WC.flatten()])
    if world > 1:
        torch.distributed.all_reduce(flat)
    read = to_host(flat)

    def state() -> JobState:
        flat = read()
        rows_LC = flat[: table_LC.numel()].reshape(table_LC.shape)
        return _state(rows_LC, flat[table_LC.numel() :].reshape(table_WC.shape), layer_ids, num_experts)

    return state


def _state(rows_LC: np.ndarray, rows_WC: np.ndarray, layer_ids: Sequence[int], num_experts: int) -> JobState:
    """From the sums over all ranks."""
    known_L = rows_LC[:, 0] > 0
    rows_LC = rows_LC[known_L]
    sharers_L1, tokens_L1 = rows_LC[:, :1], rows_LC[:, 2:3]
    means_L3 = np.where(tokens_L1 > 0, rows_LC[:, [1, 3, 4]] / np.maximum(tokens_L1, 1), np.nan)
    return JobState(
        layer_ids=[layer_id for layer_id, known in zip(layer_ids, known_L, strict=True) if known],
        counts_LE=rows_LC[:, 6 + num_experts :] / sharers_L1,
        bias_LE=rows_LC[:, 6 : 6 + num_experts] / sharers_L1,
        entropy_L=means_L3[:, 0],
        aux_loss_L=means_L3[:, 1],
        z_loss_L=means_L3[:, 2],
        save_percent_L=rows_LC[:, 5] / sharers_L1[:, 0],
        ranks=RankState(*rows_WC.T),
    )


def sum_counts(
    counts: Mapping[int, torch.Tensor], layer_ids: Sequence[int], num_experts: int, device: torch.device
) -> np.ndarray:
    """Counts per layer and expert of all pipeline stages; a collective over all ranks, where there are several.

    Args:
        counts: this rank's, by layer; equal on ranks that share a layer.
        layer_ids: the MoE layers of all pipeline stages.

    Returns:
        (L, E), without the layers that nobody has.
    """
    table_LC = torch.zeros(len(layer_ids), 1 + num_experts, dtype=torch.float64, device=device)
    for row, layer_id in enumerate(layer_ids):
        if layer_id in counts:
            table_LC[row, 0] = 1
            table_LC[row, 1:] = counts[layer_id]
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(table_LC)
    rows_LC = np.array(table_LC.tolist()).reshape(table_LC.shape)
    rows_LC = rows_LC[rows_LC[:, 0] > 0]
    return rows_LC[:, 1:] / rows_LC[:, :1]


def _layer_table(
    layers: Mapping[int, tuple[BalancedMoE, torch.Tensor]],
    layer_ids: Sequence[int],
    num_experts: int,
    device: torch.device,
) -> torch.Tensor:
    """This rank's part of a table with one row per layer, zero for layers that it does not have.

    The columns: ranks that have the layer, sums of their entropies, tokens and losses, save_percent, biases, counts.
    Ranks that share a layer agree on the last three, so that the sums over ranks are divided by the number of ranks.
    float64 is exact for sums of counts up to 2^53.
    """
    table_LC = torch.zeros(len(layer_ids), 6 + 2 * num_experts, dtype=torch.float64, device=device)
    own = [row for row, layer_id in enumerate(layer_ids) if layer_id in layers]
    if own:
        moes, counts = zip(*(layers[layer_ids[row]] for row in own), strict=True)
        percents = [getattr(moe.experts, "save_percent", math.nan) for moe in moes]
        parts = [
            torch.ones(len(own), 1, device=device),
            torch.stack([moe.router.entropy_and_tokens for moe in moes]),
            torch.stack([moe.router.loss_sums for moe in moes]),
            to_device(percents, device)[:, None],
            torch.stack([moe.expert_bias for moe in moes]),
            torch.stack(counts),
        ]
        for row, values in zip(own, torch.cat([p.double() for p in parts], dim=1), strict=True):
            table_LC[row] = values  # a list as the index would have the host wait
    return table_LC
