"""Up projection: gather, GEMM and SwiGLU in one kernel, and the recomputation of z for the backward."""

import torch
import triton
import triton.language as tl

from momoe_titan.kernels.launch import cdiv, launch
from momoe_titan.kernels.portable.blocks import dot, load_block, tile_span
from momoe_titan.kernels.portable.configs import TileConfig
from momoe_titan.kernels.routing import RoutingMetadata


@triton.jit(do_not_specialize=["first_row", "num_saved"])
def _up_proj_kernel(
    x_ptr,
    w1_ptr,
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
    WRITE_ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (max_tiles * cdiv(F, BLOCK_N),). A program owns BLOCK_M rows of one expert and BLOCK_N columns of F.

    up, gate = x[token[rows]] @ w1[e][:, cols], x[token[rows]] @ w1[e][:, F + cols]
    act (R, F) = up * silu(gate), from float32, if WRITE_ACT
    z (.., 2F) = [up, gate] for rows in [first_row, num_saved), at their own row number
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
    w_ptrs = w1_ptr + expert * (2 * D * F) + k[:, None] * (2 * F) + cols[None, :]
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        x = load_block(x_ptrs, rows >= 0, k0 + k < D, True, EVEN_K)
        w_up = load_block(w_ptrs, k0 + k < D, col_mask, EVEN_K, EVEN_N)
        w_gate = load_block(w_ptrs + F, k0 + k < D, col_mask, EVEN_K, EVEN_N)
        up = dot(x, w_up, up, PRECISION, UPCAST)
        gate = dot(x, w_gate, gate, PRECISION, UPCAST)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * 2 * F
    rows64 = rows.to(tl.int64)
    z_mask = ((rows >= first_row) & (rows < tl.minimum(end, num_saved)))[:, None] & col_mask[None, :]
    z_ptrs = z_ptr + rows64[:, None] * (2 * F) + cols[None, :]
    tl.store(z_ptrs, up.to(z_ptr.dtype.element_ty), mask=z_mask)
    tl.store(z_ptrs + F, gate.to(z_ptr.dtype.element_ty), mask=z_mask)
    if WRITE_ACT:
        act = up * gate * tl.sigmoid(gate)
        act_ptrs = act_ptr + rows64[:, None] * F + cols[None, :]
        tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=(rows < end)[:, None] & col_mask[None, :])


def _launch_up_proj(config: TileConfig, x_TD, w1_ED2F, routing, act_RF, z, first_row, num_saved):
    d_model, ffn = x_TD.shape[1], w1_ED2F.shape[2] // 2
    grid = (routing.max_tiles * cdiv(ffn, config.block_n),)
    launch(
        _up_proj_kernel,
        grid,
        x_TD,
        w1_ED2F,
        act_RF if act_RF is not None else z,
        z,
        routing.token_R,
        routing.offsets_E1,
        routing.tiles,
        routing.num_tiles,
        first_row,
        num_saved,
        D=d_model,
        F=ffn,
        WRITE_ACT=act_RF is not None,
        **config.options(x_TD.dtype),
    )


def up_proj(
    config: TileConfig,
    x_TD: torch.Tensor,
    w1_ED2F: torch.Tensor,
    routing: RoutingMetadata,
    act_RF: torch.Tensor,
    z_S2F: torch.Tensor,
) -> None:
    """act_RF of every row, and the first S rows of z = x[token] @ w1[expert]."""
    _launch_up_proj(config, x_TD, w1_ED2F, routing, act_RF, z_S2F, 0, z_S2F.shape[0])


def recompute_z(
    config: TileConfig,
    x_TD: torch.Tensor,
    w1_ED2F: torch.Tensor,
    routing: RoutingMetadata,
    first_row: int,
    z_R2F: torch.Tensor,
) -> None:
    """Rows ``first_row`` and above of z; tiles wholly below it cost nothing."""
    _launch_up_proj(config, x_TD, w1_ED2F, routing, None, z_R2F, first_row, z_R2F.shape[0])
