"""Our experts and rules of load balancing in the MoE models of TorchTitan 0.3, by its overrides.

    python -m torchtitan.train --module qwen3 --config qwen3_30b_a3b --override.imports \
        'momoe_titan.adapters.torchtitan_03.momoe_experts={"save_percent": 50}' \
        momoe_titan.adapters.torchtitan_03.momoe_router \
        'momoe_titan.adapters.torchtitan_03.momoe_balancing={"load_balance_rule": "quantile"}'

The first replaces the experts. The other two, which go together, replace the router and the optimizer's part of load
balancing. Parameters and the bias keep their names, shapes and layout, and the exchange of expert parallelism stays
TorchTitan's. This module needs TorchTitan 0.3 and of this package the kernels and `moe/`; the rest of the package is
for TorchTitan 0.2.2.
"""

# An environment has one TorchTitan, and type checks run beside 0.2.2.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false
# pyright: reportCallIssue=false

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from momoe_titan.config.section import BALANCE_RULES, Momoe
from momoe_titan.kernels import momoe_grouped_mlp, momoe_mlp
from momoe_titan.kernels.quantile import NUM_BINS
from momoe_titan.kernels.router import float32_product
from momoe_titan.moe.balancing import QUANTILE
from momoe_titan.moe.expert_stats import accumulate_counts, accumulate_margins, count_experts, feeds_balancing
from momoe_titan.moe.load_balancer import LoadBalancer
from momoe_titan.moe.router import route_in_groups, route_tokens
from momoe_titan.save_percent import validate_save_percent


