"""Gradients of both weights: one grouped GEMM A^T B that sums over the rows of each expert."""

import torch
import triton
import triton.language as tl

from momoe_titan.kernels.launch import cdiv, launch
from momoe_titan.kernels.portable.blocks import dot, load_block
from momoe_titan.kernels.portable.configs import TileConfig
from momoe_titan.kernels.routing import RoutingMetadata


@triton.jit
def _weight_grad_kernel(
    a_ptr,
    b_ptr,
    dw_ptr,
    token_ptr,
    offsets_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    A_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    W_E: tl.constexpr,
    W_M: tl.constexpr,
    W_N: tl.constexpr,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Grid (E * cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),). dw[e] (M, N) = A[rows of e]^T @ B[rows of e].

    A (.., M) and B (.., N), with rows of A_STRIDE and B_STRIDE, are read at row r, or at token[r] where they are
    gathered. dw has strides W_E, W_M, W_N. An expert without rows writes zeros.
    """
    NUM_M: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    NUM_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert = pid // (NUM_M * NUM_N)
    m = pid // NUM_N % NUM_M * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % NUM_N * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in range(start, end, BLOCK_K):
        rows = r0 + tl.arange(0, BLOCK_K)
        live = rows < end
        a_rows = rows.to(tl.int64)
        b_rows = a_rows
        if GATHER_A:
            a_rows = tl.load(token_ptr + rows, mask=live, other=0).to(tl.int64)
        if GATHER_B:
            b_rows = tl.load(token_ptr + rows, mask=live, other=0).to(tl.int64)
        a = load_block(a_ptr + a_rows[:, None] * A_STRIDE + m[None, :], live, m < M, False, M % BLOCK_M == 0)
        b = load_block(b_ptr + b_rows[:, None] * B_STRIDE + n[None, :], live, n < N, False, N % BLOCK_N == 0)
        acc = dot(tl.trans(a), b, acc, PRECISION, UPCAST)
    dw_ptrs = dw_ptr + expert.to(tl.int64) * W_E + m[:, None] * W_M + n[None, :] * W_N
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def weight_grad(
    config: TileConfig,
    a: torch.Tensor,
    b: torch.Tensor,
    routing: RoutingMetadata,
    dw_EMN: torch.Tensor,
    *,
    gather_a: bool = False,
    gather_b: bool = False,
) -> None:
    """dw[e] = A[rows of e]^T @ B[rows of e]; a gathered side has one row per token instead of per routed row.

    Args:
        a, b: rows contiguous; they may be some columns of a wider tensor.
        dw_EMN: of any strides.
    """
    num_experts, m, n = dw_EMN.shape
    launch(
        _weight_grad_kernel,
        (num_experts * cdiv(m, config.block_m) * cdiv(n, config.block_n),),
        a,
        b,
        dw_EMN,
        routing.token_R,
        routing.offsets_E1,
        M=m,
        N=n,
        A_STRIDE=a.stride(0),
        B_STRIDE=b.stride(0),
        W_E=dw_EMN.stride(0),
        W_M=dw_EMN.stride(1),
        W_N=dw_EMN.stride(2),
        GATHER_A=gather_a,
        GATHER_B=gather_b,
        **config.options(a.dtype),
    )
