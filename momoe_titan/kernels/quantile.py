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

Where a token takes its experts from few groups, an expert has to pass two cutoffs: its own among the experts of the
taken groups, and its group's among the groups (see `group_margins`).
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


def _count_margins_ref(logits_TE, bias_E, ids_TK, histogram_EB, score_func, num_groups=1, num_limited_groups=1):
    largest = torch.finfo(torch.float32).max
    logits_TE = logits_TE.clamp(-largest, largest)
    choice_TE = (logits_TE.sigmoid() if score_func == "sigmoid" else logits_TE.softmax(dim=1)) + bias_E
    chosen_TE = torch.zeros_like(choice_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
    if num_groups > num_limited_groups:
        rise_TE = group_margins(choice_TE, ids_TK.shape[1], num_groups, num_limited_groups)
        margin_TE = torch.where(chosen_TE, -rise_TE, rise_TE).clamp(min=0)
    else:
        last_T1 = choice_TE.masked_fill(~chosen_TE, float("inf")).amin(dim=1, keepdim=True)
        first_left_T1 = choice_TE.masked_fill(chosen_TE, float("-inf")).amax(dim=1, keepdim=True)
        cutoff_T1 = 0.5 * (last_T1 + first_left_T1)
        margin_TE = torch.where(chosen_TE, choice_TE - cutoff_T1, cutoff_T1 - choice_TE).clamp(min=0)
    place_TE = ((margin_TE.view(torch.int32) >> _SHIFT.value) - _FIRST.value).clamp(0, _HALF.value - 1)
    index_TE = torch.where(chosen_TE, _HALF.value - 1 - place_TE, _HALF.value + place_TE).long()
    counted_T1 = ~choice_TE.isnan().any(dim=1, keepdim=True)
    ones_TE = counted_T1.to(histogram_EB.dtype).expand_as(index_TE)
    histogram_EB.t().scatter_add_(0, index_TE, ones_TE)


def group_margins(choice_TE: Tensor, top_k: int, num_groups: int, num_limited_groups: int) -> Tensor:
    """Each token's margin from each expert, where it takes its experts from few groups (`moe.router.route_in_groups`).

    The larger one of two. The expert's own: how far it is below the cutoff among the experts that compete where its
    group is taken, which are those of this group and of the best other ones. The cutoff lies halfway between the last
    that would be chosen and the first that would not. And its group's: how far the group's score is below the cutoff
    among the groups, halfway between the last that is taken and the first that is not. Hence a margin below zero
    belongs to a chosen expert, as it does without groups, and biases at which every expert has its even share have
    K/E quantiles of 0.

    The group's margin is that of its score, whatever part of it the one expert is: all experts of a group that is
    taken too seldom rise together. What each of them would need alone, which can be computed too, moves them too far:
    the rule then does not settle where groups compete more than experts do.

    Args:
        choice_TE: score plus bias, float32.
        top_k: K, at most the experts of the taken groups.
        num_groups: a divisor of E, with at least two experts in a group.
        num_limited_groups: how many groups are taken, fewer than num_groups.

    Returns:
        (T, E), in plain torch. Does not wait for the device.
    """
    lowest = float("-inf")
    choice_TGe = choice_TE.unflatten(1, (num_groups, -1))
    best_TGb = choice_TGe.topk(min(top_k + 1, choice_TGe.shape[2]), dim=2).values
    scores_TG = best_TGb[:, :, :2].sum(dim=2)
    sorted_TG, order_TG = scores_TG.sort(dim=1, descending=True, stable=True)
    last, rest = num_limited_groups - 1, num_limited_groups
    group_cutoff_T1 = 0.5 * (sorted_TG[:, last, None] + sorted_TG[:, rest, None])
    # Who competes where a group is taken: it, and the groups that are taken in any case. Of a group that is taken that
    # is all taken ones, which are those in any case and the last.
    others_TX = best_TGb.gather(1, order_TG[:, :last, None].expand(-1, -1, best_TGb.shape[2])).flatten(1)
    rivals_TGX = torch.cat([others_TX[:, None].expand(-1, num_groups, -1), best_TGb], dim=2)
    missing = max(0, top_k + 1 - rivals_TGX.shape[2])
    rivals_TGX = torch.nn.functional.pad(rivals_TGX, (0, missing), value=lowest)
    two_TG2 = rivals_TGX.topk(top_k + 1, dim=2).values[:, :, -2:]
    two_of_taken_T12 = two_TG2.gather(1, order_TG[:, last, None, None].expand(-1, -1, 2))
    taken_TG = torch.zeros_like(scores_TG, dtype=torch.bool).scatter_(1, order_TG[:, :rest], True)
    cutoff_TG = torch.where(taken_TG[:, :, None], two_of_taken_T12, two_TG2).mean(dim=2)
    own_TGe = cutoff_TG[:, :, None] - choice_TGe
    return torch.maximum(own_TGe, (group_cutoff_T1 - scores_TG)[:, :, None]).flatten(1)


@on_its_device
def count_margins(
    logits_TE: Tensor,
    bias_E: Tensor,
    ids_TK: Tensor,
    histogram_EB: Tensor,
    score_func: str,
    *,
    num_groups: int = 1,
    num_limited_groups: int = 1,
) -> None:
    """Add each token's margin from each expert to the expert's histogram, in place.

    Tokens with a NaN are left out.

    Args:
        logits_TE: float32, contiguous rows.
        bias_E: float32, what the choice was made with.
        ids_TK: int64, the chosen experts; K below E.
        histogram_EB: int32 (E, NUM_BINS).
        score_func: "sigmoid", "softmax" or "softmax_of_chosen", as in `route`.
        num_groups, num_limited_groups: of experts, and how many of them a token takes (`group_margins`).
    """
    of_choice = logits_TE, bias_E, ids_TK.contiguous(), histogram_EB, score_func
    if num_groups > num_limited_groups or not runs_here(logits_TE):
        _count_margins_ref(*of_choice, num_groups, num_limited_groups)
    else:
        _count_margins(*of_choice)


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
