"""Adds up the entropy of the router's scores, where a number on the device says so."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels.launch import cdiv, launch, next_power_of_2, on_its_device
from momoe_titan.kernels.router import runs_here

_BLOCK = 2048  # scores that one program of 4 warps holds
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit(do_not_specialize=["num_tokens"])
def _entropy_kernel(
    scores_ptr, stride, wanted_ptr, parts_ptr, num_tokens, E: tl.constexpr, E_POW2: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Grid (cdiv(T, BLOCK_T),). parts[program] = the sum of its tokens' entropies in nats, where wanted is not 0."""
    if tl.load(wanted_ptr) != 0:
        tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        cols = tl.arange(0, E_POW2)
        mask = (tokens < num_tokens)[:, None] & (cols < E)[None, :]
        scores = tl.load(scores_ptr + tokens.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)
        total = tl.maximum(tl.sum(scores, axis=1), _TINY)
        p = scores / total[:, None]
        terms = tl.where(p == 0, 0.0, p * tl.log(p))  # a NaN stays one
        tl.store(parts_ptr + tl.program_id(0), -tl.sum(tl.where(mask, terms, 0.0)))


@triton.jit(do_not_specialize=["num_parts", "num_tokens"])
def _add_entropy_kernel(parts_ptr, wanted_ptr, total_ptr, num_parts, num_tokens, unit, BLOCK: tl.constexpr):
    """One program. Adds the parts, in units of `unit` nats, and the number of tokens to total, where wanted."""
    if tl.load(wanted_ptr) != 0:
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, num_parts, BLOCK):
            index = start + tl.arange(0, BLOCK)
            total += tl.load(parts_ptr + index, mask=index < num_parts, other=0.0)
        tl.store(total_ptr, tl.load(total_ptr) + tl.sum(total) / unit)
        tl.store(total_ptr + 1, tl.load(total_ptr + 1) + num_tokens.to(tl.float32))


@on_its_device
def _add_entropy(total_2: Tensor, scores_TE: Tensor, wanted: Tensor) -> None:
    num_tokens, num_experts = scores_TE.shape
    e_pow2 = max(2, next_power_of_2(num_experts))
    block_t = max(1, _BLOCK // e_pow2)
    num_parts = cdiv(num_tokens, block_t)
    if not num_parts:
        return
    parts = torch.empty(num_parts, dtype=torch.float32, device=scores_TE.device)
    launch(
        _entropy_kernel,
        (num_parts,),
        scores_TE,
        scores_TE.stride(0),
        wanted,
        parts,
        num_tokens,
        E=num_experts,
        E_POW2=e_pow2,
        BLOCK_T=block_t,
        num_warps=4,
    )
    unit = math.log(max(2, num_experts))
    launch(_add_entropy_kernel, (1,), parts, wanted, total_2, num_parts, num_tokens, unit, BLOCK=1024, num_warps=4)


def _add_entropy_ref(total_2: Tensor, scores_TE: Tensor, wanted: Tensor) -> None:
    tokens, num_experts = scores_TE.shape
    p_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
    total_2[0] += wanted * torch.special.entr(p_TE).sum() / math.log(max(2, num_experts))
    total_2[1] += wanted * tokens


def add_entropy(total_2: Tensor, scores_TE: Tensor, wanted: Tensor) -> None:
    """Add the sum of the tokens' entropies and the number of tokens to total_2, in place, where `wanted` is 1.

    The entropy of a token is that of its scores, divided by their sum, in units of ln E: 1 where all experts score
    alike, 0 where one expert has everything. The host does not wait for the device.

    Args:
        total_2: float32.
        scores_TE: float32, contiguous rows, not negative.
        wanted: float32 without dimensions, on the same device: 1 or 0.
    """
    (_add_entropy if runs_here(scores_TE) else _add_entropy_ref)(total_2, scores_TE, wanted)
