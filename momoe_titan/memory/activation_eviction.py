"""Shedding z: `save_percent = "auto"` where a routing is more skewed than planned.

Under expert parallelism the rows that a rank receives depend on the routing, and the plan takes the
rank's fair share. z is a cache: the backward can compute any of it again, to the bit. So, as soon as
the host knows how many rows a layer will receive, which is before any memory is taken for them, the
rank looks whether the step will still fit, and if not sheds z of this forward's earlier layers, and at
last does not keep this layer's own. With all of it shed the memory is that of save_percent 0. No rank
asks another.
"""

import weakref

import numpy as np
import torch
from torch import nn
from torchtitan.tools.logging import logger

from momoe_titan.memory.plan import CUBLAS_BYTES, MemoryPlan


class Ledger:
    """What this rank's step takes by the plan, given the rows that its layers receive, and the z
    that can be shed. Knows one forward at a time, up to its backward.

    Args:
        plan: of the job, with growth.
        layers: the MoE layers, which have a `save_percent`, in the plan's order.

    Attributes:
        room: bytes that the plan's `active` and `slack` may take.
        shed_bytes: z that was not kept of the latest forward, for want of room.
        least_peak: `active` and `slack`, at least, of the forwards so far; 0 before the first.
        quiet: whether the next shedding is not logged.
    """

    # Letters: S moments of a step, L layers. rows_L2: tokens and slots received beyond the fair share,
    # relative to it; sent_L: bytes of tokens sent beyond it, which some modes of checkpointing keep.
    def __init__(self, plan: MemoryPlan, layers: list[nn.Module]):
        self.layers = layers
        self.room = 0
        self.shed_bytes = self.least_peak = 0
        self.quiet = False
        self._base_S = np.array([m.base for m in plan.moments]) + CUBLAS_BYTES + plan.slack
        self._growth_S = np.array([m.growth for m in plan.moments])
        z_SL = np.array([[dict(m.z).get(layer, 0) for layer in plan.layers] for m in plan.moments])
        self._alive_SL, self._whole_z_L = z_SL > 0, z_SL.max(axis=0)
        self._growth_L2 = np.array([plan.layer_growth[layer] for layer in plan.layers])
        self._latest = 0
        self._begin()

    def _begin(self) -> None:
        """Of a forward: as planned as long as nothing else is known."""
        self._held: list[tuple[int, weakref.ref[torch.UntypedStorage]]] = []
        self._rows_L2, self._sent_L = np.zeros((len(self.layers), 2)), np.zeros(len(self.layers))
        self._z_L = self._whole_z_L * [layer.save_percent / 100 for layer in self.layers]
        self.shed_bytes = 0

    def save_percent(self, layer: nn.Module) -> float:
        """What the layer is to keep of the forward that `make_room` was called for: its own, or 0."""
        return layer.save_percent if self._z_L[self.layers.index(layer)] > 0 else 0.0

    def make_room(self, layer: nn.Module, received: float, slots: float, more_sent: int) -> None:
        """Before a layer's rows are exchanged; see `Dispatcher.send`."""
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return  # keeps nothing, or is computed again for a backward
        i = self.layers.index(layer)
        if i <= self._latest:
            self._begin()
        self._latest = i
        self._rows_L2[i], self._sent_L[i] = (received - 1, slots - 1), more_sent
        self._z_L[i] *= slots
        over_S = self._over_S()
        for j, storage in self._held:  # the first layer's is alive longest
            if self._would_help(j, over_S) and (z := storage()) is not None:
                z.resize_(0)
                over_S = self._give_up(j)
        if self._would_help(i, over_S):
            self._give_up(i)
        if i == len(self.layers) - 1:  # what is kept by what came, of the rest nothing beyond the fair share
            least_S = self._peak_S(self._rows_L2, self._sent_L.clip(max=0), min(self._rows_L2.min(), 0))
            self.least_peak = max(self.least_peak, int(least_S.max()))

    def keep(self, layer: nn.Module, z_S2F: torch.Tensor) -> None:
        """z of a forward of this layer, until it is freed."""
        if torch._C._current_graph_task_id() == -1:
            self._held.append((self.layers.index(layer), weakref.ref(z_S2F.untyped_storage())))

    def _peak_S(self, rows_L2: np.ndarray, sent_L: np.ndarray, rows: float) -> np.ndarray:
        """Bytes at each moment of the plan, where layers keep what goes with rows_L2 and sent_L beyond
        the fair share, and the one at work has to do with `rows` and the most or least of sent_L."""
        kept_S = self._alive_SL @ (self._z_L + (self._growth_L2 * rows_L2).sum(axis=1) + sent_L)
        sent = sent_L[np.abs(sent_L).argmax()]
        return self._base_S + kept_S + self._growth_S * rows + (self._growth_S > 0) * sent

    def _over_S(self) -> np.ndarray:
        """When there may be too little room, by what is known of the rows so far."""
        rows_L2 = self._rows_L2.clip(min=0)
        return self._peak_S(rows_L2, self._sent_L.clip(min=0), rows_L2.max()) > self.room

    def _would_help(self, i: int, over_S: np.ndarray) -> bool:
        """Whether there would be more room then without this layer's z."""
        return bool(self._z_L[i] and (over_S & self._alive_SL[:, i]).any())

    def _give_up(self, i: int) -> np.ndarray:
        """Without this layer's z; `_over_S` then."""
        self.shed_bytes += int(self._z_L[i])
        self._z_L[i] = 0
        if not self.quiet:
            self.quiet = True
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            tokens, slots = 1 + self._rows_L2.max(axis=0)
            logger.info(
                f"save_percent = auto: rank {rank} receives up to {tokens:.3f} times its fair share of tokens, {slots:.3f} of "
                f"rows, by MoE layer {self._latest + 1} of {len(self.layers)}, and sheds the z that has no room; "
                "not said again, see memory/experts_shed"
            )
        return self._over_S()
