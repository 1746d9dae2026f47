"""The grouped GEMM between routed rows and their experts' weights: the down projection, and dx of the up projection."""

import torch
import triton
import triton.language as tl

from momoe_titan.kernels.launch import cdiv, launch
from momoe_titan.kernels.portable.blocks import rows_matmul, tile_span
from momoe_titan.kernels.portable.configs import TileConfig
from momoe_titan.kernels.routing import RoutingMetadata


@triton.jit
def _rows_gemm_kernel(
    rows_ptr,
    w_ptr,
    out_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    W_IS_NK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (max_tiles * cdiv(N, BLOCK_N),). A program owns one row tile and BLOCK_N columns of out.

    out (R, N) = rows (R, K) @ w[e], with w[e] (K, N), or (N, K) read transposed if W_IS_NK.
    """
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // NUM_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, row0, end = tile_span(tiles_ptr, offsets_ptr, tile, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues] - jit
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % NUM_N * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = rows_matmul(
        rows_ptr,
        tl.minimum(rows, end - 1).to(tl.int64),
        w_ptr + expert * (K * N),
        cols,
        cols < N,
        1 if W_IS_NK else N,
        K if W_IS_NK else 1,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        N % BLOCK_N == 0,
        PRECISION,
        UPCAST,
    )
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(rows < end)[:, None] & (cols < N)[None, :])


def rows_gemm(
    config: TileConfig,
    rows_RK: torch.Tensor,
    w: torch.Tensor,
    routing: RoutingMetadata,
    out_RN: torch.Tensor,
    *,
    w_is_nk: bool,
) -> None:
    """out[r] = rows[r] @ w[expert of r], or @ w[expert of r]^T if w is (E, N, K)."""
    width = out_RN.shape[1]
    launch(
        _rows_gemm_kernel,
        (routing.max_tiles * cdiv(width, config.block_n),),
        rows_RK,
        w,
        out_RN,
        routing.offsets_E1,
        routing.tiles,
        routing.num_tiles,
        K=rows_RK.shape[1],
        N=width,
        W_IS_NK=w_is_nk,
        **config.options(rows_RK.dtype),
    )
