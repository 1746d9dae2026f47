"""The loads by which the producer fills a stage with its two operands.

lhs operands have `tokens`, `next_tokens` and `load`; rhs operands have `load`. BYTES is what TMA brings to a
stage, for the stage's barrier; copies by cp.async report to the barrier themselves.

    lhs   GatheredRows    rows of x or dout, through their token      up_proj, down_proj_backward
          ContiguousRows  rows in place                               rows_kernel
          TwoBufferRows   the same, in two buffers                    rows_kernel
          GatheredK       rows of x or dout as the contraction        weight_grad
    rhs   ExpertWeights   a block of an expert's weights              all but weight_grad
          GatedWeights    a block of up and one of gate               up_proj
          SplitWeights    weights in two tensors, one after another   rows_kernel
          ContiguousK     rows in place as the contraction            weight_grad
          TwoBufferSteps  the same, in two buffers                    weight_grad
    z     TwoBufferZ      z, for the epilogue                         down_proj_backward

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

# Gluon's compiler reads this code; its types are not those of Python that runs.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate as aggregate

from momoe_titan.kernels.hopper.layouts import BK, BM, BN, CHUNK, COPY, HALF, Z_SMEM, as_ragged, ragged_coordinates
from momoe_titan.kernels.versions import cp_async, reinterpret, tma_load


@gluon.jit
def is_saved(row, row_end, num_saved):
    """Whether the row tile that starts at row lies in the buffer of saved rows: see `SplitRows`."""
    return gl.minimum(row + BM, row_end) <= num_saved


@gluon.jit
def _row_ptrs(ptr, rows, stride):
    """Pointers to rows of 2-byte elements, aligned to 16 bytes. One instruction each; a 64-bit product takes eight."""
    ptrs = gl.inline_asm_elementwise(
        "mad.wide.s32 $0, $1, $2, $3;", "=l,r,r,l", [rows, 2 * stride, ptr], gl.int64, True, 1
    )
    return gl.multiple_of(ptrs.to(ptr.dtype, bitcast=True), 16)


@gluon.jit
def _token_tile(ptr, stride, tokens):
    """Pointers to BK columns of the rows in tokens; the products stay in registers over the steps of a tile."""
    cols = gl.arange(0, BK, gl.SliceLayout(0, COPY))
    return ptr + (tokens.to(gl.int64) * stride)[:, None] + cols[None, :]


@aggregate
class GatheredRows:
    """lhs whose row r is row token_R[r] of a (T, contraction) tensor."""

    ptr: gl.tensor
    stride: gl.tensor
    token_ptr: gl.tensor
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ptr, stride, token_ptr):
        self.ptr = ptr
        self.stride = stride
        self.token_ptr = token_ptr
        self.BYTES = gl.constexpr(0)

    @gluon.jit
    def tokens(self, tile, k):
        row = tile.row + gl.arange(0, HALF, gl.SliceLayout(1, COPY))
        upper = gl.load(self.token_ptr + gl.minimum(row, tile.row_end - 1))
        lower = gl.load(self.token_ptr + gl.minimum(row + HALF, tile.row_end - 1))
        return upper, lower

    @gluon.jit
    def next_tokens(self, tile, k, tokens):
        return tokens

    @gluon.jit
    def load(self, tile, k, tokens, ready, upper, lower):
        cp_async(upper, _token_tile(self.ptr + k, self.stride, tokens[0]))
        cp_async(lower, _token_tile(self.ptr + k, self.stride, tokens[1]))


@aggregate
class ContiguousRows:
    """lhs read in place from an (R, contraction) tensor whose first row is row `first`.

    A tile may read rows past its expert; those results are not stored.
    """

    desc: tma.tensor_descriptor
    first: gl.tensor
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc, first):
        self.desc = desc
        self.first = first
        self.BYTES = gl.constexpr(2 * 128 * 64)

    @gluon.jit
    def tokens(self, tile, k):
        return 0

    @gluon.jit
    def next_tokens(self, tile, k, tokens):
        return tokens

    @gluon.jit
    def load(self, tile, k, tokens, ready, upper, lower):
        row = tile.row - self.first
        tma_load(self.desc, [row, k], ready, upper)
        tma_load(self.desc, [row + HALF, k], ready, lower)


@aggregate
class TwoBufferRows:
    """lhs read in place, each row tile from one of two buffers."""

    saved: ContiguousRows
    rest: ContiguousRows
    num_saved: gl.tensor

    @gluon.constexpr_function
    def __init__(self, saved, rest, num_saved):
        self.saved = saved
        self.rest = rest
        self.num_saved = num_saved


@aggregate
class ExpertWeights:
    """rhs from the experts' weights, stacked along the rows of a 2-d descriptor.

    One block of 256 columns from first_col + tile.col.
    """

    desc: tma.tensor_descriptor
    rows: gl.tensor  # descriptor rows from one expert to the next
    first_col: gl.tensor
    IS_NK: gl.constexpr
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc, rows, first_col, IS_NK):
        self.desc = desc
        self.rows = rows
        self.first_col = first_col
        self.IS_NK = gl.constexpr(IS_NK)
        self.BYTES = gl.constexpr(2 * 256 * 64)

    @gluon.jit
    def load(self, tile, k, ready, buffer):
        row = tile.expert * self.rows
        col = self.first_col + tile.col
        if self.IS_NK:
            tma_load(self.desc, [row + col, k], ready, buffer)
        else:
            tma_load(self.desc, [row + k, col], ready, buffer)


@aggregate
class GatedWeights:
    """rhs from the weights of up and gate: 128 columns of each, from two tensors or two places of one.

    Rows and columns as of `ExpertWeights`; up_col and gate_col are where up and gate begin.
    """

    up_desc: tma.tensor_descriptor
    gate_desc: tma.tensor_descriptor
    rows: gl.tensor
    up_col: gl.tensor
    gate_col: gl.tensor
    IS_NK: gl.constexpr
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, up_desc, gate_desc, rows, up_col, gate_col, IS_NK):
        self.up_desc = up_desc
        self.gate_desc = gate_desc
        self.rows = rows
        self.up_col = up_col
        self.gate_col = gate_col
        self.IS_NK = gl.constexpr(IS_NK)
        self.BYTES = gl.constexpr(2 * 256 * 64)

    @gluon.jit
    def load(self, tile, k, ready, buffer):
        width: gl.constexpr = BN // 2
        row = tile.expert * self.rows
        up, gate = self.up_col + tile.col, self.gate_col + tile.col
        if self.IS_NK:
            tma_load(self.up_desc, [row + up, k], ready, buffer.slice(0, width))
            tma_load(self.gate_desc, [row + gate, k], ready, buffer.slice(width, width))
        else:
            tma_load(self.up_desc, [row + k, up], ready, buffer.slice(0, width, 1))
            tma_load(self.gate_desc, [row + k, gate], ready, buffer.slice(width, width, 1))


@aggregate
class SplitWeights:
    """rhs from weights whose contraction goes through one tensor and then, from `half` on, through another."""

    first: ExpertWeights
    second: ExpertWeights
    half: gl.tensor
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, first, second, half):
        self.first = first
        self.second = second
        self.half = half
        self.BYTES = gl.constexpr(2 * 256 * 64)

    @gluon.jit
    def load(self, tile, k, ready, buffer):
        if k < self.half:
            self.first.load(tile, k, ready, buffer)
        else:
            self.second.load(tile, k - self.half, ready, buffer)


@aggregate
class GatheredK:
    """lhs of a weight gradient: step r of the contraction is row token_R[r] of a (T, width) tensor."""

    ptr: gl.tensor
    stride: gl.tensor
    token_ptr: gl.tensor
    width: gl.tensor
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ptr, stride, token_ptr, width):
        self.ptr = ptr
        self.stride = stride
        self.token_ptr = token_ptr
        self.width = width
        self.BYTES = gl.constexpr(0)

    @gluon.jit
    def tokens(self, tile, k):
        row = k + gl.arange(0, BK, gl.SliceLayout(1, COPY))
        # Past the expert's last row, load that row again: rhs is zero there. An expert without rows gets any row, and
        # `load` masks it.
        return gl.load(self.token_ptr + gl.minimum(row, gl.maximum(tile.k_end - 1, 0)))

    @gluon.jit
    def next_tokens(self, tile, k, tokens):
        return self.tokens(tile, k)

    @gluon.jit
    def load(self, tile, k, tokens, ready, upper, lower):
        live = tile.k_end > tile.k_begin
        col = tile.row - tile.expert * self.width
        ptrs = (
            _row_ptrs(self.ptr + col, tokens, self.stride)[:, None]
            + gl.arange(0, HALF, gl.SliceLayout(0, COPY))[None, :]
        )
        cp_async(upper, ptrs, mask=live)
        cp_async(lower, ptrs + HALF, mask=live & (col + HALF < self.width))


@aggregate
class ContiguousK:
    """rhs of a weight gradient: rows in place from a tensor whose first row is row `first`.

    The descriptor is ragged, so rows past the expert's read as zeros.
    """

    desc: tma.tensor_descriptor
    first: gl.tensor
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc, first):
        self.desc = desc
        self.first = first
        self.BYTES = gl.constexpr(2 * 64 * 256)

    @gluon.jit
    def load(self, tile, k, ready, buffer):
        where = ragged_coordinates(k - self.first, tile.k_end - self.first, tile.col)
        tma_load(self.desc, where, ready, as_ragged(buffer, self.desc))


@aggregate
class TwoBufferSteps:
    """rhs of a weight gradient, read in place, each row tile of the contraction from one of two buffers."""

    saved: ContiguousK
    rest: ContiguousK
    num_saved: gl.tensor

    @gluon.constexpr_function
    def __init__(self, saved, rest, num_saved):
        self.saved = saved
        self.rest = rest
        self.num_saved = num_saved

    @gluon.jit
    def end_of_saved(self, tile):
        """Where the row tiles of `saved` end within the tile's contraction."""
        end = tile.k_begin + gl.maximum(self.num_saved - tile.k_begin, 0) // BM * BM
        return gl.where(tile.k_end <= self.num_saved, tile.k_end, end)


