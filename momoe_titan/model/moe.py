"""MoE layers as TorchTitan's trainer knows them: our experts, or TorchTitan's stock ones."""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torchtitan.models.moe import FeedForward, MoE, MoEArgs
from torchtitan.models.moe.moe import TokenChoiceTopKRouter, TokenReorderer
from torchtitan.models.utils import trunc_normal_
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import has_cuda_capability

from momoe_titan.kernels import momoe_mlp
from momoe_titan.kernels.router import float32_product, route, runs_here
from momoe_titan.memory.activation_eviction import Ledger
from momoe_titan.model.parallel.dispatch import Dispatcher
from momoe_titan.model.parallel.tensor import (
    gather_rows,
    local_weight,
    sum_and_scatter_rows,
)
from momoe_titan.moe.expert_stats import (
    accumulate_counts,
    accumulate_entropy,
    feeds_balancing,
    records_entropy,
)


class Float32Linear(nn.Linear):
    """A linear layer that multiplies in float32, whatever the dtype of x and weight.

    Holds under autocast, which is switched off inside, and under FSDP mixed precision, where x
    and the gathered weight arrive rounded to bfloat16 and are not rounded any further. x is
    (T, D); the output is float32.
    """

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        out_TE = float32_product(x_TD, local_weight(self.weight))
        return out_TE if self.bias is None else out_TE + local_weight(self.bias).float()


