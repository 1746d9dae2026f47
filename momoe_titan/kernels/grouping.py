"""For expert parallelism: lists, sorted by group, one row per token and group of experts that it chose from.

What expert parallelism sends: the groups are the ranks of the chosen experts. Gathering tokens into
rows and summing rows into tokens are each other's backward.
"""

from dataclasses import dataclass

import torch

from momoe_titan.kernels import combine, reference
from momoe_titan.kernels.routing import (
    RoutingMetadata,
    build_routing,
    build_routing_ref,
    histogram,
    unpack_routing,
)

_TILE_ROWS = 128  # build_routing needs a tile size; the tiles are not used


@dataclass(frozen=True)
class TokenGroups:
    """Rows of one group are contiguous and in the order of their tokens.

    Example: T=3, K=3, G=2, groups = [[1, 0, 1], [0, 0, 0], [1, -1, 1]]: row 0 is token 0 and row 1
    token 1, both of group 0; rows 2 and 3 are tokens 0 and 2 of group 1. counts_G = [2, 2].
    """

    routing: RoutingMetadata  # sorts slots by group; if a token has several slots of a group, only the first is used
    counts_G: torch.Tensor  # int64: tokens, thus rows, of each group
    backend: str  # "triton" or "torch"

    def gather(self, x_TD: torch.Tensor, num_rows: int) -> torch.Tensor:
        """x_TD -> (num_rows, D): the token of each row. num_rows is the sum of counts_G."""
        return _Gather.apply(x_TD, self, num_rows)

    def sum(self, rows_RD: torch.Tensor) -> torch.Tensor:
        """(R, D) -> (T, D): the sum of each token's rows, in slot order and float32; zeros for a token without any."""
        return _Sum.apply(rows_RD, self)

    def _gather(self, x_TD: torch.Tensor, num_rows: int) -> torch.Tensor:
        return x_TD.index_select(0, self.routing.token_R[:num_rows])

    def _sum(self, rows_RD: torch.Tensor) -> torch.Tensor:
        if self.backend == "torch":
            return reference.combine(rows_RD, self.routing, None)
        out_TD = rows_RD.new_empty(self.routing.row_TK.shape[0], rows_RD.shape[1])
        combine.combine(rows_RD.contiguous(), self.routing, None, out_TD)
        return out_TD


# Both keep `groups` themselves and not through save_for_backward, so that a recomputed forward may
# stop before it gets here.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, groups, num_rows):
        ctx.groups = groups
        return groups._gather(x_TD, num_rows)

    @staticmethod
    def backward(ctx, drows_RD):
        return ctx.groups._sum(drows_RD), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD, groups):
        ctx.groups, ctx.num_rows = groups, rows_RD.shape[0]
        return groups._sum(rows_RD)

    @staticmethod
    def backward(ctx, dout_TD):
        return ctx.groups._gather(dout_TD, ctx.num_rows), None


@torch.no_grad()
def group_tokens(groups_TK: torch.Tensor, num_groups: int, backend: str) -> TokenGroups:
    """Sort tokens by the groups they name.

    Args:
        groups_TK: int32 or int64. A token that names a group more than once is in it once; a group
            outside ``[0, num_groups)`` is none.
        num_groups: G.
        backend: "triton" or "torch".
    """
    same_TKK = groups_TK[:, :, None] == groups_TK[:, None, :]
    named_before_TK = same_TKK.tril(-1).any(-1)
    groups_TK = groups_TK.masked_fill(named_before_TK, -1)
    build = build_routing_ref if backend == "torch" else build_routing
    packed, counts_G = build(groups_TK, None, num_groups, _TILE_ROWS)
    num_tokens, num_chosen = groups_TK.shape
    return TokenGroups(unpack_routing(packed, num_tokens, num_chosen, num_groups, _TILE_ROWS), counts_G, backend)


@torch.no_grad()
def count_slots(ids_TK: torch.Tensor, num_experts: int, backend: str) -> torch.Tensor:
    """Slots that name each expert, int64 (E); ids outside ``[0, E)`` are not counted."""
    if backend == "torch":
        ids = ids_TK[(ids_TK >= 0) & (ids_TK < num_experts)]
        return ids.bincount(minlength=num_experts)
    return histogram(ids_TK.contiguous(), num_experts).sum(dim=1)
