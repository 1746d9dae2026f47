"""Pieces that the portable grouped GEMM kernels share."""

import triton
import triton.language as tl


@triton.jit
def tile_span(tiles_ptr, offsets_ptr, tile, BLOCK_M: tl.constexpr):
    """Expert of a row tile (int64), its first row, and the end of the expert's rows."""
    packed = tl.load(tiles_ptr + tile)
    expert = packed & 0xFFFF
    row = tl.load(offsets_ptr + expert) + ((packed >> 16) & 0xFFFF) * BLOCK_M
    end = tl.load(offsets_ptr + expert + 1)
    return expert.to(tl.int64), row, end


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in float32. UPCAST serves the interpreter, whose bfloat16 dot is wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_block(ptrs, row_mask, col_mask, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr):
    """A 2-D block; rows and columns outside their masks read as 0."""
    if EVEN_ROWS:
        if EVEN_COLS:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=col_mask[None, :], other=0.0)
    else:
        if EVEN_COLS:
            return tl.load(ptrs, mask=row_mask[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=row_mask[:, None] & col_mask[None, :], other=0.0)


@triton.jit
def rows_matmul(
    acc,
    a_ptr,
    rows,
    b_ptr,
    cols,
    col_mask,
    stride_bk,
    stride_bn,
    K: tl.constexpr,
    A_STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc_mn + A[rows] @ B[:, cols] in float32.

    A has K columns in rows of A_STRIDE; rows may be any int64 row numbers (a gather).
    B is addressed by its two strides, so it may be stored either way round.
    """
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * A_STRIDE + k[None, :]
    b_ptrs = b_ptr + k[:, None] * stride_bk + cols[None, :] * stride_bn
    for k0 in range(0, K, BLOCK_K):
        a = load_block(a_ptrs, rows >= 0, k0 + k < K, True, EVEN_K)
        b = load_block(b_ptrs, k0 + k < K, col_mask, EVEN_K, EVEN_N)
        acc = dot(a, b, acc, PRECISION, UPCAST)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    return acc
