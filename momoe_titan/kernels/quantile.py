"""Counts, for quantile balancing, how far each token is from choosing each expert.

The margin of a token and an expert says how far the expert's bias would have to rise for the token
to choose the expert: cutoff - (score + bias), with the cutoff halfway between the last expert that
the token chose and the first that it did not. A margin below zero belongs to a chosen expert. The
K/E quantile of an expert's margins is the change of its bias that gives the expert its fair share
of these tokens (see `momoe_titan.moe.balancing`).

A histogram has NUM_BINS counters, the first half for chosen experts. Bins are as floating-point
numbers are: SUB_BINS of equal width between one power of two and the next, from MIN_EXPONENT on.
Their width is thus relative to the margin, and the same bins serve sigmoid scores, softmax scores
over any number of experts, a first rough correction and a last fine one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels.launch import cdiv, launch, on_its_device
from momoe_titan.kernels.router import (
    SIGMOID,
    SOFTMAX,
    _clamp,
    _load_logits,
    _options,
    _softmax,
    runs_here,
)

MIN_EXPONENT, MAX_EXPONENT = -22, 2  # margins of 4 and more share the outermost bin, of 2^-22 and less the innermost
SUB_BINS = 8
NUM_BINS = 2 * SUB_BINS * (MAX_EXPONENT - MIN_EXPONENT)

_SHIFT = tl.constexpr(20)  # leaves the exponent and the first log2(SUB_BINS) bits of the fraction of a float32
_FIRST = tl.constexpr((127 + MIN_EXPONENT) * SUB_BINS)
_HALF = tl.constexpr(NUM_BINS // 2)


def bin_edges(device: torch.device | str | None = None) -> Tensor:
    """The NUM_BINS + 1 bounds of the bins in rising order, float64; the middle one is 0."""
    bits = torch.arange(_FIRST.value + 1, _FIRST.value + _HALF.value + 1, dtype=torch.int32, device=device)
    above = (bits << _SHIFT.value).view(torch.float32).double()
    return torch.cat([-above.flip(0), above.new_zeros(1), above])


@triton.jit(do_not_specialize=["num_tokens"])
def _count_margins_kernel(
    logits_ptr,
    stride,
    bias_ptr,
    ids_ptr,
    histogram_ptr,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    FUNC: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T),). A program owns BLOCK_T tokens and all their logits.

    Reads the chosen ids in place of choosing again. Adds one to a counter of histogram (E, NUM_BINS)
    int32 per token and expert, but nothing for a token with a NaN. Integer additions: the order of
    the programs changes nothing.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tokens < num_tokens
    cols = tl.arange(0, E_POW2)
    live = (cols < E)[None, :]
    logits = _clamp(_load_logits(logits_ptr, stride, tokens, num_tokens, cols, E))
    scores = tl.sigmoid(logits) if FUNC == SIGMOID else _softmax(logits, live)
    choice = scores + tl.load(bias_ptr + cols, mask=cols < E, other=0.0)[None, :]
    is_chosen = tl.zeros((BLOCK_T, E_POW2), tl.int32)
    for k in range(K):
        expert = tl.load(ids_ptr + tokens.to(tl.int64) * K + k, mask=rows, other=0).to(tl.int32)
        is_chosen = tl.where(cols[None, :] == expert[:, None], 1, is_chosen)
    chosen = is_chosen != 0
    is_nan = tl.sum(tl.where(live & (choice != choice), 1, 0), axis=1) > 0
    last = tl.min(tl.where(chosen & live, choice, float("inf")), axis=1)
    first_left = tl.max(tl.where(chosen | (cols >= E)[None, :], float("-inf"), choice), axis=1)
    cutoff = (0.5 * (last + first_left))[:, None]
    margin = tl.maximum(tl.where(chosen, choice - cutoff, cutoff - choice), 0.0)
    place = (margin.to(tl.int32, bitcast=True) >> _SHIFT) - _FIRST
    place = tl.minimum(tl.maximum(place, 0), _HALF - 1)
    index = tl.where(chosen, _HALF - 1 - place, _HALF + place)
    counted = (rows & (is_nan == 0))[:, None] & live
    ones = tl.full((BLOCK_T, E_POW2), 1, tl.int32)
    tl.atomic_add(histogram_ptr + cols[None, :] * (2 * _HALF) + index, ones, mask=counted, sem="relaxed")


def _count_margins(logits_TE, bias_E, ids_TK, histogram_EB, score_func):
    num_tokens, num_experts = logits_TE.shape
    options = _options(num_experts, ids_TK.shape[1])
    launch(
        _count_margins_kernel,
        (cdiv(num_tokens, options["BLOCK_T"]),),
        logits_TE,
        logits_TE.stride(0),
        bias_E,
        ids_TK,
        histogram_EB,
        num_tokens,
        FUNC=(SIGMOID if score_func == "sigmoid" else SOFTMAX).value,
        **options,
    )


def _count_margins_ref(logits_TE, bias_E, ids_TK, histogram_EB, score_func):
    largest = torch.finfo(torch.float32).max
    logits_TE = logits_TE.clamp(-largest, largest)
    choice_TE = (logits_TE.sigmoid() if score_func == "sigmoid" else logits_TE.softmax(dim=1)) + bias_E
    chosen_TE = torch.zeros_like(choice_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
    last_T1 = choice_TE.masked_fill(~chosen_TE, float("inf")).amin(dim=1, keepdim=True)
    first_left_T1 = choice_TE.masked_fill(chosen_TE, float("-inf")).amax(dim=1, keepdim=True)
    cutoff_T1 = 0.5 * (last_T1 + first_left_T1)
    margin_TE = torch.where(chosen_TE, choice_TE - cutoff_T1, cutoff_T1 - choice_TE).clamp(min=0)
    place_TE = ((margin_TE.view(torch.int32) >> _SHIFT.value) - _FIRST.value).clamp(0, _HALF.value - 1)
    index_TE = torch.where(chosen_TE, _HALF.value - 1 - place_TE, _HALF.value + place_TE).long()
    counted_T1 = ~choice_TE.isnan().any(dim=1, keepdim=True)
    ones_TE = counted_T1.to(histogram_EB.dtype).expand_as(index_TE)
    histogram_EB.t().scatter_add_(0, index_TE, ones_TE)


@on_its_device
def count_margins(logits_TE: Tensor, bias_E: Tensor, ids_TK: Tensor, histogram_EB: Tensor, score_func: str) -> None:
    """Add each token's margin from each expert to the expert's histogram, in place.

    Tokens with a NaN are left out.

    Args:
        logits_TE: float32, contiguous rows.
        bias_E: float32, what the choice was made with.
        ids_TK: int64, the chosen experts; K below E.
        histogram_EB: int32 (E, NUM_BINS).
        score_func: "sigmoid", "softmax" or "softmax_of_chosen", as in `route`.
    """
    count = _count_margins if runs_here(logits_TE) else _count_margins_ref
    count(logits_TE, bias_E, ids_TK.contiguous(), histogram_EB, score_func)


@triton.jit(do_not_specialize=["num_rows"])
def _add_tokens_kernel(x_ptr, stride, sum_ptr, num_rows, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (cdiv(D, BLOCK_D),). A program owns BLOCK_D entries of sum (D + 1) float32, the first one the last too.

    Rows of x are added in the same order whatever the grid, so that the sum is the same to the bit.
    """
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, num_rows, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
        acc += tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.load(sum_ptr + cols, mask=cols < D, other=0.0) + tl.sum(acc, axis=0)
    tl.store(sum_ptr + cols, total, mask=cols < D)
    if tl.program_id(0) == 0:
        tl.store(sum_ptr + D, tl.load(sum_ptr + D) + num_rows)


@on_its_device
def add_tokens(x_SD: Tensor, input_sum_C: Tensor) -> None:
    """Add the sum of these tokens to the first D entries of input_sum_C, and their number to its last one, in place.

    Args:
        x_SD: any floating dtype; its rows may lie apart.
        input_sum_C: float32, C = D + 1.
    """
    if not runs_here(x_SD) or x_SD.stride(1) != 1:
        input_sum_C[:-1] += x_SD.sum(dim=0, dtype=torch.float32)
        input_sum_C[-1] += x_SD.shape[0]
        return
    _add_tokens(x_SD, input_sum_C)


def _add_tokens(x_SD, input_sum_C):
    num_rows, dim = x_SD.shape
    sizes = {"BLOCK_R": 256, "BLOCK_D": 32}
    grid = (cdiv(dim, sizes["BLOCK_D"]),)
    launch(_add_tokens_kernel, grid, x_SD, x_SD.stride(0), input_sum_C, num_rows, dim, **sizes, num_warps=8)
