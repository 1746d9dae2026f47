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
    gate_ptr,
    out_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    K: tl.constexpr,
    N: tl.constexpr,
    W_E: tl.constexpr,
    W_K: tl.constexpr,
    W_N: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (max_tiles * cdiv(N, BLOCK_N),). A program owns one row tile and BLOCK_N columns of out.

    out (R, N) = rows (R, K) @ w[e], with w (E, K, N) of strides W_E, W_K, W_N. If TWO, w is the first half of the rows
    of (E, K, N), and gate, which has the same strides, the second.
    """
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // NUM_N
    if tile >= tl.load(num_tiles_ptr):
        return
    expert, row0, end = tile_span(tiles_ptr, offsets_ptr, tile, BLOCK_M)  # pyright: ignore[reportGeneralTypeIssues] - jit
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) % NUM_N * BLOCK_N + tl.arange(0, BLOCK_N)
    live_rows = tl.minimum(rows, end - 1).to(tl.int64)
    PART: tl.constexpr = K // 2 if TWO else K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = rows_matmul(
        acc,
        rows_ptr,
        live_rows,
        w_ptr + expert * W_E,
        cols,
        cols < N,
        W_K,
        W_N,
        PART,
        K,
        BLOCK_K,
        N % BLOCK_N == 0,
        PRECISION,
        UPCAST,
    )
    if TWO:
        acc = rows_matmul(
            acc,
            rows_ptr + PART,
            live_rows,
            gate_ptr + expert * W_E,
            cols,
            cols < N,
            W_K,
            W_N,
            PART,
            K,
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
    w_EKN: torch.Tensor,
    routing: RoutingMetadata,
    out_RN: torch.Tensor,
    gate_EKN: torch.Tensor | None = None,
) -> None:
    """out[r] = rows[r] @ w[expert of r].

    Args:
        w_EKN: of any strides; only the first half of its K rows where there is a gate.
        gate_EKN: the other half, with the same strides.
    """
    width = out_RN.shape[1]
    launch(
        _rows_gemm_kernel,
        (routing.max_tiles * cdiv(width, config.block_n),),
        rows_RK,
        w_EKN,
        w_EKN if gate_EKN is None else gate_EKN,
        out_RN,
        routing.offsets_E1,
        routing.tiles,
        routing.num_tiles,
        K=rows_RK.shape[1],
        N=width,
        W_E=w_EKN.stride(0),
        W_K=w_EKN.stride(1),
        W_N=w_EKN.stride(2),
        TWO=gate_EKN is not None,
        **config.options(rows_RK.dtype),
    )
