"""What every rank knows of the whole job after a log step, for one reduction and one copy."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from momoe_titan.model.moe import BalancedMoE


class RankState(NamedTuple):
    """What a rank tells of itself: memory in GiB, and what it has counted since it started.

    Attributes:
        held: memory in use (allocated by tensors at the peak, on a GPU; resident on a CPU).
        peak: the most that was reserved (on a GPU) or resident (on a CPU).
        experts_kept: of it, what our experts keep for the backward; and what they would keep at
            save_percent 100.
        skipped_steps: optimizer steps not taken, alike on all ranks; a tensor on the device or a
            number.
        experts_shed: z that was not kept of the last forward, for want of room; experts_kept is computed as if
            it were.
    """

    held: float
    peak: float
    capacity: float
    alloc_retries: float
    ooms: float
    kernel_compiles: float
    experts_kept: float
    experts_kept_at_100: float
    skipped_steps: float | torch.Tensor = 0
    experts_shed: float = 0


@dataclasses.dataclass(frozen=True)
class JobState:
    """Arrays on the host, alike on all ranks. L MoE layers of all pipeline stages, W ranks.

    Attributes:
        layer_ids: of layers that have been counted, none before the first step.
        counts_LE: tokens per expert of the last step.
        bias_LE: the balancing bias.
        entropy_L: of the router's scores, from 0 (decided) to 1 (undecided); NaN where it was not
            recorded.
        save_percent_L: NaN for layers whose experts are not ours.
        ranks: one array (W) per field.
    """

    layer_ids: list[int]
    counts_LE: np.ndarray
    bias_LE: np.ndarray
    entropy_L: np.ndarray
    save_percent_L: np.ndarray
    ranks: RankState

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


def gather(
    layers: Mapping[int, tuple[BalancedMoE, torch.Tensor]],
    layer_ids: Sequence[int],
    num_experts: int,
    here: RankState,
    device: torch.device,
) -> JobState:
    """A collective over all ranks of the job, where it has more than one.

    Args:
        layers: by id, this rank's MoE layers with their tokens per expert (E) of the last step,
            over all ranks that share the layer.
        layer_ids: of all pipeline stages.
        device: of the reduction.
    """
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    # Per layer: ranks that have it, sums of their entropies and tokens, save_percent, biases, counts.
    # Ranks that share a layer agree on the last three, whose sums are divided by the ranks. float64
    # is exact for sums of counts up to 2^53.
    width = 4 + 2 * num_experts
    table_LC = torch.zeros(len(layer_ids), width, dtype=torch.float64, device=device)
    own = [row for row, layer_id in enumerate(layer_ids) if layer_id in layers]
    if own:
        moes, counts = zip(*(layers[layer_ids[row]] for row in own))
        percents = [getattr(moe.experts, "save_percent", math.nan) for moe in moes]
        parts = [
            torch.ones(len(own), 1, device=device),
            torch.stack([moe.router.entropy_and_tokens for moe in moes]),
            torch.tensor(percents, device=device)[:, None],
            torch.stack([moe.expert_bias for moe in moes]),
            torch.stack(counts),
        ]
        table_LC[torch.tensor(own, device=device)] = torch.cat([p.double() for p in parts], dim=1)
    table_WC = torch.zeros(world, len(here), dtype=torch.float64, device=device)
    table_WC[rank] = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in here])
    flat = torch.cat([table_LC.flatten(), table_WC.flatten()])
    if world > 1:
        torch.distributed.all_reduce(flat)
    flat = np.array(flat.tolist())
    rows_LC = flat[: table_LC.numel()].reshape(len(layer_ids), width)
    known_L = rows_LC[:, 0] > 0
    rows_LC = rows_LC[known_L]
    sharers_L1, tokens_L = rows_LC[:, :1], rows_LC[:, 2]
    return JobState(
        layer_ids=[layer_id for layer_id, known in zip(layer_ids, known_L) if known],
        counts_LE=rows_LC[:, 4 + num_experts :] / sharers_L1,
        bias_LE=rows_LC[:, 4 : 4 + num_experts] / sharers_L1,
        entropy_L=np.where(tokens_L > 0, rows_LC[:, 1] / np.maximum(tokens_L, 1), np.nan),
        save_percent_L=rows_LC[:, 3] / sharers_L1[:, 0],
        ranks=RankState(*flat[table_LC.numel() :].reshape(world, len(here)).T),
    )
