"""Combine: sums the K expert outputs of each token, always in the order of its K choices."""

import torch
import triton
import triton.language as tl

from momoe_titan.kernels.launch import cdiv, launch, next_power_of_2
from momoe_titan.kernels.routing import RoutingMetadata

# Tile size: 1024 elements, i.e. 16 bytes for each of 128 threads when rows are 16-bit. 256 columns suit every
# range of columns that the layer is computed in, so a new number of tokens, which may change the number of ranges,
# compiles nothing.
_BLOCK_D = 256
_ELEMENTS = 1024


@triton.jit(do_not_specialize=["num_tokens"])
def _combine_kernel(
    rows_ptr,
    row_ptr,
    scores_ptr,
    out_ptr,
    ids_ptr,
    bias_ptr,
    num_tokens,
    D,
    row_stride,
    out_stride,
    bias_stride,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T) * cdiv(D, BLOCK_D),). out[t] = sum_k (scores[t, k]) * (rows[row[t, k]] + bias[ids[t, k]]).

    A slot with row -1 adds nothing.
    """
    num_d = tl.cdiv(D, BLOCK_D)  # programs of one token block are neighbours, so a row is read contiguously
    tokens = (tl.program_id(0) // num_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(0) % num_d * BLOCK_D + tl.arange(0, BLOCK_D)
    live = tokens < num_tokens
    inside = (cols < D)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + tokens * K + k, mask=live, other=-1).to(tl.int64)
        ptrs = rows_ptr + row[:, None] * row_stride + cols[None, :]
        value = tl.load(ptrs, mask=(row >= 0)[:, None] & inside, other=0.0).to(tl.float32)
        if BIASED:
            expert = tl.load(ids_ptr + tokens * K + k, mask=row >= 0, other=0).to(tl.int64)
            bias = bias_ptr + expert[:, None] * bias_stride + cols[None, :]
            value += tl.load(bias, mask=(row >= 0)[:, None] & inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            score = tl.load(scores_ptr + tokens * K + k, mask=row >= 0, other=0.0).to(tl.float32)
            acc += score[:, None] * value
        else:
            acc += value
    out_ptrs = out_ptr + tokens[:, None] * out_stride + cols[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & inside)


def combine(
    rows_RD: torch.Tensor,
    routing: RoutingMetadata,
    scores_TK: torch.Tensor | None,
    out_TD: torch.Tensor,
    biases: tuple[torch.Tensor, torch.Tensor] | None = None,
    first: int = 0,
) -> None:
    """out_TD = sum over slots of rows_RD[row_TK], times the scores if given; float32 inside.

    Args:
        rows_RD, out_TD: rows contiguous; may be column slices of wider tensors.
        biases: ids_TK and a bias (E, D) of each expert that is added to its rows, maybe a column slice too.
        first: the token that is row 0 of out_TD, which may have fewer rows than there are tokens.
    """
    ids_TK, bias_ED = biases or (routing.row_TK, rows_RD)
    num_tokens, d_model = out_TD.shape
    row_TK = routing.row_TK
    if first:
        row_TK, ids_TK = row_TK[first:], ids_TK[first:]
        scores_TK = None if scores_TK is None else scores_TK[first:]
    block_d = min(next_power_of_2(d_model), _BLOCK_D)
    block_t = _ELEMENTS // block_d
    launch(
        _combine_kernel,
        (cdiv(num_tokens, block_t) * cdiv(d_model, block_d),),
        rows_RD,
        row_TK,
        scores_TK if scores_TK is not None else rows_RD,
        out_TD,
        ids_TK,
        bias_ED,
        num_tokens,
        d_model,
        rows_RD.stride(0),
        out_TD.stride(0),
        bias_ED.stride(0),
        K=row_TK.shape[1],
        WEIGHTED=scores_TK is not None,
        BIASED=biases is not None,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_slots"])
def _score_grad_kernel(
    dscore_ptr, row_ptr, out_ptr, num_slots, NUM_N: tl.constexpr, N_POW2: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (cdiv(T * K, BLOCK),). out[slot] = sum of dscore[row[slot], :], or 0 for an unused slot."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, N_POW2)
    row = tl.load(row_ptr + slots, mask=slots < num_slots, other=-1).to(tl.int64)
    mask = (row >= 0)[:, None] & (n < NUM_N)[None, :]
    parts = tl.load(dscore_ptr + row[:, None] * NUM_N + n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + slots, tl.sum(parts, axis=1).to(out_ptr.dtype.element_ty), mask=slots < num_slots)


def score_grad(dscore: torch.Tensor, routing: RoutingMetadata, dscores_TK: torch.Tensor) -> None:
    """dscores_TK from the partial sums (R, N) of down_proj_backward."""
    num_slots, num_n = dscores_TK.numel(), dscore.shape[1]
    launch(
        _score_grad_kernel,
        (cdiv(num_slots, 128),),
        dscore,
        routing.row_TK,
        dscores_TK,
        num_slots,
        NUM_N=num_n,
        N_POW2=next_power_of_2(num_n),
        BLOCK=128,
    )