# An op of its own, so that activation checkpointing can keep the choice (a K-th of an E-th of the
# sort's output) and need not make it again.
@torch.library.custom_op("momoe_titan::choose_experts", mutates_args=())
def choose_experts(choice_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """ids_TK int64: the experts of the largest values, in falling order, of equals the lowest id."""
    # A stable sort, because torch.topk leaves the order of equal values open.
    order_TE = choice_TE.sort(dim=1, descending=True, stable=True).indices
    # A copy, not a view, which would keep all of order_TE; TorchTitan's reorderer wants it flat.
    return order_TE[:, :top_k].contiguous()


@choose_experts.register_fake
def _(choice_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    return choice_TE.new_empty(choice_TE.shape[0], top_k, dtype=torch.int64)


class MomoeRouter(TokenChoiceTopKRouter):
    """TorchTitan's token-choice router with float32 logits and a fixed order among equals.

    Of experts with equal score (plus bias) the lowest id is chosen. Infinite logits count as the
    largest finite ones. A NaN makes the scores of its own token NaN, and that token still chooses
    K different experts.

    Buffer, not in the state dict:
        entropy_and_tokens: (2) float32, of the tokens of training forwards; see
            `counting.accumulate_entropy`.
    """

    def __init__(self, dim: int, moe_args: MoEArgs):
        super().__init__(
            dim=dim,
            num_experts=moe_args.num_experts,
            num_expert_groups=None,
            num_limited_groups=None,
            top_k=moe_args.top_k,
            score_func=moe_args.score_func,
            route_norm=moe_args.route_norm,
            route_scale=moe_args.route_scale,
            gate_bias=moe_args.gate_bias,
            _debug_force_load_balance=moe_args._debug_force_load_balance,
        )
        self.gate = Float32Linear(dim, moe_args.num_experts, bias=moe_args.gate_bias)
        self.register_buffer("entropy_and_tokens", torch.zeros(2), persistent=False)

    def forward(
        self, x_TD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            x_TD: tokens, any floating dtype.
            expert_bias_E: float32, added for the choice of experts and not to the scores
                (arXiv 2408.15664, equation 3).

        Returns:
            scores_TK float32 and ids_TK int64, ordered by falling score plus bias.
        """
        logits_TE = self.gate(x_TD)
        if runs_here(logits_TE) and not self._debug_force_load_balance:
            if records_entropy(self):
                accumulate_entropy(self.entropy_and_tokens, self._scores(logits_TE.detach()))
            how = self.top_k, self.score_func, self.route_norm, self.route_scale
            return route(logits_TE, expert_bias_E, *how)

        scores_TE = self._scores(logits_TE)
        if records_entropy(self):
            accumulate_entropy(self.entropy_and_tokens, scores_TE.detach())

        choice_TE = scores_TE.detach()
        if expert_bias_E is not None:
            choice_TE = choice_TE + expert_bias_E
        ids_TK = choose_experts(choice_TE, self.top_k)
        scores_TK = scores_TE.gather(1, ids_TK)
        if self._debug_force_load_balance:
            ids_TK, scores_TK = self._debug_force_load_balance_routing(scores_TE)

        if self.route_norm:
            scores_TK = scores_TK / (scores_TK.sum(dim=1, keepdim=True) + 1e-20)
        return scores_TK * self.route_scale, ids_TK

    def _scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        # inf - inf would make a NaN of a softmax with a clear winner; NaN passes through clamp.
        largest = torch.finfo(torch.float32).max
        logits_TE = logits_TE.clamp(-largest, largest)
        return logits_TE.sigmoid() if self.score_func == "sigmoid" else logits_TE.softmax(dim=1)

    def init_weights(self, init_std: float) -> None:
        super().init_weights(init_std)
        if self.gate.bias is not None:
            nn.init.zeros_(self.gate.bias)


class MomoeExperts(nn.Module):
    """All experts of one layer.

    Args:
        dim: D.
        hidden_dim: F.
        num_experts: E.
        save_percent, backend, check_ids: of `momoe_mlp`.

    Attributes:
        w1: (E, D, 2, F): [:, :, 0] up, [:, :, 1] gate. With an axis of their own, the same columns
            of both are one shard of the last dimension, as tensor parallelism needs them.
        w2: (E, F, D).
        ledger: of the z that this model's layers keep, where it may have to be shed, or None.
    """

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
        self.w1 = nn.Parameter(torch.empty(num_experts, dim, 2, hidden_dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.ledger: Ledger | None = None

    def forward(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        scores_TK: torch.Tensor,
        num_rows: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out_TD and the tokens per expert, int64 (E); see `momoe_mlp`."""
        w1, w2 = local_weight(self.w1), local_weight(self.w2)
        save_percent, on_keep = self.save_percent, None
        if self.ledger is not None:
            save_percent = self.ledger.save_percent(self)
            on_keep = functools.partial(self.ledger.keep, self)
        return momoe_mlp(
            x_TD,
            w1.flatten(2),
            w2,
            ids_TK,
            scores_TK,
            save_percent,
            num_rows=num_rows,
            backend=self.backend,
            check_ids=self.check_ids,
            on_keep=on_keep,
        )

    @torch.no_grad()
    def init_weights(self, init_std: float) -> None:
        """Draw what TorchTitan's GroupedExperts draws from the same seed, in its order: gate
        (their w1), down (w2), up (w3), each of shape (E, out, in)."""
        for target_EIO, std in (
            (self.w1[:, :, 1], 0.02),
            (self.w2, init_std),
            (self.w1[:, :, 0], init_std),
        ):
            drawn_EOI = target_EIO.new_empty(target_EIO.transpose(1, 2).shape)
            trunc_normal_(drawn_EOI, mean=0.0, std=std)
            target_EIO.copy_(drawn_EOI.transpose(1, 2))


class SharedExperts(FeedForward):
    """TorchTitan's feed-forward, which under tensor parallelism computes a rank's columns of the
    hidden dimension: x (T, D) -> its share of the sum that is the output (T, D)."""

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        w1, w2, w3 = (local_weight(w.weight) for w in (self.w1, self.w2, self.w3))
        return F.linear(F.silu(F.linear(x_TD, w1)) * F.linear(x_TD, w3), w2)


class BalancedMoE(MoE):
    """What both MoE layers share: router, shared experts, and the state of loss-free load
    balancing.

    Args:
        moe_args: TorchTitan's arguments; its `load_balance_coeff` is not read.
        dim: D.
        hidden_dim: F.
        balance_rate: how far an optimizer step moves `expert_bias`; 0 leaves it as it is.
        balance_rule: "sign" or "proportional", see `load_balancing.expert_bias_delta`.

    Attributes:
        tp_mesh: the ranks of tensor parallelism, where x is a rank's part of the sequence, or None.
        experts_tp_placements: how tensor parallelism shards the experts' weights, by name.

    Buffers, both in the state dict, both changed in place by an optimizer step:
        expert_bias: (E) float32, whatever dtype the module is cast to.
        tokens_per_expert: (E) int64, tokens that chose each expert in training forwards since the
            last optimizer step. Neither evaluation, nor no_grad, nor a forward recomputed for
            activation checkpointing (use_reentrant=False) is counted.
    """

    router_class = MomoeRouter

    def __init__(
        self,
        moe_args: MoEArgs,
        dim: int,
        hidden_dim: int,
        *,
        balance_rate: float = 0.0,
        balance_rule: str = "sign",
    ):
        # With any rate the base class registers both buffers.
        super().__init__(dataclasses.replace(moe_args, load_balance_coeff=1.0), dim, hidden_dim)
        self.load_balance_coeff = balance_rate or None
        self.load_balance_rule = balance_rule
        self.router = self.router_class(dim, moe_args)
        if self.shared_experts is not None:
            self.shared_experts = SharedExperts(dim, hidden_dim * moe_args.num_shared_experts)
        self.tp_mesh: DeviceMesh | None = None
        counts_E = torch.zeros(moe_args.num_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts_E, persistent=True)
        self.register_load_state_dict_pre_hook(_start_missing_state_at_zero)

    def init_weights(self, init_std: float, buffer_device: torch.device) -> None:
        super().init_weights(init_std, buffer_device)
        self.reset_balance_state(buffer_device)

    def reset_balance_state(self, device: torch.device) -> None:
        """Zero bias, counts and the router's entropy, on this device."""
        num_experts = self.experts.num_experts
        self.expert_bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.router.entropy_and_tokens = torch.zeros(2, device=device)

    def omit_from_next_load(self, name: str) -> None:
        """Leave a buffer out of the state dict until the next `load_state_dict`, which zeroes it.

        For a checkpoint that lacks it: torch.distributed.checkpoint refuses to load a key that
        the checkpoint does not have.
        """
        self._non_persistent_buffers_set.add(name)

    def _apply(self, fn, recurse=True):
        # A step of 1e-3 vanishes in bfloat16 next to a bias of 1, so that casting the module
        # moves the bias to another device at most.
        expert_bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = expert_bias.to(self.expert_bias.device)
        return self


class MomoeMoE(BalancedMoE):
    """Router, our experts and optional shared experts.

    Args:
        save_percent, backend, check_ids: of `momoe_mlp`.
        the others: as in `BalancedMoE`.

    Attributes:
        dispatcher: what expert parallelism sends tokens to their experts with, or None.
    """

    experts_tp_placements = {"w1": Shard(3), "w2": Shard(1)}

    def __init__(
        self,
        moe_args: MoEArgs,
        dim: int,
        hidden_dim: int,
        *,
        balance_rate: float = 0.0,
        balance_rule: str = "sign",
        save_percent: float = 0.0,
        backend: str = "auto",
        check_ids: bool = False,
    ):
        super().__init__(moe_args, dim, hidden_dim, balance_rate=balance_rate, balance_rule=balance_rule)
        self.experts = MomoeExperts(dim, hidden_dim, moe_args.num_experts, save_percent, backend, check_ids)
        self.dispatcher: Dispatcher | None = None

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """x (B, L, D) -> out (B, L, D), without waiting for the device but for the sizes of what
        expert parallelism exchanges. t of the T tokens are the rank's own: all, but for tensor
        parallelism."""
        x_tD = x_BLD.reshape(-1, x_BLD.shape[-1])
        x_TD = gather_rows(x_tD, self.tp_mesh)
        scores_tK, ids_tK = self.router(x_tD, self.expert_bias)
        scores_TK, ids_TK = (gather_rows(t, self.tp_mesh) for t in (scores_tK, ids_tK))
        if self.dispatcher is not None:
            ledger = self.experts.ledger
            make_room = ledger and functools.partial(ledger.make_room, self.experts)
            exchange, counts_E = self.dispatcher.send(x_TD, ids_TK, scores_TK, make_room)
        else:
            out_TD, counts_E = self.experts(x_TD, ids_TK, scores_TK)
        if feeds_balancing(self):
            accumulate_counts(self.tokens_per_expert, counts_E)
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        if self.dispatcher is not None:
            y_MD, _ = self.experts(*exchange.receive())
            out_TD = exchange.give_back(y_MD)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        return sum_and_scatter_rows(out_TD, self.tp_mesh).view(x_BLD.shape)


class _StockRouter(MomoeRouter):
    def forward(self, x_TD, expert_bias_E=None):
        scores_TK, ids_TK = super().forward(x_TD, expert_bias_E)
        # The base class adds these to tokens_per_expert in every forward.
        counts_E = ids_TK.new_zeros(self.num_experts)
        if feeds_balancing(self):
            accumulate_counts(counts_E, _count(ids_TK, self.num_experts))
        return scores_TK, ids_TK, counts_E


class _StockReorderer(TokenReorderer):
    def forward(self, scores_TK, ids_TK):
        # torch.histc, which the base class counts with, has no integer kernel for the CPU and no
        # deterministic one for CUDA.
        if ids_TK.is_cuda and not torch.are_deterministic_algorithms_enabled():
            return super().forward(scores_TK, ids_TK)
        ids_R = ids_TK.reshape(-1)
        order_R = ids_R.argsort(stable=True)
        return scores_TK.reshape(-1)[order_R], order_R, _count(ids_TK, self.num_experts)


def _count(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    ids_R = ids_TK.reshape(-1)
    return ids_R.new_zeros(num_experts).scatter_add_(0, ids_R, torch.ones_like(ids_R))


class StockMoE(BalancedMoE):
    """TorchTitan's own forward and experts, for comparison with `MomoeMoE`.

    Differs from TorchTitan's MoE in what would make the comparison unfair or stop it on a CPU:
    the router is ours, and tokens are counted as in `BalancedMoE`. Under tensor parallelism
    TorchTitan 0.2.2 takes each rank's share of the scores' gradient for the whole; here it is
    summed.
    """

    router_class = _StockRouter
    experts_tp_placements = {"w1": Shard(1), "w2": Shard(2), "w3": Shard(1)}

    def __init__(
        self,
        moe_args: MoEArgs,
        dim: int,
        hidden_dim: int,
        *,
        balance_rate: float = 0.0,
        balance_rule: str = "sign",
    ):
        grouped_mm = moe_args.use_grouped_mm and has_cuda_capability(9, 0)
        super().__init__(
            dataclasses.replace(moe_args, use_grouped_mm=grouped_mm),
            dim,
            hidden_dim,
            balance_rate=balance_rate,
            balance_rule=balance_rule,
        )
        self.reorderer = _StockReorderer(moe_args.num_experts, moe_args.top_k)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """x (B, L, D) -> out (B, L, D)."""
        x_TD = gather_rows(x_BLD.flatten(0, 1), self.tp_mesh)
        out_TD = super().forward(x_TD[None])[0]
        return sum_and_scatter_rows(out_TD, self.tp_mesh).view(x_BLD.shape)


def _start_missing_state_at_zero(
    module: BalancedMoE, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
) -> None:
    if not any(key.startswith(prefix) for key in state_dict):
        return
    for name in ("expert_bias", "tokens_per_expert"):
        module._non_persistent_buffers_set.discard(name)
        if prefix + name in state_dict:
            continue
        if name == "expert_bias":
            logger.warning(
                f"The checkpoint has no {prefix}{name}: the load-balancing bias of this layer "
                "STARTS AT ZERO, so that its experts may be badly balanced at first."
            )
        state_dict[prefix + name] = torch.zeros_like(getattr(module, name))
