"""Our experts in the MoE models of TorchTitan 0.3, by its overrides.

    python -m torchtitan.train --module qwen3 --config qwen3_30b_a3b \
        --override.imports 'momoe_titan.adapters.torchtitan_03.momoe_experts={"save_percent": 50}'

Parameters keep their names, shapes and layout. Routing, load balancing and the exchange of expert parallelism stay
TorchTitan's. This module needs TorchTitan 0.3 and nothing of this package but its kernels; the rest of the package is
for TorchTitan 0.2.2.
"""

# An environment has one TorchTitan, and type checks run beside 0.2.2.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIncompatibleMethodOverride=false

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher

from momoe_titan.kernels import momoe_grouped_mlp, momoe_mlp
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


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight
