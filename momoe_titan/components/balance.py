"""Measures how evenly the experts are used: over a validation set, over ranks of experts, and over many steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from momoe_titan.components.job_state import sum_counts
from momoe_titan.components.load_balancer import ExpertLoadBalancer
from momoe_titan.model.moe import BalancedMoE
from momoe_titan.model.stock_moe import StockMoE

COLLAPSED = 0.75  # of the highest MaxVio that a layer can have, E/K - 1
COLLAPSED_STEPS = 50


class ValidationCounts:
    """Tokens per expert of one validation, beside the counts of training, which it does not touch."""

    def __init__(self, layers: Mapping[int, BalancedMoE]):
        self.layers = layers
        self.counted = [layer.router if isinstance(layer, StockMoE) else layer for layer in layers.values()]
        self.counts = {i: torch.zeros_like(layer.tokens_per_expert) for i, layer in layers.items()}
        for module, counts_E in zip(self.counted, self.counts.values(), strict=True):
            # A plain attribute: `record_counts` adds to it in evaluation mode.
            vars(module)["evaluated_E"] = counts_E

    def sum(
        self, balancer: ExpertLoadBalancer | None, layer_ids: Sequence[int], num_experts: int, device: torch.device
    ) -> np.ndarray:
        """(L, E), over all ranks, of the layers that have counted; a collective over all of them."""
        counts = self.counts
        if counts and balancer is not None:
            counts_LE = torch.stack([*counts.values()])
            for group in balancer.groups:
                torch.distributed.all_reduce(counts_LE, group=group)
            counts = dict(zip(counts, counts_LE, strict=True))
        return sum_counts(counts, layer_ids, num_experts, device)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Forgets at its end what was counted in it."""
        before = {i: counts_E.clone() for i, counts_E in self.counts.items()}
        yield
        for i, counts_E in self.counts.items():
            counts_E.copy_(before[i])

    def end(self) -> None:
        """Count no more."""
        for module in self.counted:
            vars(module)["evaluated_E"] = None


def maxvio(counts_LE: np.ndarray) -> np.ndarray:
    """(L): (max count - mean count) / mean count (arXiv 2408.15664, equation 4), 0 without tokens."""
    mean_L = counts_LE.mean(axis=1)
    return np.maximum(counts_LE.max(axis=1) / np.where(mean_L > 0, mean_L, 1) - 1, 0)


def worst_rank_load(counts_LE: np.ndarray, ranks: int) -> float:
    """Tokens that the worst expert-parallel rank works on, relative to an even share; of the worst layer.

    Ranks hold consecutive experts, split as `torch.chunk` splits.
    """
    size = math.ceil(counts_LE.shape[1] / ranks)
    of_ranks = np.add.reduceat(counts_LE, range(0, counts_LE.shape[1], size), axis=1)
    total_L = counts_LE.sum(axis=1)
    return float((of_ranks.max(axis=1) * ranks / np.where(total_L > 0, total_L, 1)).max())


class CollapseWatch:
    """Tells of layers that have given their tokens to the same few experts for many steps.

    Args:
        num_experts, top_k: E and K.
        advice: what a user can do; the end of the line.
    """

    def __init__(self, num_experts: int, top_k: int, advice: str):
        self.highest = num_experts / top_k - 1
        self.advice = advice
        self.since: dict[int, int] = {}
        self.told: set[int] = set()

    def look(self, step: int, layer_ids: Sequence[int], maxvio_L: np.ndarray) -> str | None:
        """The line to say at this log step, or None. Of one layer it speaks once, until that has recovered."""
        new = []
        for layer, value in zip(layer_ids, maxvio_L, strict=True):
            if self.highest <= 0 or value < COLLAPSED * self.highest:
                self.since.pop(layer, None)
                self.told.discard(layer)
                continue
            begin = self.since.setdefault(layer, step)
            if step - begin >= COLLAPSED_STEPS and layer not in self.told:
                new.append((layer, value))
        if not new:
            return None
        self.told |= {layer for layer, _ in new}
        layers = ", ".join(f"{layer} ({value:.2f})" for layer, value in new)
        return (
            f"COLLAPSED for {COLLAPSED_STEPS} steps: MoE layers, with their MaxVio: {layers}; the highest possible is "
            f"{self.highest:.2f}, where every token goes to the same experts. {self.advice}"
        )
