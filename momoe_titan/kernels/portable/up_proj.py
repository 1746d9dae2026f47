"""Up projection: gather, GEMM and activation in one kernel, and the recomputation of z for the backward."""

import torch
import triton
import triton.language as tl

from momoe_titan.kernels.activations import gated, is_gated
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.launch import cdiv, launch
from momoe_titan.kernels.portable.blocks import dot, load_block, tile_span
from momoe_titan.kernels.portable.configs import TileConfig
from momoe_titan.kernels.routing import RoutingMetadata


@triton.jit(do_not_specialize=["first_row", "num_saved"])
def _up_proj_kernel(
    x_ptr,
    w1_ptr,
    gate_ptr,
    bias_ptr,
    score_ptr,
    act_ptr,
    z_ptr,
    token_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    first_row,
    num_saved,
    D: tl.constexpr,
    F: tl.constexpr,
    Z: tl.constexpr,
    UP: tl.constexpr,
    GATE: tl.constexpr,
    STEP: tl.constexpr,
    W_E: tl.constexpr,
    W_D: tl.constexpr,
    W_F: tl.constexpr,
    TWO: tl.constexpr,
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

    up, gate = x[token[rows]] @ w1[e][:, UP + STEP * cols], x[token[rows]] @ w1[e][:, GATE + STEP * cols]
    act (R, F) = activation(up + bias, gate + bias), from float32, if WRITE_ACT
    z (.., Z) = up and gate, in the columns that they have in w1, for rows in [first_row, num_saved), at their own row
        number; with the bias, but if SCORED without bias and score: act then takes score * (up, gate) + bias

    w1 has strides W_E, W_D, and W_F from one column of up to the next. If TWO, w1 is up and another tensor gate.
    """
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    EVEN_N: tl.constexpr = F % BLOCK_N == 0
    tile = tl.program_id(0) // NUM_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, row0, end = tile_span(tiles_ptr, offsets_ptr, tile, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues] - jit
    rows = row0 + tl.arange(0, BLOCK_M)
    if not WRITE_ACT:
        if tl.minimum(row0 + BLOCK_M, end) <= first_row:
            return
    cols = tl.program_id(0) % NUM_N * BLOCK_N + tl.arange(0, BLOCK_N)
    col_mask = cols < F
    k = tl.arange(0, BLOCK_K)
    token = tl.load(token_ptr + tl.minimum(rows, end - 1)).to(tl.int64)
    x_ptrs = x_ptr + token[:, None] * D + k[None, :]
    GATE_OFFSET: tl.constexpr = (GATE - UP) * (W_F // STEP)
    if TWO:
        gate_ptrs = gate_ptr + expert * W_E + k[:, None] * W_D + cols[None, :] * W_F
    else:
        w1_ptr += UP * (W_F // STEP)
    w_ptrs = w1_ptr + expert * W_E + k[:, None] * W_D + cols[None, :] * W_F
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        x = load_block(x_ptrs, rows >= 0, k0 + k < D, True, EVEN_K)
        w_up = load_block(w_ptrs, k0 + k < D, col_mask, EVEN_K, EVEN_N)
        if GATED:
            if TWO:
                w_gate = load_block(gate_ptrs, k0 + k < D, col_mask, EVEN_K, EVEN_N)
                gate_ptrs += BLOCK_K * W_D
            else:
                w_gate = load_block(w_ptrs + GATE_OFFSET, k0 + k < D, col_mask, EVEN_K, EVEN_N)
        up = dot(x, w_up, up, PRECISION, UPCAST)
        if GATED:
            gate = dot(x, w_gate, gate, PRECISION, UPCAST)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * W_D
    rows64 = rows.to(tl.int64)
    if BIASED:
        bias_ptrs = bias_ptr + expert * Z + cols * STEP
        up_bias = tl.load(bias_ptrs + UP, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        gate_bias = tl.load(bias_ptrs + GATE, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if not SCORED:
            up += up_bias
            gate += gate_bias
    z_mask = ((rows >= first_row) & (rows < tl.minimum(end, num_saved)))[:, None] & col_mask[None, :]
    z_ptrs = z_ptr + rows64[:, None] * Z + cols[None, :] * STEP + UP
    tl.store(z_ptrs, up.to(z_ptr.dtype.element_ty), mask=z_mask)
    if GATED:
        tl.store(z_ptrs + (GATE - UP), gate.to(z_ptr.dtype.element_ty), mask=z_mask)
    if WRITE_ACT:
        if SCORED:
            score = tl.load(score_ptr + tl.minimum(rows, end - 1))[:, None]
            up *= score
            gate *= score
            if BIASED:
                up += up_bias
                gate += gate_bias
        act = gated(up, gate, ACTIVATION)
        act_ptrs = act_ptr + rows64[:, None] * F + cols[None, :]
        tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=(rows < end)[:, None] & col_mask[None, :])


def z_options(experts: Experts) -> dict:
    """Constants of kernels that read or write z."""
    up, gate, step = experts.columns
    return {
        "F": experts.ffn,
        "Z": experts.width,
        "UP": up,
        "GATE": gate,
        "STEP": step,
        "ACTIVATION": experts.activation,
        "GATED": is_gated(experts.activation),
        "BIASED": experts.bias1 is not None,
        "SCORED": experts.scores_on_input,
    }


def _launch_up_proj(config: TileConfig, x_TD, experts: Experts, routing, act_RF, z, first_row, num_saved):
    d_model, ffn = x_TD.shape[1], experts.ffn
    w1, z_columns = experts.w1, z_options(experts)
    grid = (routing.max_tiles * cdiv(ffn, config.block_n),)
    launch(
        _up_proj_kernel,
        grid,
        x_TD,
        w1,
        w1 if experts.gate is None else experts.gate,
        w1 if experts.bias1 is None else experts.bias1,
        routing.score_R,
        act_RF if act_RF is not None else z,
        z,
        routing.token_R,
        routing.offsets_E1,
        routing.tiles,
        routing.num_tiles,
        first_row,
        num_saved,
        D=d_model,
        W_E=w1.stride(0),
        W_D=w1.stride(1),
        W_F=w1.stride(2) * z_columns["STEP"],
        TWO=experts.gate is not None,
        **z_columns,
        WRITE_ACT=act_RF is not None,
        **config.options(x_TD.dtype),
    )


def up_proj(
    config: TileConfig,
    x_TD: torch.Tensor,
    experts: Experts,
    routing: RoutingMetadata,
    act_RF: torch.Tensor,
    z_S2F: torch.Tensor,
) -> None:
    """act_RF of every row, and the first S rows of z = x[token] @ w1[expert]."""
    _launch_up_proj(config, x_TD, experts, routing, act_RF, z_S2F, 0, z_S2F.shape[0])


def recompute_z(
    config: TileConfig,
    x_TD: torch.Tensor,
    experts: Experts,
    routing: RoutingMetadata,
    first_row: int,
    z_R2F: torch.Tensor,
) -> None:
    """Rows ``first_row`` and above of z; tiles wholly below it cost nothing."""
    _launch_up_proj(config, x_TD, experts, routing, None, z_R2F, first_row, z_R2F.shape[0])
