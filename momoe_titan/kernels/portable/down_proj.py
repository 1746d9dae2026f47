"""Backward of the down projection, fused with that of the activation and the gradient of the scores."""

import torch
import triton
import triton.language as tl

from momoe_titan.kernels.activations import gated_by_gate, gated_by_up
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.launch import cdiv, launch
from momoe_titan.kernels.portable.blocks import rows_matmul, tile_span
from momoe_titan.kernels.portable.configs import TileConfig
from momoe_titan.kernels.portable.up_proj import z_options
from momoe_titan.kernels.routing import RoutingMetadata


@triton.jit
def _activation_backward(
    dact,
    score,
    rows,
    end,
    cols,
    z_ptr,
    dz_ptr,
    act_ptr,
    bias_ptr,
    sums_ptr,
    F: tl.constexpr,
    Z: tl.constexpr,
    UP: tl.constexpr,
    GATE: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    SCORED: tl.constexpr,
    WRITE_ACT: tl.constexpr,
):
    """Stores dz and act, both as `_down_proj_backward_kernel` says, and if BIASED the column sums of dz, for one block
    of rows and columns; returns the row sums that make the scores' gradient.

    z_ptr has one base pointer for each row; bias_ptr and sums_ptr point to the row of the expert and of the tile.
    """
    mask = (rows < end)[:, None] & (cols < F)[None, :]
    rows64 = rows.to(tl.int64)[:, None]
    offs = rows64 * Z + cols[None, :] * STEP + UP
    up = tl.load(z_ptr[:, None] + offs, mask=mask, other=0.0).to(tl.float32)
    gate = up
    if GATED:
        gate = tl.load(z_ptr[:, None] + (GATE - UP) + offs, mask=mask, other=0.0).to(tl.float32)
    raw_up = up
    raw_gate = gate
    if SCORED:
        up *= score[:, None]
        gate *= score[:, None]
        if BIASED:
            up += tl.load(bias_ptr + UP + cols * STEP, mask=cols < F, other=0.0).to(tl.float32)[None, :]
            gate += tl.load(bias_ptr + GATE + cols * STEP, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    act, by_up, part = gated_by_up(up, gate, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues] - jit
    if SCORED:
        dscore = tl.sum(dact * by_up * raw_up, axis=1)
    else:
        dscore = tl.sum(dact * act, axis=1)
    if WRITE_ACT:
        if not SCORED:
            act *= score[:, None]
        tl.store(act_ptr + rows64 * F + cols[None, :], act.to(act_ptr.dtype.element_ty), mask=mask)
    scaled = dact * score[:, None]
    tl.store(dz_ptr + offs, (scaled * by_up).to(dz_ptr.dtype.element_ty), mask=mask)
    if BIASED:  # the gradient of z itself: with scores on the input it is not scaled
        dz = dact if SCORED else scaled
        tl.store(sums_ptr + UP + cols * STEP, tl.sum(tl.where(mask, dz * by_up, 0.0), axis=0), mask=cols < F)
    if GATED:
        factor, slope = gated_by_gate(up, gate, by_up, part, ACTIVATION)  # pyright: ignore[reportGeneralTypeIssues] - jit
        if SCORED:
            dscore += tl.sum(dact * factor * slope * raw_gate, axis=1)
        tl.store(dz_ptr + (GATE - UP) + offs, (scaled * factor * slope).to(dz_ptr.dtype.element_ty), mask=mask)
        if BIASED:
            gate_sums = tl.sum(tl.where(mask, dz * factor * slope, 0.0), axis=0)
            tl.store(sums_ptr + GATE + cols * STEP, gate_sums, mask=cols < F)
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
    bias_ptr,
    sums_ptr,
    token_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_saved,
    D: tl.constexpr,
    W_E: tl.constexpr,
    W_F: tl.constexpr,
    W_D: tl.constexpr,
    F: tl.constexpr,
    Z: tl.constexpr,
    UP: tl.constexpr,
    GATE: tl.constexpr,
    STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    SCORED: tl.constexpr,
    WRITE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (max_tiles * cdiv(F, BLOCK_N),). A program owns BLOCK_M rows of one expert and BLOCK_N columns of F.

    dact (unscaled) = dout[token[rows]] @ w2[e]^T
    z from z_saved (S, Z) for rows below num_saved, else from dz (R, Z) itself, where it was recomputed
    dscore (R, NUM_N) = row sums of dact * act over the program's columns
    dz = score * dact through the activation, over z; act (R, F) = score * act, for the gradient of w2, if WRITE_ACT
    sums (tiles, Z) float32 = column sums of dz over the tile's rows, for the gradient of bias, if BIASED

    If SCORED, scores are on the input: z = score * x @ w1 is made from what was saved, x @ w1; dscore = row sums of
    x @ w1 times the gradient of z; act has no score; dz is times the score and the sums of dz are not.
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
    dact = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dact = rows_matmul(
        dact,
        dout_ptr,
        tl.load(token_ptr + live_rows).to(tl.int64),
        w2_ptr + expert * W_E,
        cols,
        cols < F,
        W_D,
        W_F,
        D,
        D,
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
    bias_ptr += expert * Z
    sums_ptr += tile.to(tl.int64) * Z
    dscore = _activation_backward(
        left,
        score,
        rows,
        end,
        left_cols,
        z_ptr,
        dz_ptr,
        act_ptr,
        bias_ptr,
        sums_ptr,
        F,
        Z,
        UP,
        GATE,
        STEP,
        ACTIVATION,
        GATED,
        BIASED,
        SCORED,
        WRITE_ACT,
    )
    dscore += _activation_backward(
        right,
        score,
        rows,
        end,
        left_cols + HALF,
        z_ptr,
        dz_ptr,
        act_ptr,
        bias_ptr,
        sums_ptr,
        F,
        Z,
        UP,
        GATE,
        STEP,
        ACTIVATION,
        GATED,
        BIASED,
        SCORED,
        WRITE_ACT,
    )
    tl.store(dscore_ptr + rows.to(tl.int64) * NUM_N + n, dscore, mask=rows < end)


def down_proj_backward(
    config: TileConfig,
    dout_TD: torch.Tensor,
    experts: Experts,
    routing: RoutingMetadata,
    z_SZ: torch.Tensor,
    dz_RZ: torch.Tensor,
    act_RF: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Propagates dout back through w2 and the activation.

    Args:
        z_SZ: the saved rows of z.
        dz_RZ: rows S and above hold z on entry; every row holds dz on return.
        act_RF: receives score * act, or act where scores are on the input; None where w2 needs no gradient.

    Returns:
        dscore (R, N) float32: partial sums of the gradient of each row's score. With bias1 also (tiles, Z) float32: for
        each row tile the sums of its rows' gradients of bias1, else None.
    """
    ffn, w2 = experts.ffn, experts.w2
    num_n = cdiv(ffn, config.block_n)
    dscore = dz_RZ.new_empty(dz_RZ.shape[0], num_n, dtype=torch.float32)
    sums = None
    if experts.bias1 is not None:
        sums = dz_RZ.new_empty(routing.max_tiles, experts.width, dtype=torch.float32)
    launch(
        _down_proj_backward_kernel,
        (routing.max_tiles * num_n,),
        dout_TD,
        w2,
        routing.score_R,
        z_SZ,
        dz_RZ,
        act_RF if act_RF is not None else dz_RZ,
        dscore,
        experts.bias1 if experts.bias1 is not None else w2,
        sums if sums is not None else dscore,
        routing.token_R,
        routing.offsets_E1,
        routing.tiles,
        routing.num_tiles,
        z_SZ.shape[0],
        D=dout_TD.shape[1],
        W_E=w2.stride(0),
        W_F=w2.stride(1),
        W_D=w2.stride(2),
        **z_options(experts),
        WRITE_ACT=act_RF is not None,
        **config.options(dout_TD.dtype),
    )
    return dscore, sums
