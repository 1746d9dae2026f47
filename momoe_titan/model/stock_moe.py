"""TorchTitan's own MoE layer, for comparison with ours."""

import dataclasses

import torch
from torch.distributed.tensor import Shard
from torchtitan.models.moe import MoEArgs
from torchtitan.models.moe.moe import TokenReorderer

from momoe_titan.config.section import Momoe
from momoe_titan.kernels.gpu import has_capability
from momoe_titan.model.moe import BalancedMoE
from momoe_titan.model.parallel.collectives import gather_rows, sum_and_scatter_rows
from momoe_titan.model.router import MomoeRouter
from momoe_titan.moe.expert_stats import count_experts, record_counts


class _StockRouter(MomoeRouter):
    def forward(
        self, x_TD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, ids, and the tokens per expert, which TorchTitan's forward adds to the layer's counts."""
        scores_TK, ids_TK = super().forward(x_TD, expert_bias_E)
        # The layer's base class adds these counts to tokens_per_expert in every forward, so that they
        # are zero where a forward must not count.
        counts_E = ids_TK.new_zeros(self.num_experts)
        record_counts(self, counts_E, count_experts(ids_TK, self.num_experts))
        return scores_TK, ids_TK, counts_E


class _StockReorderer(TokenReorderer):
    def forward(self, scores_TK: torch.Tensor, ids_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores and slots sorted by expert, and the tokens per expert."""
        # The base class counts by torch.histc, which has no integer kernel for the CPU and no
        # deterministic one for CUDA.
        if ids_TK.is_cuda and not torch.are_deterministic_algorithms_enabled():
            return super().forward(scores_TK, ids_TK)
        ids_R = ids_TK.reshape(-1)
        order_R = ids_R.argsort(stable=True)
        return scores_TK.reshape(-1)[order_R], order_R, count_experts(ids_TK, self.num_experts)


class StockMoE(BalancedMoE):
    """TorchTitan's own forward and experts, for comparison with `MomoeMoE`.

    Differs from TorchTitan's MoE where that would make the comparison unfair, or would not run on a
    CPU: the router is ours, and tokens are counted as `BalancedMoE` says. Under tensor parallelism
    the ranks' partial gradients of the scores are summed, which TorchTitan 0.2.2 does not do.
    """

    router_class = _StockRouter
    experts_tp_placements = {"w1": Shard(1), "w2": Shard(2), "w3": Shard(1)}

    def __init__(
        self,
        moe_args: MoEArgs,
        dim: int,
        hidden_dim: int,
        *,
        load_balance_rate: float = 0.0,
        load_balance_rule: str = Momoe.load_balance_rule,
        load_balance_average: float = Momoe.load_balance_average,
    ):
        grouped_mm = moe_args.use_grouped_mm and has_capability(9, 0)
        super().__init__(
            dataclasses.replace(moe_args, use_grouped_mm=grouped_mm),
            dim,
            hidden_dim,
            load_balance_rate=load_balance_rate,
            load_balance_rule=load_balance_rule,
            load_balance_average=load_balance_average,
        )
        self.reorderer = _StockReorderer(moe_args.num_experts, moe_args.top_k)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """x (B, L, D) -> out (B, L, D)."""
        x_TD = gather_rows(x_BLD.flatten(0, 1), self.tp_mesh)
        out_TD = super().forward(x_TD[None])[0]
        return sum_and_scatter_rows(out_TD, self.tp_mesh).view(x_BLD.shape)