class MomoeGroupedExperts(GroupedExperts):
    """TorchTitan's SwiGLU experts, run by our kernels, on tokens or on rows sorted by expert."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """Those of TorchTitan's experts, and `save_percent` and `backend` of `momoe_mlp`."""

        save_percent: float = 0.0
        backend: str = "auto"

    def __init__(self, config: Config):
        super().__init__(config)
        self.save_percent, self.backend = config.save_percent, config.backend

    def forward(self, x: torch.Tensor, *choice: torch.Tensor) -> torch.Tensor:
        """Experts on rows, as TorchTitan calls them, or on tokens.

        Args:
            x: (R, D) rows sorted by expert, or (T, D) tokens.
            *choice: the number of rows of each expert (E), or chosen experts and scores of each token, both (T, K).

        Returns:
            Like x, in its dtype. Computed in bfloat16 where the weights are float32, as TorchTitan does on a GPU.
        """
        gate, down, up = (_local(w) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        dtype = torch.bfloat16 if x.is_cuda else x.dtype
        gate, down, up, x_in = (t.to(dtype) for t in (gate, down, up, x))
        options = {"save_percent": self.save_percent, "backend": self.backend}
        if len(choice) == 1:
            counts_E = choice[0].to(torch.int64)
            return momoe_grouped_mlp(x_in, (up.mT, gate.mT), down.mT, counts_E, None, **options).to(x.dtype)
        ids_TK, scores_TK = choice
        out_TD, _ = momoe_mlp(x_in, (up.mT, gate.mT), down.mT, ids_TK, scores_TK, **options)
        return out_TD.to(x.dtype)


class MomoeRoutedExperts(RoutedExperts):
    """Gathers and combines tokens in the kernels of the experts, where no rank has to be reached."""

    @dataclass(kw_only=True, slots=True)
    class Config(RoutedExperts.Config):
        pass

    def forward(
        self, x_BLD: torch.Tensor, scores_BLK: torch.Tensor, ids_BLK: torch.Tensor, counts_E: torch.Tensor
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        dispatcher = self.token_dispatcher
        is_local = type(dispatcher) is LocalTokenDispatcher or (
            type(dispatcher) is AllToAllTokenDispatcher and dispatcher.ep_mesh is None
        )
        if not is_local or isinstance(self.inner_experts.w1_EFD, DTensor):
            return super().forward(x_BLD, scores_BLK, ids_BLK, counts_E)
        choice = ids_BLK.flatten(0, 1), scores_BLK.flatten(0, 1)
        return self.inner_experts(x_BLD.flatten(0, 1), *choice).view(x_BLD.shape)


@override(target=RoutedExperts.Config, exact=True, description="Experts by momoe_titan's kernels")
def momoe_experts(cfg: Any, save_percent: float = 0.0, backend: str = "auto") -> MomoeRoutedExperts.Config:
    """The override: experts of TorchTitan 0.3 with ours in their place.

    Args:
        cfg: a `RoutedExperts.Config` with SwiGLU experts of TorchTitan's own class.
        save_percent, backend: of `momoe_mlp`.

    Raises:
        ValueError: other experts, or a save_percent that is none.
    """
    percent = validate_save_percent(save_percent)
    inner = cfg.inner_experts
    if type(inner) is not GroupedExperts.Config:
        raise ValueError(f"the override momoe_experts knows GroupedExperts, got {type(inner).__qualname__}")
    experts = derive(inner, MomoeGroupedExperts.Config, save_percent=percent, backend=backend)
    return derive(cfg, MomoeRoutedExperts.Config, inner_experts=experts)


class MomoeRouter(TokenChoiceTopKRouter):
    """TorchTitan's router with the choice of `moe.router.route_tokens`, which counts what load balancing needs.

    Buffers, which are not in the state dict, from `count` on:
        tokens_per_expert: (E) int64, exact under activation checkpointing, too.
        margins_EB, input_sum_C: see `moe.expert_stats.accumulate_margins`; None where the rule is not "quantile".
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        pass

    def __init__(self, config: Config):
        super().__init__(config)
        if self.num_expert_groups is not None and self.num_limited_groups is None:
            raise ValueError(f"num_limited_groups must be set where num_expert_groups is, {self.num_expert_groups}")
        for name in ("tokens_per_expert", "margins_EB", "input_sum_C"):
            self.register_buffer(name, None, persistent=False)
        self.last_shares_E = None

    def count(self, rule: str, device: torch.device) -> None:
        """Count from now on, for this rule of load balancing."""
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        if rule == QUANTILE and self.top_k < self.num_experts:
            self.margins_EB = torch.zeros(self.num_experts, NUM_BINS, dtype=torch.int32, device=device)
            self.input_sum_C = torch.zeros(self.gate.in_features + 1, dtype=torch.float32, device=device)

    def forward(
        self, x_BLD: torch.Tensor, expert_bias_E: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores and ids of the chosen experts, (B, L, K) each, and the logits (B, L, E), all by float32 logits.

        Raises:
            ValueError: tokens that tensor parallelism has divided.
        """
        if isinstance(x_BLD, DTensor):
            raise ValueError("parallelism.tensor_parallel_degree must be 1 with the override momoe_router")
        if self._debug_force_load_balance:
            return super().forward(x_BLD, expert_bias_E)
        logits_TE = float32_product(x_BLD.flatten(0, 1), _local(self.gate.weight))
        if self.gate.bias is not None:
            logits_TE = logits_TE + _local(self.gate.bias).float()
        how = self.top_k, self.score_func, self.route_norm, self.route_scale
        groups = self.num_expert_groups or 1, self.num_limited_groups or 1
        if self.num_expert_groups is None:
            scores_TK, ids_TK = route_tokens(logits_TE, expert_bias_E, *how)
        else:
            scores_TK, ids_TK = route_in_groups(logits_TE, expert_bias_E, *how, *groups)
        if self.tokens_per_expert is not None and feeds_balancing(self):
            accumulate_counts(self.tokens_per_expert, count_experts(ids_TK, self.num_experts))
            if self.margins_EB is not None and expert_bias_E is not None:
                of_token = x_BLD.detach().flatten(0, 1), logits_TE.detach(), expert_bias_E, ids_TK, self.score_func
                how_many = {"num_groups": groups[0], "num_limited_groups": groups[1]}
                accumulate_margins(self.margins_EB, self.input_sum_C, *of_token, **how_many)
        scores_BLK, ids_BLK, logits_BLE = (t.unflatten(0, x_BLD.shape[:2]) for t in (scores_TK, ids_TK, logits_TE))
        return scores_BLK, ids_BLK, logits_BLE


@override(target=TokenChoiceTopKRouter.Config, exact=True, description="Routers that count for momoe_balancing")
def momoe_router(cfg: TokenChoiceTopKRouter.Config) -> MomoeRouter.Config:
    """The override: routers with our choice of experts. Does not balance by itself: name momoe_balancing too."""
    return derive(cfg, MomoeRouter.Config)


class _Layer:
    """A layer of TorchTitan 0.3 that has a bias, as a `moe.load_balancer.BalancedLayer`."""

    def __init__(self, moe: MoE, config: "BalancingOptimizers.Config"):
        self.moe, self.router = moe, moe.router
        self.num_experts: int = moe.router.num_experts
        self.load_balance_rate = config.load_balance_rate
        self.load_balance_rule = config.load_balance_rule
        self.load_balance_average = config.load_balance_average
        self.router.count(self.load_balance_rule if self.load_balance_rate else "", self.expert_bias.device)

    @property
    def tokens_per_expert(self) -> torch.Tensor:
        return self.router.tokens_per_expert

    @property
    def expert_bias(self) -> torch.Tensor:
        return _local(self.moe.expert_bias_E)


class BalancingOptimizers(OptimizersContainer):
    """TorchTitan's optimizers, whose step moves the experts' biases by our rules.

    TorchTitan's own hook runs after ours, finds no token counted, and moves nothing.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Those of TorchTitan's, and the fields of [momoe] of these names."""

        load_balance_rule: str = Momoe.load_balance_rule
        load_balance_rate: float = Momoe.load_balance_rate
        load_balance_average: float = Momoe.load_balance_average

    def __init__(self, config: Config, *, model_parts: list[nn.Module]):
        super().__init__(config, model_parts=model_parts)
        self.layers = []
        for moe in (module for part in model_parts for module in part.modules() if isinstance(module, MoE)):
            if not isinstance(moe.router, MomoeRouter):
                raise ValueError(
                    f"the override momoe_balancing needs momoe_router beside it, found {type(moe.router).__qualname__}"
                )
            if moe.load_balance_coeff is not None:
                self.layers.append(_Layer(moe, config))
        self.load_balancer = LoadBalancer(self.layers, _groups(self.layers))
        self.register_step_pre_hook(self._balance)
        self.register_step_post_hook(self.load_balancer.follow_gates)

    @torch.no_grad()
    def _balance(self, *of_hook: Any) -> None:
        self.load_balancer(*of_hook)
        for layer in self.layers:
            _local(layer.moe.tokens_per_expert_E).zero_()


@override(target=OptimizersContainer.Config, exact=True, description="Load balancing by momoe_titan's rules")
def momoe_balancing(
    cfg: OptimizersContainer.Config,
    load_balance_rule: str = Momoe.load_balance_rule,
    load_balance_rate: float = Momoe.load_balance_rate,
    load_balance_average: float = Momoe.load_balance_average,
) -> BalancingOptimizers.Config:
    """The override: the experts' biases moved by our rules, of the layers that TorchTitan would balance.

    Args:
        load_balance_rule, load_balance_rate, load_balance_average: the fields of [momoe] of these names.

    Raises:
        ValueError: another rule, or a number out of its range.
    """
    if load_balance_rule not in BALANCE_RULES:
        raise ValueError(f"load_balance_rule is {load_balance_rule!r}, must be one of {BALANCE_RULES}")
    if not 0 <= load_balance_rate < float("inf"):
        raise ValueError(f"load_balance_rate is {load_balance_rate}, must be a finite number of at least 0")
    if not 0 < load_balance_average <= 1:
        raise ValueError(f"load_balance_average is {load_balance_average}, must be above 0 and at most 1")
    fields = {
        "load_balance_rule": load_balance_rule,
        "load_balance_rate": float(load_balance_rate),
        "load_balance_average": float(load_balance_average),
    }
    return derive(cfg, BalancingOptimizers.Config, **fields)


def _groups(layers: list[_Layer]) -> list[ProcessGroup]:
    """The ranks that have tokens of their own, over which FSDP divides or copies a gate: one group per dimension."""
    gates = [layer.router.gate.weight for layer in layers]
    if not gates or not isinstance(gates[0], DTensor):
        return []
    mesh = gates[0].device_mesh
    return [mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1]


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
