"""Fused SwiGLU-MoE kernels behind one autograd op. README.md has the letters, the derivation and the memory table."""

from momoe_titan.kernels.activations import ACTIVATIONS
from momoe_titan.kernels.experts import ORDERS
from momoe_titan.kernels.grouped import momoe_grouped_mlp
from momoe_titan.kernels.grouping import TokenGroups, count_slots, group_tokens
from momoe_titan.kernels.op import BACKENDS, momoe_mlp, resolve_backend
from momoe_titan.kernels.reference import momoe_mlp_ref

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "ORDERS",
    "TokenGroups",
    "count_slots",
    "group_tokens",
    "momoe_grouped_mlp",
    "momoe_mlp",
    "momoe_mlp_ref",
    "resolve_backend",
]
