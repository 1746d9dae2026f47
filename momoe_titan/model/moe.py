"""The MoE layer for TorchTitan's trainer: our experts, and the state of load balancing."""

import dataclasses
import functools

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard
from torchtitan.models.moe import MoE, MoEArgs
from torchtitan.tools.logging import logger

from momoe_titan.config.section import Momoe
from momoe_titan.model.experts import MomoeExperts, SharedExperts
from momoe_titan.model.parallel.collectives import gather_rows, sum_and_scatter_rows
from momoe_titan.model.parallel.dispatch import Dispatcher
from momoe_titan.model.parallel.gathered import TokenGatherer
from momoe_titan.model.router import MomoeRouter
from momoe_titan.moe.balancing import QUANTILE
from momoe_titan.moe.expert_stats import record_counts
from momoe_titan.moe.float32_buffers import Float32Buffers


class BalancedMoE(Float32Buffers, MoE):
    """Base class of `MomoeMoE` and `StockMoE`: router, shared experts, and the state of load balancing.

    Args:
        moe_args: TorchTitan's arguments; its `load_balance_coeff` is not read.
        dim: D.
        hidden_dim: F.
        load_balance_rate: how far an optimizer step moves `expert_bias`; 0 leaves it as it is.
            For the rule "quantile" it only says whether there is balancing.
        load_balance_rule: "sign", "proportional" (see `moe.balancing.bias_delta`) or "quantile"
            (see `quantile_delta`).
        load_balance_average: of the rule "quantile": the share of the solved change that a step takes.

    Attributes:
        tp_mesh: the ranks of tensor parallelism that each give the layer their part of the
            sequence, or None.
        experts_tp_placements: how tensor parallelism shards the experts' weights, by name.

    Buffers, both in the state dict and changed in place by an optimizer step:
        expert_bias: (E) float32, whatever dtype the module is cast to.
        tokens_per_expert: (E) int64, tokens that chose each expert in training forwards since the
            last optimizer step. Not counted: evaluation, forwards under no_grad, and forwards that
            activation checkpointing recomputes.
    """

    float32_buffers = ("expert_bias",)
    router_class = MomoeRouter
    experts_tp_placements: dict[str, Placement]
    router: MomoeRouter
    experts: nn.Module
    shared_experts: nn.Module | None
    tp_mesh: DeviceMesh | None
    gatherer: TokenGatherer | None
    expert_bias: torch.Tensor
    tokens_per_expert: torch.Tensor

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
        # The base class registers expert_bias only where it has a rate.
        super().__init__(dataclasses.replace(moe_args, load_balance_coeff=1.0), dim, hidden_dim)
        self.load_balance_coeff = load_balance_rate or None  # TorchTitan's name for the rate
        self.load_balance_rule = load_balance_rule
        self.load_balance_average = load_balance_average
        self.router = self.router_class(dim, moe_args)
        # Where every token chooses all experts, there is nothing to solve for.
        if load_balance_rate and load_balance_rule == QUANTILE and moe_args.top_k < moe_args.num_experts:
            self.router.count_margins()
        if self.shared_experts is not None:
            self.shared_experts = SharedExperts(dim, hidden_dim * moe_args.num_shared_experts)
        self.tp_mesh = None
        self.gatherer = None
        counts_E = torch.zeros(moe_args.num_experts, dtype=torch.int64)
        self.register_buffer("tokens_per_expert", counts_E, persistent=True)
        self.register_load_state_dict_pre_hook(_start_missing_state_at_zero)

    @property
    def load_balance_rate(self) -> float:
        """How far an optimizer step moves `expert_bias`; 0 where balancing is off."""
        return self.load_balance_coeff or 0.0

    def init_weights(self, init_std: float, buffer_device: torch.device) -> None:
        super().init_weights(init_std, buffer_device)
        self.reset_balance_state(buffer_device)

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    def reset_balance_state(self, device: torch.device) -> None:
        """Set the bias, the counts and the router's entropy to zero, on this device."""
        num_experts = self.num_experts
        self.expert_bias = torch.zeros(num_experts, dtype=torch.float32, device=device)
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.router.reset_statistics(device)

    def omit_from_next_load(self, name: str) -> None:
        """Leave a buffer out of the state dict until the next `load_state_dict`, which zeroes it.

        For a checkpoint without this buffer, because torch.distributed.checkpoint refuses to load a
        key that the checkpoint does not have.
        """
        self._non_persistent_buffers_set.add(name)


