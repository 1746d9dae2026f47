"""Backward of the down projection, fused with the backward of SwiGLU and the gradient of the scores."""

import torch
import triton
import triton.language as tl

from momoe_titan.kernels.launch import cdiv, launch
from momoe_titan.kernels.portable.blocks import rows_matmul, tile_span
from momoe_titan.kernels.portable.configs import TileConfig
from momoe_titan.kernels.routing import RoutingMetadata


@triton.jit
def _swiglu_backward(dact, score, rows, end, cols, z_ptr, dz_ptr, act_ptr, F: tl.constexpr):
    """Stores dz and score * act for one block of rows and columns; returns the row sums of dact * act.

    z_ptr has one base pointer for each row.
    """
    mask = (rows < end)[:, None] & (cols < F)[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    offs = rows64 * (2 * F) + cols[None, :]
    up = tl.load(z_ptr[:, None] + offs, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(z_ptr[:, None] + F + offs, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    act = up * silu
    dscore = tl.sum(dact * act, axis=1)
    tl.store(act_ptr + rows64 * F + cols[None, :], (act * score[:, None]).to(act_ptr.dtype.element_ty), mask=mask)
    dact *= score[:, None]
    tl.store(dz_ptr + offs, (dact * silu).to(dz_ptr.dtype.element_ty), mask=mask)
    tl.store(dz_ptr + F + offs, (dact * up * (sigmoid + silu * (1 - sigmoid))).to(dz_ptr.dtype.element_ty), mask=mask)
    return dscore


@triton.jit(do_not_specialize=["num_saved"])
def _down_proj_backward_kernel(
    dout_ptr,
    w2_ptr,
    score_ptr,
    z_saved_ptr,
    dz_ptr,
    act_ptr,
    dscore_ptr,
    token_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_saved,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (max_tiles * cdiv(F, BLOCK_N),). A program owns BLOCK_M rows of one expert and BLOCK_N columns of F.

    dact (unscaled) = dout[token[rows]] @ w2[e]^T
    z from z_saved (S, 2F) for rows below num_saved, else from dz (R, 2F) itself, where it was recomputed
    dscore (R, NUM_N) = row sums of dact * act over the program's columns
    dz = score * dact through SwiGLU, over z; act (R, F) = score * act, for the gradient of w2
    """
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // NUM_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, row0, end = tile_span(tiles_ptr, offsets_ptr, tile, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues] - jit
    rows = row0 + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % NUM_N
    cols = n * BLOCK_N + tl.arange(0, BLOCK_N)
    live_rows = tl.minimum(rows, end - 1)
    dact = rows_matmul(
        dout_ptr,
        tl.load(token_ptr + live_rows).to(tl.int64),
        w2_ptr + expert * (D * F),
        cols,
        cols < F,
        1,
        D,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        F % BLOCK_N == 0,
        PRECISION,
        UPCAST,
    )
    score = tl.load(score_ptr + live_rows)
    z_ptr = tl.where(rows < num_saved, z_saved_ptr, dz_ptr)
    # in two halves: a whole tile of z, act and dz, together with dact, does not fit into the registers
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = tl.split(tl.permute(tl.reshape(dact, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    left_cols = n * BLOCK_N + tl.arange(0, HALF)
    dscore = _swiglu_backward(left, score, rows, end, left_cols, z_ptr, dz_ptr, act_ptr, F)
    dscore += _swiglu_backward(right, score, rows, end, left_cols + HALF, z_ptr, dz_ptr, act_ptr, F)
    tl.store(dscore_ptr + rows.to(tl.int64) * NUM_N + n, dscore, mask=rows < end)


def down_proj_backward(
    config: TileConfig,
    dout_TD: torch.Tensor,
    w2_EFD: torch.Tensor,
    routing: RoutingMetadata,
    z_S2F: torch.Tensor,
    dz_R2F: torch.Tensor,
    act_RF: torch.Tensor,
) -> torch.Tensor:
    """Propagates dout back through w2 and SwiGLU.

    Args:
        z_S2F: the saved rows of z.
        dz_R2F: rows S and above hold z on entry; every row holds dz on return.
        act_RF: receives score * act.

    Returns:
        dscore (R, N) float32: partial sums of the gradient of each row's score.
    """
    ffn = w2_EFD.shape[1]
    num_n = cdiv(ffn, config.block_n)
    dscore = act_RF.new_empty(act_RF.shape[0], num_n, dtype=torch.float32)
    launch(
        _down_proj_backward_kernel,
        (routing.max_tiles * num_n,),
        dout_TD,
        w2_EFD,
        routing.score_R,
        z_S2F,
        dz_R2F,
        act_RF,
        dscore,
        routing.token_R,
        routing.offsets_E1,
        routing.tiles,
        routing.num_tiles,
        z_S2F.shape[0],
        D=dout_TD.shape[1],
        F=ffn,
        **config.options(dout_TD.dtype),
    )
    return dscore
