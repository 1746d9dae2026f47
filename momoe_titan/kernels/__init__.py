"""Fused SwiGLU-MoE kernels behind one autograd op. README.md has the letters, the derivation and the memory table."""

from .autograd import BACKENDS, momoe_mlp, num_saved_rows, resolve_backend, validate_save_percent
from .grouping import TokenGroups, count_slots, group_tokens
from .reference import momoe_mlp_ref

__all__ = [
    "BACKENDS",
    "TokenGroups",
    "count_slots",
    "group_tokens",
    "momoe_mlp",
    "momoe_mlp_ref",
    "num_saved_rows",
    "resolve_backend",
    "validate_save_percent",
]