class MomoeMoE(BalancedMoE):
    """An MoE layer with the experts of our kernels and optional shared experts.

    Args:
        save_percent, backend, check_ids: of `momoe_mlp`.
        the others: as in `BalancedMoE`.

    Attributes:
        dispatcher: sends tokens to the ranks of their experts under expert parallelism, or None.
        gatherer: gathers the tokens of all ranks in its place, or None.
    """

    experts_tp_placements = {"w1": Shard(3), "w2": Shard(1)}
    experts: MomoeExperts

    def __init__(
        self,
        moe_args: MoEArgs,
        dim: int,
        hidden_dim: int,
        *,
        load_balance_rate: float = 0.0,
        load_balance_rule: str = Momoe.load_balance_rule,
        load_balance_average: float = Momoe.load_balance_average,
        save_percent: float = 0.0,
        backend: str = "auto",
        check_ids: bool = False,
    ):
        super().__init__(
            moe_args,
            dim,
            hidden_dim,
            load_balance_rate=load_balance_rate,
            load_balance_rule=load_balance_rule,
            load_balance_average=load_balance_average,
        )
        self.experts = MomoeExperts(dim, hidden_dim, moe_args.num_experts, save_percent, backend, check_ids)
        self.dispatcher: Dispatcher | None = None

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """x (B, L, D) -> out (B, L, D).

        Does not wait for the device, except for the sizes of what `dispatcher` exchanges. t of
        the T tokens are the rank's own, which is all of them without tensor parallelism.
        """
        if self.gatherer is not None:
            x_TD, *under_way = self.route_and_gather(x_BLD)
            # Before the experts: activation checkpointing must not begin a recomputation, which the backward of these
            # does, before the backward has come to the experts, whose FSDP hooks would take it for another forward.
            shared_TD = self.run_shared_experts(x_TD)
            return self.add_results(self.run_experts(*under_way), shared_TD).view(x_BLD.shape)
        x_tD = x_BLD.reshape(-1, x_BLD.shape[-1])
        x_TD = gather_rows(x_tD, self.tp_mesh)
        scores_tK, ids_tK = self.router(x_tD, self.expert_bias, x_BLD.shape[0])
        scores_TK, ids_TK = (gather_rows(t, self.tp_mesh) for t in (scores_tK, ids_tK))
        if self.dispatcher is not None:
            budget = self.experts.activation_budget
            reserve = budget and functools.partial(budget.reserve, self.experts)
            exchange, counts_E = self.dispatcher.dispatch(x_TD, ids_TK, scores_TK, reserve)
        else:
            out_TD, counts_E = self.experts(x_TD, ids_TK, scores_TK)
        record_counts(self, self.tokens_per_expert, counts_E)
        shared_TD = self.run_shared_experts(x_TD)
        if self.dispatcher is not None:
            y_MD, _ = self.experts(*exchange.receive())
            out_TD = exchange.combine(y_MD)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        return sum_and_scatter_rows(out_TD, self.tp_mesh).view(x_BLD.shape)

    def run_shared_experts(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        return None if self.shared_experts is None else self.shared_experts(x_TD)

    # The parts of a forward with a gatherer. The first and the last can be compiled.

    def route_and_gather(self, x_BLD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_TD, and three tensors for `run_experts`, which are under way."""
        assert self.gatherer is not None
        x_tD = x_BLD.reshape(-1, x_BLD.shape[-1])
        x_TD = gather_rows(x_tD, self.tp_mesh)
        x_MD = self.gatherer.gather(x_TD)
        scores_tK, ids_tK = self.router(x_tD, self.expert_bias, x_BLD.shape[0])
        scores_TK, ids_TK = (gather_rows(t, self.tp_mesh) for t in (scores_tK, ids_tK))
        choice = self.gatherer.gather_choice(ids_TK, scores_TK, x_MD)
        record_counts(self, self.tokens_per_expert, self.gatherer.count_chosen(ids_TK))
        return x_TD, x_MD, *choice

    def run_experts(self, x_MD: torch.Tensor, scores_MK: torch.Tensor, ids_MK: torch.Tensor) -> torch.Tensor:
        """This rank's experts for the tokens of all ranks; for `add_results`, under way to their ranks."""
        assert self.gatherer is not None
        y_MD, _ = self.experts(*self.gatherer.receive(x_MD, scores_MK, ids_MK))
        return self.gatherer.send_home(y_MD)

    def add_results(self, y_MD: torch.Tensor, shared_TD: torch.Tensor | None) -> torch.Tensor:
        """out (t, D), from the results of the experts under way and those of the shared ones."""
        assert self.gatherer is not None
        out_TD = self.gatherer.sum(y_MD)
        if shared_TD is not None:
            out_TD = out_TD + shared_TD
        return sum_and_scatter_rows(out_TD, self.tp_mesh)


def _start_missing_state_at_zero(
    module: BalancedMoE, state_dict, prefix, local_metadata, strict, missing, unexpected, errors
) -> None:
    """`load_state_dict` hook: a layer's part of a state dict without bias or counts gets zeros for them."""
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
