"""Gradients of the biases of both products. Sums go by row tiles first and then over an expert's tiles, in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels.launch import cdiv, launch, next_power_of_2
from momoe_titan.kernels.portable.blocks import tile_span
from momoe_titan.kernels.routing import RoutingMetadata, _count_before

_COLS = 64  # columns of a program, or of a step of one


@triton.jit
def _output_bias_kernel(
    dout_ptr,
    bias_ptr,
    score_ptr,
    sums_ptr,
    dot_ptr,
    token_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (max_tiles,). A program owns a row tile.

    sums (tiles, D) float32 = sum over its rows of score * dout[token], or if not WEIGHTED of dout[token]
    dot (R,) float32 = <dout[token], bias[expert]>
    """
    tile = tl.program_id(0)
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, row0, end = tile_span(tiles_ptr, offsets_ptr, tile, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues] - jit
    rows = row0 + tl.arange(0, BLOCK_M)
    live = rows < end
    token = tl.load(token_ptr + rows, mask=live, other=0).to(tl.int64)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    if WEIGHTED:
        score = tl.load(score_ptr + rows, mask=live, other=0.0)
    for first in range(0, D, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        mask = live[:, None] & (cols < D)[None, :]
        dout = tl.load(dout_ptr + token[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + expert * D + cols, mask=cols < D, other=0.0).to(tl.float32)
        dot += tl.sum(dout * bias[None, :], axis=1)
        if WEIGHTED:
            dout *= score[:, None]
        tl.store(sums_ptr + tile.to(tl.int64) * D + cols, tl.sum(dout, axis=0), mask=cols < D)
    tl.store(dot_ptr + rows, dot, mask=live)


def output_bias_backward(
    dout_TD: Tensor, bias2_ED: Tensor, routing: RoutingMetadata, weighted: bool
) -> tuple[Tensor, Tensor]:
    """For each row tile the sums of its rows' gradients of bias2 (tiles, D), and <dout, bias2> of each row (R,).

    Args:
        weighted: whether the output of a row was multiplied with its score.
    """
    d_model = dout_TD.shape[1]
    sums = dout_TD.new_empty(routing.max_tiles, d_model, dtype=torch.float32)
    dot_R = dout_TD.new_empty(routing.token_R.shape[0], dtype=torch.float32)
    launch(
        _output_bias_kernel,
        (routing.max_tiles,),
        dout_TD,
        bias2_ED,
        routing.score_R,
        sums,
        dot_R,
        routing.token_R,
        routing.offsets_E1,
        routing.tiles,
        routing.num_tiles,
        D=d_model,
        WEIGHTED=weighted,
        BLOCK_M=routing.tile_rows,
        BLOCK=_COLS,
        num_warps=4,
    )
    return sums, dot_R


@triton.jit(do_not_specialize=["num_saved", "first"])
def _row_sums_kernel(
    saved_ptr,
    rest_ptr,
    sums_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_saved,
    first,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (max_tiles * cdiv(N, BLOCK),). sums (tiles, N) float32 = sums over the rows of a tile.

    A tile that ends at or before num_saved lies in saved, any other in rest, whose first row is row `first`.
    """
    NUM_N: tl.constexpr = (N + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) // NUM_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, row0, end = tile_span(tiles_ptr, offsets_ptr, tile, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues] - jit
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % NUM_N * BLOCK + tl.arange(0, BLOCK)
    is_saved = tl.minimum(row0 + BLOCK_M, end) <= num_saved
    base = tl.where(is_saved, saved_ptr, rest_ptr)
    at = rows.to(tl.int64) - tl.where(is_saved, 0, first)
    mask = (rows < end)[:, None] & (cols < N)[None, :]
    values = tl.load(base + at[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tile.to(tl.int64) * N + cols, tl.sum(values, axis=0), mask=cols < N)


def row_sums(saved: Tensor, rest: Tensor, num_saved: int, first: int, routing: RoutingMetadata) -> Tensor:
    """(tiles, N) float32: the sums over the rows of each row tile; the rows lie in two buffers as `SplitRows` says."""
    width = rest.shape[1]
    sums = rest.new_empty(routing.max_tiles, width, dtype=torch.float32)
    launch(
        _row_sums_kernel,
        (routing.max_tiles * cdiv(width, _COLS),),
        saved,
        rest,
        sums,
        routing.offsets_E1,
        routing.tiles,
        routing.num_tiles,
        num_saved,
        first,
        N=width,
        BLOCK_M=routing.tile_rows,
        BLOCK=_COLS,
        num_warps=4,
    )
    return sums


@triton.jit
def _sum_tiles_kernel(
    sums_ptr,
    counts_ptr,
    out_ptr,
    N: tl.constexpr,
    E: tl.constexpr,
    E_POW2: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (E, cdiv(N, BLOCK)). out (E, N) = sum over the tiles of expert e of sums (tiles, N), in a fixed order."""
    expert = tl.program_id(0)
    experts = tl.arange(0, E_POW2)
    counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    begin = _count_before(tiles, experts, expert)
    end = _count_before(tiles, experts, expert + 1)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((TILES, BLOCK), tl.float32)
    for first in range(begin, end, TILES):
        tile = first + tl.arange(0, TILES)
        mask = (tile < end)[:, None] & (cols < N)[None, :]
        acc += tl.load(sums_ptr + tile.to(tl.int64)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    out_ptrs = out_ptr + expert.to(tl.int64) * N + cols
    tl.store(out_ptrs, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=cols < N)


def sum_tiles(sums: Tensor, routing: RoutingMetadata, out_EN: Tensor) -> None:
    """out_EN = the sums over each expert's row tiles; zeros for an expert without rows.

    Args:
        sums: (tiles, N) float32.
        out_EN: output, contiguous.
    """
    num_experts, width = out_EN.shape
    launch(
        _sum_tiles_kernel,
        (num_experts, cdiv(width, _COLS)),
        sums,
        routing.counts_E,
        out_EN,
        N=width,
        E=num_experts,
        E_POW2=max(2, next_power_of_2(num_experts)),
        TILE_ROWS=routing.tile_rows,
        TILES=16,
        BLOCK=_COLS,
        num_warps=4,
    )
