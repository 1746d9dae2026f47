"""Frees saved pre-activations when a step's routing is more skewed than `save_percent = "auto"` has planned for.

Under expert parallelism the rows that a rank receives depend on the routing, and the plan assumes the rank's fair
share. z, the saved pre-activations, is a cache: the backward can recompute any of it, to the bit. The host learns
how many rows a layer will receive before any memory is taken for them. At that point the rank asks whether the step
will still fit. If not, it frees z of this forward's earlier layers, first layer first, and as a last resort saves
none of this layer's own. With all z evicted the memory is that of save_percent 0. Ranks decide on their own.
"""

import weakref

import numpy as np
import torch
from torch import nn
from torchtitan.tools.logging import logger

from momoe_titan.memory.plan import CUBLAS_BYTES, MemoryPlan


class ActivationBudget:
    """Tracks the memory of this rank's step, given the rows that its layers receive, and evicts z to stay within it.

    Covers one forward at a time, up to its backward.

    Args:
        plan: of the job, with growth.
        layers: the MoE layers, which have a `save_percent`, in the plan's order.

    Attributes:
        room: bytes that the plan's `active` and `slack` may take.
        evicted_bytes: z of the latest forward that was not saved, or freed again, because room was short.
        least_peak: a lower bound of `active` and `slack` in the forwards so far; 0 before the first.
        quiet: whether the next eviction is not logged.
    """

    # Letters: S moments of a step, L layers.
    #   rows_L2: (tokens, slots) that a layer receives beyond its fair share, as a fraction of that share.
    #   sent_L: bytes of the tokens that a layer sends beyond its fair share; some modes of activation
    #       checkpointing save them.
    def __init__(self, plan: MemoryPlan, layers: list[nn.Module]):
        self.layers = layers
        self.room = 0
        self.evicted_bytes = self.least_peak = 0
        self.quiet = False
        self._base_S = np.array([m.base for m in plan.moments]) + CUBLAS_BYTES + plan.slack
        self._growth_S = np.array([m.growth for m in plan.moments])
        z_SL = np.array([[dict(m.z).get(layer, 0) for layer in plan.layers] for m in plan.moments])
        self._alive_SL, self._whole_z_L = z_SL > 0, z_SL.max(axis=0)
        self._growth_L2 = np.array([plan.layer_growth[layer] for layer in plan.layers])
        self._latest = 0
        self._begin_forward()

    def _begin_forward(self) -> None:
        """Start from the assumptions of the plan, until the rows of a layer are known."""
        self._saved: list[tuple[int, weakref.ref[torch.UntypedStorage]]] = []
        self._rows_L2, self._sent_L = np.zeros((len(self.layers), 2)), np.zeros(len(self.layers))
        self._z_L = self._whole_z_L * [layer.save_percent / 100 for layer in self.layers]  # pyright: ignore[reportOperatorIssue] - a number
        self.evicted_bytes = 0

    def save_percent(self, layer: nn.Module) -> float:
        """The share that the layer may save in the forward of the last `reserve`: its own save_percent, or 0."""
        return layer.save_percent if self._z_L[self.layers.index(layer)] > 0 else 0.0  # pyright: ignore[reportReturnType] - it is one

    def reserve(self, layer: nn.Module, tokens: float, slots: float, more_sent: int) -> None:
        """Make room for a layer's rows, before they are exchanged; `Dispatcher.dispatch` has the arguments."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return  # a forward that saves nothing, or one that a backward computes again
        i = self.layers.index(layer)
        if i <= self._latest:
            self._begin_forward()
        self._latest = i
        self._rows_L2[i], self._sent_L[i] = (tokens - 1, slots - 1), more_sent
        self._z_L[i] *= slots
        over_S = self._over_S()
        for j, storage in self._saved:  # the first layer's is alive longest
            if self._would_help(j, over_S) and (z := storage()) is not None:
                z.resize_(0)
                over_S = self._evict(j)
        if self._would_help(i, over_S):
            self._evict(i)
        if i == len(self.layers) - 1:
            # A lower bound: what is saved goes by the rows that came, all else by no more than the fair share.
            least_S = self._peak_S(self._rows_L2, self._sent_L.clip(max=0), min(self._rows_L2.min(), 0))
            self.least_peak = max(self.least_peak, int(least_S.max()))

    def record_saved(self, layer: nn.Module, z_S2F: torch.Tensor) -> None:
        """Remember z that a forward of this layer saves, until it is freed."""
        if torch._C._current_graph_task_id() == -1:
            self._saved.append((self.layers.index(layer), weakref.ref(z_S2F.untyped_storage())))

    def _peak_S(self, rows_L2: np.ndarray, sent_L: np.ndarray, rows: float) -> np.ndarray:
        """Bytes at each moment of the plan.

        Args:
            rows_L2, sent_L: what the layers receive and send beyond the fair share, by which they save activations.
            rows: the same of the layer that is at work, as a fraction of its fair share.
        """
        saved_S = self._alive_SL @ (self._z_L + (self._growth_L2 * rows_L2).sum(axis=1) + sent_L)
        sent = sent_L[np.abs(sent_L).argmax()]
        return self._base_S + saved_S + self._growth_S * rows + (self._growth_S > 0) * sent

    def _over_S(self) -> np.ndarray:
        """At which moments there may be too little room, by what is known of the rows so far."""
        rows_L2 = self._rows_L2.clip(min=0)
        return self._peak_S(rows_L2, self._sent_L.clip(min=0), rows_L2.max()) > self.room

    def _would_help(self, i: int, over_S: np.ndarray) -> bool:
        """Whether this layer's z is alive at a moment that has too little room."""
        return bool(self._z_L[i] and (over_S & self._alive_SL[:, i]).any())

    def _evict(self, i: int) -> np.ndarray:
        """Count this layer's z as evicted; `_over_S` then."""
        self.evicted_bytes += int(self._z_L[i])
        self._z_L[i] = 0
        if not self.quiet:
            self.quiet = True
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            tokens, slots = 1 + self._rows_L2.max(axis=0)
            logger.info(
                f"save_percent = auto: rank {rank} receives up to {tokens:.3f} times its fair share of tokens, "
                f"{slots:.3f} of rows, by MoE layer {self._latest + 1} of {len(self.layers)}, and evicts the z that "
                "has no room; not said again, see memory/experts_shed"
            )
        return self._over_S()
