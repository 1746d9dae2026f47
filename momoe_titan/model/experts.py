"""The experts of an MoE layer for TorchTitan's trainer: our kernels' and the shared ones."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torchtitan.models.moe import FeedForward
from torchtitan.models.utils import trunc_normal_

from momoe_titan.kernels import momoe_mlp
from momoe_titan.memory.activation_eviction import ActivationBudget
from momoe_titan.model.parallel.collectives import local_weight


class SavingExperts(nn.Module):
    """Base class of experts that our kernels run: how much a forward of theirs saves, and where it may be evicted.

    Attributes:
        save_percent, backend, check_ids: of `momoe_mlp`.
        hidden_dim: F.
        activation_budget: of the z that this model's layers save, where it may have to be evicted, or None.
    """

    num_experts: int
    save_percent: float
    backend: str
    check_ids: bool
    hidden_dim: int
    activation_budget: ActivationBudget | None = None

    def what_is_saved(self) -> tuple[float, Callable[[torch.Tensor], None] | None]:
        """`save_percent` and `on_saved` of the forward to come, both for `momoe_mlp`."""
        if self.activation_budget is None:
            return self.save_percent, None
        on_saved = functools.partial(self.activation_budget.record_saved, self)
        return self.activation_budget.save_percent(self), on_saved


class MomoeExperts(SavingExperts):
    """All experts of one layer.

    Args:
        dim: D.
        hidden_dim: F.
        num_experts: E.
        save_percent, backend, check_ids: of `momoe_mlp`.

    Attributes:
        w1: (E, D, 2, F): [:, :, 0] up, [:, :, 1] gate. Up and gate have an axis of their own, so
            that a shard of the last dimension has the same columns of both, as tensor parallelism
            needs them.
        w2: (E, F, D).
        compute_dtype: what weights are cast to that are not of this dtype, for experts that FSDP leaves out; or None.
    """

    compute_dtype: torch.dtype | None = None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        save_percent: float = 0.0,
        backend: str = "auto",
        check_ids: bool = False,
    ):
        super().__init__()
        self.num_experts = num_experts
        self.save_percent = save_percent
        self.backend = backend
        self.check_ids = check_ids
        self.hidden_dim = hidden_dim
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, 2, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))

    def forward(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        scores_TK: torch.Tensor,
        num_rows: int | None = None,
        usual_rows: int | None = None,
        outlet: str = "",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out_TD and the tokens per expert, int64 (E); see `momoe_mlp`."""
        w1, w2 = local_weight(self.w1), local_weight(self.w2)
        if self.compute_dtype is not None:
            w1, w2 = w1.to(self.compute_dtype), w2.to(self.compute_dtype)
        save_percent, on_saved = self.what_is_saved()
        return momoe_mlp(
            x_TD,
            w1.flatten(2),
            w2,
            ids_TK,
            scores_TK,
            save_percent,
            num_rows=num_rows,
            usual_rows=usual_rows,
            backend=self.backend,
            check_ids=self.check_ids,
            on_saved=on_saved,
            outlet=outlet,
        )

    @torch.no_grad()
    def init_weights(self, init_std: float) -> None:
        """Draw the weights that TorchTitan's GroupedExperts draws from the same seed.

        Its order is gate (its w1), down (w2), up (w3), each of shape (E, out, in).
        """
        for target_EIO, std in (
            (self.w1[:, :, 1], 0.02),
            (self.w2, init_std),
            (self.w1[:, :, 0], init_std),
        ):
            drawn_EOI = target_EIO.new_empty(target_EIO.transpose(1, 2).shape)
            trunc_normal_(drawn_EOI, mean=0.0, std=std)
            target_EIO.copy_(drawn_EOI.transpose(1, 2))


class SharedExperts(FeedForward):
    """TorchTitan's feed-forward, x (T, D) -> out (T, D).

    Under tensor parallelism a rank computes its columns of the hidden dimension, and out is the
    rank's partial sum.
    """

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        w1, w2, w3 = (local_weight(w.weight) for w in (self.w1, self.w2, self.w3))
        return F.linear(F.silu(F.linear(x_TD, w1)) * F.linear(x_TD, w3), w2)
