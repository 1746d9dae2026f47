"""The router of an MoE layer for TorchTitan's trainer: logits, chosen experts and scores of each token."""

import torch
from torch import nn
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.models.moe import MoEArgs
from torchtitan.models.moe.moe import TokenChoiceTopKRouter

from momoe_titan.kernels.quantile import NUM_BINS
from momoe_titan.kernels.router import float32_product
from momoe_titan.model.parallel.collectives import local_weight
from momoe_titan.moe.expert_stats import accumulate_entropy, accumulate_margins, feeds_balancing, records_entropy
from momoe_titan.moe.router import expert_scores, route_in_groups, route_tokens, scale_scores
from momoe_titan.moe.router_losses import accumulate_router_losses, add_router_losses, expert_shares


class Float32Linear(nn.Linear):
    """A linear layer that multiplies in float32, whatever the dtypes of x and weight.

    x is (T, D), the output float32. Autocast is switched off inside. Under FSDP mixed precision, x
    and the gathered weight arrive rounded to bfloat16 and are not rounded any further.
    """

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TE = float32_product(x_TD, local_weight(self.weight))
        return out_TE if self.bias is None else out_TE + local_weight(self.bias).float()


class MomoeRouter(TokenChoiceTopKRouter):
    """TorchTitan's token-choice router with float32 logits and the choice of `moe.router.route_tokens`.

    Buffers, which are not in the state dict:
        entropy_and_tokens: (2) float32: the sum of the tokens' entropies, and their number, over
            the training forwards since the last log (see `expert_stats.accumulate_entropy`).
        loss_sums: (2) float32: the same sums of the auxiliary and the z-loss, unweighted; 0 where the
            router has neither.
        margins_EB, input_sum_C: what quantile balancing counts over the training forwards since
            the last optimizer step (see `expert_stats.accumulate_margins`), after which they are
            0. None unless `count_margins` was called.
        last_shares_E: (E) float32, the share of the last optimizer step's choices that fell on each
            expert, for an auxiliary loss over the "global" batch. None unless `record_shares` was
            called.

    Attributes:
        aux_loss_weight, aux_loss_scope, z_loss_weight: see `moe.router_losses`; 0 leaves a loss out.
        tokens_per_step: by which the losses are divided, so that their gradient adds up over ranks
            and microbatches to that of a mean over the step. None for the tokens of the forward.
        sequence_mesh: the ranks of tensor parallelism, which have a part of each sequence, or None.
    """

    gate: Float32Linear
    entropy_and_tokens: torch.Tensor
    loss_sums: torch.Tensor
    last_shares_E: torch.Tensor | None
    margins_EB: torch.Tensor | None
    input_sum_C: torch.Tensor | None

    def __init__(self, dim: int, moe_args: MoEArgs):
        super().__init__(
            dim=dim,
            num_experts=moe_args.num_experts,
            num_expert_groups=moe_args.num_expert_groups,
            num_limited_groups=moe_args.num_limited_groups,
            top_k=moe_args.top_k,
            score_func=moe_args.score_func,
            route_norm=moe_args.route_norm,
            route_scale=moe_args.route_scale,
            gate_bias=moe_args.gate_bias,
            _debug_force_load_balance=moe_args._debug_force_load_balance,
        )
        self.gate = Float32Linear(dim, moe_args.num_experts, bias=moe_args.gate_bias)
        # float32 whatever the default dtype is, which TorchTitan sets to training.dtype
        self.register_buffer("entropy_and_tokens", torch.zeros(2, dtype=torch.float32), persistent=False)
        self.register_buffer("loss_sums", torch.zeros(2, dtype=torch.float32), persistent=False)
        self.aux_loss_weight = self.z_loss_weight = 0.0
        self.aux_loss_scope = "global"
        self.tokens_per_step: float | None = None
        self.sequence_mesh: DeviceMesh | None = None
        self.register_buffer("last_shares_E", None, persistent=False)
        self.register_buffer("margins_EB", None, persistent=False)
        self.register_buffer("input_sum_C", None, persistent=False)

    def count_margins(self) -> None:
        """Count from now on what quantile balancing needs."""
        self.margins_EB = torch.zeros(self.num_experts, NUM_BINS, dtype=torch.int32)
        self.input_sum_C = torch.zeros(self.gate.in_features + 1, dtype=torch.float32)

    def record_shares(self) -> None:
        """Make room for what an auxiliary loss over the "global" batch needs; the load balancer fills it."""
        self.last_shares_E = torch.zeros(self.num_experts, dtype=torch.float32)

    def reset_statistics(self, device: torch.device) -> None:
        """Set all buffers to zero, on this device."""
        self.entropy_and_tokens = torch.zeros(2, dtype=torch.float32, device=device)
        self.loss_sums = torch.zeros(2, dtype=torch.float32, device=device)
        if self.last_shares_E is not None:
            self.last_shares_E = torch.zeros_like(self.last_shares_E, device=device)
        if self.margins_EB is not None and self.input_sum_C is not None:
            self.margins_EB = torch.zeros_like(self.margins_EB, device=device)
            self.input_sum_C = torch.zeros_like(self.input_sum_C, device=device)

    def forward(
        self, x_TD: torch.Tensor, expert_bias_E: torch.Tensor | None = None, num_sequences: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose K experts per token.

        Args:
            x_TD: tokens, any floating dtype.
            expert_bias_E: float32. Takes part in the choice of experts, not in the scores.
            num_sequences: how many sequences of the same length the tokens are.

        Returns:
            scores_TK float32 and ids_TK int64, ordered by falling score plus bias.
        """
        logits_TE = self.gate(x_TD)
        if records_entropy(self):
            scores_TE = expert_scores(logits_TE.detach(), self.score_func)
            accumulate_entropy(self.entropy_and_tokens, scores_TE)
        how = self.route_norm, self.route_scale
        if self._debug_force_load_balance:
            scores_TE = expert_scores(logits_TE, self.score_func)
            ids_TK, scores_TK = self._debug_force_load_balance_routing(scores_TE)
            return scale_scores(scores_TK, *how), ids_TK
        choice = logits_TE, expert_bias_E, self.top_k, self.score_func, *how
        groups = self.num_expert_groups or 1, self.num_limited_groups or 1
        if self.num_expert_groups is not None:
            scores_TK, ids_TK = route_in_groups(*choice, *groups)
        else:
            scores_TK, ids_TK = route_tokens(*choice)
        if self.margins_EB is not None and expert_bias_E is not None and feeds_balancing(self):
            of_token = x_TD.detach(), logits_TE.detach(), expert_bias_E, ids_TK
            how_many = {"num_groups": groups[0], "num_limited_groups": groups[1]}
            accumulate_margins(self.margins_EB, self.input_sum_C, *of_token, self.score_func, **how_many)
        if (self.aux_loss_weight or self.z_loss_weight) and feeds_balancing(self):
            scores_TK = self._add_losses(scores_TK, logits_TE, ids_TK, num_sequences)
        return scores_TK, ids_TK

    def _add_losses(
        self, scores_TK: torch.Tensor, logits_TE: torch.Tensor, ids_TK: torch.Tensor, num_sequences: int
    ) -> torch.Tensor:
        shares_SE = self._shares(ids_TK, num_sequences) if self.aux_loss_weight else None
        if records_entropy(self):
            accumulate_router_losses(self.loss_sums, logits_TE.detach(), shares_SE, self.score_func)
        per_token = 1 / (self.tokens_per_step or max(1, len(logits_TE)))
        weights = self.aux_loss_weight * per_token, self.z_loss_weight * per_token
        return add_router_losses(scores_TK, logits_TE, shares_SE, self.score_func, *weights)

    def _shares(self, ids_TK: torch.Tensor, num_sequences: int) -> torch.Tensor:
        if self.last_shares_E is not None:
            return self.last_shares_E[None]
        shares_SE = expert_shares(ids_TK, self.num_experts, num_sequences if self.aux_loss_scope == "sequence" else 1)
        if self.sequence_mesh is not None:
            shares_SE = funcol.all_reduce(shares_SE, "avg", self.sequence_mesh)
        return shares_SE

    def init_weights(self, init_std: float) -> None:
        super().init_weights(init_std)
        if self.gate.bias is not None:
            nn.init.zeros_(self.gate.bias)