@aggregate
class TwoBufferZ:
    """z rows of down_proj_backward, as (2, rows, F), each row tile from one of two buffers.

    Interleaved z is (2F / 64, rows, 64): 64 columns of F are two blocks of 64. z without a gate is (1, rows, F), whose
    second block reads as zeros.
    """

    saved_desc: tma.tensor_descriptor
    rest_desc: tma.tensor_descriptor
    num_saved: gl.tensor
    first: gl.tensor
    INTERLEAVED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, saved_desc, rest_desc, num_saved, first, INTERLEAVED):
        self.saved_desc = saved_desc
        self.rest_desc = rest_desc
        self.num_saved = num_saved
        self.first = first
        self.INTERLEAVED = gl.constexpr(INTERLEAVED)

    @gluon.jit
    def load(self, tile, col, ready, buffer):
        buffer = reinterpret(buffer, self.saved_desc.dtype, [2, BM, CHUNK], Z_SMEM)
        block = 0
        if self.INTERLEAVED:
            block = 2 * col // CHUNK
            col = 0
        if is_saved(tile.row, tile.row_end, self.num_saved):
            tma_load(self.saved_desc, [block, tile.row, col], ready, buffer)
        else:
            tma_load(self.rest_desc, [block, tile.row - self.first, col], ready, buffer)
