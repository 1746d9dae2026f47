"""Rotary embeddings: without complex numbers for compilers, and with YaRN's frequencies as transformers has them."""

import math
from dataclasses import dataclass

import torch
from torchtitan.models.llama3.model.model import apply_rotary_emb


def rotate(
    xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with rotary embeddings, computed in float32.

    As TorchTitan's `apply_rotary_emb`, which multiplies complex numbers: where torch.compile traces, which has no
    kernels for them, the same is done with real numbers, in one kernel.

    Args:
        xq, xk: (B, L, heads, head_dim).
        freqs_cis: (at least L, head_dim / 2) complex64.
        positions: (1, L) or (B, L) rows of freqs_cis; None for the first L.
    """
    if not torch.compiler.is_compiling():
        return apply_rotary_emb(xq, xk, freqs_cis=freqs_cis, positions=positions)
    cos_sin = torch.view_as_real(freqs_cis)
    cos_sin = cos_sin[: xq.shape[1]][None] if positions is None else cos_sin[positions]
    cos, sin = cos_sin[:, :, None].unbind(-1)
    return _rotate_pairs(xq, cos, sin), _rotate_pairs(xk, cos, sin)


def _rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


@dataclass
class YarnArgs:
    """YaRN (arXiv 2309.00071): positions of long wavelengths are interpolated, those of short ones are not.

    Args:
        factor: by which the context is stretched.
        original_max_position_embeddings: the context that the model was trained on before.
        attention_factor: multiplies queries and keys.
        beta_fast, beta_slow: turns within the original context, above which a frequency stays as it is, and
            below which it is divided by the factor.
        truncate: round the bounds between the two to whole columns.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """The attention factor that a configuration means which gives none."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return of(mscale) / of(mscale_all_dim) if mscale and mscale_all_dim else of(1)


def precompute_yarn_freqs_cis(head_dim: int, length: int, theta: float, args: YarnArgs) -> torch.Tensor:
    """(length, head_dim / 2) complex numbers, in place of `precompute_freqs_cis` of TorchTitan's llama."""
    wavelengths = theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    low, high = _blended_columns(head_dim, theta, args)
    blend = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    freqs = 1 / (args.factor * wavelengths) * blend + 1 / wavelengths * (1 - blend)
    angles = torch.outer(torch.arange(length).float(), freqs)
    return torch.polar(torch.full_like(angles, args.attention_factor), angles)


def _blended_columns(head_dim: int, theta: float, args: YarnArgs) -> tuple[float, float]:
    """The first and the last pair of columns whose frequency is neither kept nor divided as a whole."""

    def column(turns: float) -> float:
        per_turn = args.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(per_turn) / (2 * math.log(theta))

    low, high = column(args.beta_fast), column(args.beta_slow)
    if args.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return (low, high + 0.001) if low == high else (low, high)
