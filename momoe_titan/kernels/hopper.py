"""Grouped GEMMs of the expert MLP for Hopper (sm_90), in Gluon.

Every kernel here is one persistent, warp-specialised loop over 128x256 output tiles: a producer
warpgroup fills a ring of shared-memory stages (TMA, or cp.async where rows are gathered through
their token), two consumer warpgroups own 64 rows each and keep a 64x256 float32 accumulator, and a
short epilogue sends the result out through TMA stores that are clipped at the last row of the
expert. The kernels differ in their operands (`TokenRows`, `PlainRows`, `ExpertWeights`,
`TokenSteps`, `PlainSteps`), in their tile order (`RowTiles`, `WeightTiles`) and in their epilogue.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

import functools

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate

from .tiling import cdiv, launch

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

HALF = gl.constexpr(64)  # output rows of one consumer
BM = gl.constexpr(128)  # output rows of a tile
BN = gl.constexpr(256)  # output columns of a tile; SwiGLU: 128 of up beside the same 128 of gate
BK = gl.constexpr(64)  # contraction of one stage
CHUNK = gl.constexpr(64)  # columns of one TMA store
STAGES = gl.constexpr(4)  # at least 3: in step, the stage filled last is not reported before the next one is free

# 504 registers are to be had for one thread of each of the three warpgroups: the second consumer and
# the producer ask for these, the first consumer is left with as many as the second.
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)

# Contraction from which on `rows_kernel` lends a stage: of a short one, it takes too much of the ring.
# The weight gradients lend always: few experts have so few rows.
LENDING_WIDTH = 1024

# Contraction from which on the programs that gather rows are kept in step: see `_commit`.
IN_STEP_WIDTH = 4096

# A weight gradient's tiles go by groups of this many row tiles, so that those at work at a time share operands.
GROUP = gl.constexpr(8)

# A descriptor for ragged rows has two extra dimensions whose strides cancel modulo 2^64, so that
# the bounds check on the row dimension can be placed at any row (see triton.tools.ragged_tma).
RAGGED_ROWS = gl.constexpr(1 << 30)
RAGGED_OUTER = 0x7FFF0000
RAGGED_WRAP = 1 << 34

TILE_SMEM = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
RAGGED_SMEM = gl.constexpr(gl.NVMMASharedLayout(128, 16, 4))
BARRIER_SMEM = gl.constexpr(mbarrier.MBarrierLayout())
# Layout of a cp.async: 16 bytes a thread, 128 bytes of one row by eight neighbours.
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
SLICE_ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
# up and gate of 64 columns of z: (2, 128, 64), which fills the rhs of one stage
Z_SMEM = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))
Z_STEPS = gl.constexpr(4)


@aggregate
class Ring:
    """Shared-memory stages between the producer and the two consumers."""

    lhs: gl.shared_memory_descriptor  # (2 * STAGES, 64, 64), a half per consumer
    rhs: gl.shared_memory_descriptor  # (STAGES, BK, BN), or (STAGES, BN, BK) if K-major
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    LHS_IS_KM: gl.constexpr  # the contraction runs along the rows of lhs
    RHS_IS_NK: gl.constexpr  # the contraction runs along the columns of rhs
    GATHERS: gl.constexpr  # one operand arrives by cp.async
    IN_STEP: gl.constexpr  # the producer itself waits for its copies
    LENDS: gl.constexpr  # results wait in a stage until their stores have read them

    @gluon.constexpr_function
    def __init__(self, lhs, rhs, ready, empty, LHS_IS_KM, RHS_IS_NK, GATHERS, IN_STEP, LENDS):
        self.lhs = lhs
        self.rhs = rhs
        self.ready = ready
        self.empty = empty
        self.LHS_IS_KM = gl.constexpr(LHS_IS_KM)
        self.RHS_IS_NK = gl.constexpr(RHS_IS_NK)
        self.GATHERS = gl.constexpr(GATHERS)
        self.IN_STEP = gl.constexpr(IN_STEP)
        self.LENDS = gl.constexpr(LENDS)


@gluon.jit
def _make_ring(
    dtype: gl.constexpr, LHS_IS_KM: gl.constexpr, RHS_IS_NK: gl.constexpr,
    GATHERS: gl.constexpr, IN_STEP: gl.constexpr, LENDS: gl.constexpr,
):  # fmt: skip
    lhs = gl.allocate_shared_memory(dtype, [2 * STAGES, HALF, BK], TILE_SMEM)
    if RHS_IS_NK:
        rhs = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], TILE_SMEM)
    else:
        rhs = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], TILE_SMEM)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER_SMEM)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER_SMEM)
    for i in gl.static_range(STAGES):
        # one arrival for the TMA bytes, and for the copies one of the producer, or one of each of its threads
        mbarrier.init(ready.index(i), count=(2 if IN_STEP else 129) if GATHERS else 1)
        mbarrier.init(empty.index(i), count=2)
    return Ring(lhs, rhs, ready, empty, LHS_IS_KM, RHS_IS_NK, GATHERS, IN_STEP, LENDS)


@gluon.jit
def _advance(stage, phase):
    stage += 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    stage = gl.where(stage == STAGES, 0, stage)
    return stage, phase


@gluon.jit
def _commit(ring, stage, pending):
    """Has the copies into a stage reported when they are there. In step, returns the stage whose copies are pending.

    In step, the producer waits for the copies into the stage before this one and reports them. A
    program whose rows come from DRAM, because it is ahead of those that share them, is slowed by that,
    while one that finds them in the L2 is not. Otherwise wide rows drift apart until every program
    fetches for itself: up_proj of 30B-n1024 read 10.5 GB in place of about 3.
    """
    if ring.IN_STEP:
        async_copy.commit_group()
        async_copy.wait_group(1)
        _report(ring, pending)
    else:
        async_copy.mbarrier_arrive(ring.ready.index(stage), increment_count=False)
    return stage


@gluon.jit
def _report(ring, pending):
    """Tells the consumers that the copies into the pending stage have arrived; nothing if it is -1. Call it after a wait."""
    fence_async_shared()  # cp.async writes through the generic proxy
    mbarrier.arrive(ring.ready.index(gl.maximum(pending, 0)), pred=pending >= 0)


@gluon.jit
def _report_last(ring, pending):
    """In step, reports the last stage, at the producer's end."""
    if ring.IN_STEP:
        async_copy.wait_group(0)
        _report(ring, pending)


@gluon.jit
def _fill(ring, tile, lhs, rhs, stage, phase, pending):
    """Fills the ring with the steps of one tile. A step's own tokens are fetched two steps before their rows."""
    tokens = lhs.tokens(tile, tile.k_begin)
    next_tokens = lhs.next_tokens(tile, tile.k_begin + BK, tokens)
    for k in range(tile.k_begin, tile.k_stop(), BK):
        ready = ring.ready.index(stage)
        mbarrier.wait(ring.empty.index(stage), phase)
        mbarrier.expect(ready, lhs.BYTES + rhs.BYTES)
        rhs.load(tile, k, ready, ring.rhs.index(stage))
        lhs.load(tile, k, tokens, ready, ring.lhs.index(2 * stage), ring.lhs.index(2 * stage + 1))
        if ring.GATHERS:
            pending = _commit(ring, stage, pending)
        tokens = next_tokens
        next_tokens = lhs.next_tokens(tile, k + 2 * BK, next_tokens)
        stage, phase = _advance(stage, phase)
    return stage, phase, pending


@gluon.jit
def _lend(ring, stage, phase, pending):
    """Gives the consumers a stage as it is: their results stay there until the stores have read them."""
    ready = ring.ready.index(stage)
    mbarrier.wait(ring.empty.index(stage), phase)
    mbarrier.arrive(ready)
    if ring.GATHERS:
        pending = _commit(ring, stage, pending)
    stage, phase = _advance(stage, phase)
    return stage, phase, pending


@gluon.jit
def _producer(ring, tiles, lhs, rhs):
    """Fills the ring, tile by tile, and if it LENDS adds one more stage after each."""
    stage = 0
    phase = 1
    pending = -1
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        stage, phase, pending = _fill(ring, tile, lhs, rhs, stage, phase, pending)
        if ring.LENDS:
            stage, phase, pending = _lend(ring, stage, phase, pending)
    _report_last(ring, pending)


@gluon.jit
def _give_back(ring, held):
    """Frees the stage, if there is one, once the stores have read what they find there."""
    if ring.LENDS:
        tma.store_wait(0)
    mbarrier.arrive(ring.empty.index(gl.maximum(held, 0)), pred=held >= 0)


@gluon.jit
def _accumulate(ring, tile, acc, stage, phase, held, W: gl.constexpr):
    """Returns the (64, 256) product of consumer W over the tile's contraction, one MMA in flight.

    acc: any value, to be overwritten. The stage that holds results of the tile before goes back
    under the first MMA.
    """
    last = held
    for k in range(tile.k_begin, tile.k_stop(), BK):
        mbarrier.wait(ring.ready.index(stage), phase)
        if ring.GATHERS and not ring.IN_STEP:
            fence_async_shared()  # cp.async wrote through the generic proxy
        lhs = ring.lhs.index(2 * stage + W)
        rhs = ring.rhs.index(stage)
        if ring.LHS_IS_KM:
            lhs = lhs.permute((1, 0))
        if ring.RHS_IS_NK:
            rhs = rhs.permute((1, 0))
        acc = warpgroup_mma(lhs, rhs, acc, is_async=True, use_acc=k > tile.k_begin)
        acc = warpgroup_mma_wait(1, deps=[acc])
        _give_back(ring, last)
        last = stage
        stage, phase = _advance(stage, phase)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _give_back(ring, last)
    return acc, stage, phase


@gluon.jit
def _hand_back(ring, steps, stage, phase, held):
    """Frees the stages of a tile unread: none of this consumer's rows exist."""
    _give_back(ring, held)
    for _ in range(steps):
        mbarrier.wait(ring.ready.index(stage), phase)
        mbarrier.arrive(ring.empty.index(stage))
        stage, phase = _advance(stage, phase)
    return stage, phase


@aggregate
class Tile:
    """One output tile: rows [row, row_end), at most 128 of them, columns from col, contraction [k_begin, k_end)."""

    expert: gl.tensor
    row: gl.tensor
    row_end: gl.tensor
    col: gl.tensor
    k_begin: gl.tensor
    k_end: gl.tensor

    @gluon.constexpr_function
    def __init__(self, expert, row, row_end, col, k_begin, k_end):
        self.expert = expert
        self.row = row
        self.row_end = row_end
        self.col = col
        self.k_begin = k_begin
        self.k_end = k_end

    @gluon.jit
    def steps(self):
        """At least one: operands of a tile without contraction read as zeros."""
        return gl.maximum(gl.cdiv(self.k_end - self.k_begin, BK), 1)

    @gluon.jit
    def k_stop(self):
        return gl.maximum(self.k_end, self.k_begin + 1)


@aggregate
class RowTiles:
    """Tiles over routed rows, columns fastest: neighbours in time share their rows and their expert."""

    tiles_ptr: gl.tensor
    offsets_ptr: gl.tensor
    num_tiles: gl.tensor
    first_tile: gl.tensor
    num_cols: gl.tensor  # column tiles
    k_end: gl.tensor
    COLS: gl.constexpr  # columns of a tile in each output

    @gluon.constexpr_function
    def __init__(self, tiles_ptr, offsets_ptr, num_tiles, first_tile, num_cols, k_end, COLS):
        self.tiles_ptr = tiles_ptr
        self.offsets_ptr = offsets_ptr
        self.num_tiles = num_tiles
        self.first_tile = first_tile
        self.num_cols = num_cols
        self.k_end = k_end
        self.COLS = gl.constexpr(COLS)

    @gluon.jit
    def begin(self):
        return self.first_tile * self.num_cols + gl.program_id(0)

    @gluon.jit
    def end(self):
        return self.num_tiles * self.num_cols

    @gluon.jit
    def word(self, t):
        """Packed (j << 16) | expert of tile t; fetched one tile ahead of its use."""
        return gl.load(self.tiles_ptr + gl.maximum(gl.minimum(t // self.num_cols, self.num_tiles - 1), 0))

    @gluon.jit
    def tile(self, t, word):
        expert = word & 0xFFFF
        row = gl.load(self.offsets_ptr + expert) + (word >> 16 & 0xFFFF) * BM
        row_end = gl.load(self.offsets_ptr + expert + 1)
        return Tile(expert, row, row_end, t % self.num_cols * self.COLS, gl.to_tensor(0), self.k_end)


@aggregate
class WeightTiles:
    """Tiles over a weight gradient (E * M, N), expert by expert; within one by groups of row tiles, rows fastest."""

    offsets_ptr: gl.tensor
    E: gl.tensor
    M: gl.tensor
    N: gl.tensor
    num_rows: gl.tensor  # row tiles of one expert
    num_cols: gl.tensor  # column tiles

    @gluon.constexpr_function
    def __init__(self, offsets_ptr, E, M, N, num_rows, num_cols):
        self.offsets_ptr = offsets_ptr
        self.E = E
        self.M = M
        self.N = N
        self.num_rows = num_rows
        self.num_cols = num_cols

    @gluon.jit
    def begin(self):
        return gl.program_id(0)

    @gluon.jit
    def end(self):
        return self.E * self.num_rows * self.num_cols

    @gluon.jit
    def word(self, t):
        return 0

    @gluon.jit
    def tile(self, t, word):
        expert = t // (self.num_rows * self.num_cols)
        q = t % (self.num_rows * self.num_cols)
        group = q // (GROUP * self.num_cols) * GROUP
        height = gl.minimum(self.num_rows - group, GROUP)
        q = q - group * self.num_cols
        row = expert * self.M + (group + q % height) * BM
        return Tile(
            expert,
            row,
            (expert + 1) * self.M,
            q // height * BN,
            gl.load(self.offsets_ptr + expert),
            gl.load(self.offsets_ptr + expert + 1),
        )


@gluon.jit
def _token_tile(ptr, stride, tokens, first_col, COLS: gl.constexpr):
    """Pointers to COLS columns, from first_col, of the rows in tokens."""
    cols = first_col + gl.arange(0, COLS, gl.SliceLayout(0, COPY))
    return ptr + (tokens.to(gl.int64) * stride)[:, None] + cols[None, :]


@aggregate
class TokenRows:
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
        async_copy.async_copy_global_to_shared(upper, _token_tile(self.ptr + k, self.stride, tokens[0], 0, BK))
        async_copy.async_copy_global_to_shared(lower, _token_tile(self.ptr + k, self.stride, tokens[1], 0, BK))


@aggregate
class PlainRows:
    """lhs read in place: rows of an (R, contraction) tensor. Rows past the expert are not stored."""

    desc: tma.tensor_descriptor
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc):
        self.desc = desc
        self.BYTES = gl.constexpr(2 * 128 * 64)

    @gluon.jit
    def tokens(self, tile, k):
        return 0

    @gluon.jit
    def next_tokens(self, tile, k, tokens):
        return tokens

    @gluon.jit
    def load(self, tile, k, tokens, ready, upper, lower):
        tma.async_copy_global_to_shared(self.desc, [tile.row, k], ready, upper)
        tma.async_copy_global_to_shared(self.desc, [tile.row + HALF, k], ready, lower)


@aggregate
class ExpertWeights:
    """rhs from the experts' weights, stacked along the rows of a 2-d descriptor.

    One block of 256 columns from first_col + tile.col, or if GATED two of 128: up, and gate, which
    starts gate_col further right.
    """

    desc: tma.tensor_descriptor
    rows: gl.tensor  # descriptor rows of one expert
    first_col: gl.tensor
    gate_col: gl.tensor
    IS_NK: gl.constexpr
    GATED: gl.constexpr
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc, rows, first_col, gate_col, IS_NK, GATED):
        self.desc = desc
        self.rows = rows
        self.first_col = first_col
        self.gate_col = gate_col
        self.IS_NK = gl.constexpr(IS_NK)
        self.GATED = gl.constexpr(GATED)
        self.BYTES = gl.constexpr(2 * 256 * 64)

    @gluon.jit
    def load(self, tile, k, ready, buffer):
        row = tile.expert * self.rows
        col = self.first_col + tile.col
        if self.GATED:
            width: gl.constexpr = BN // 2
            tma.async_copy_global_to_shared(self.desc, [row + k, col], ready, buffer.slice(0, width, 1))
            tma.async_copy_global_to_shared(
                self.desc, [row + k, self.gate_col + col], ready, buffer.slice(width, width, 1)
            )
        elif self.IS_NK:
            tma.async_copy_global_to_shared(self.desc, [row + col, k], ready, buffer)
        else:
            tma.async_copy_global_to_shared(self.desc, [row + k, col], ready, buffer)


@aggregate
class TokenSteps:
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
        return gl.load(self.token_ptr + gl.minimum(row, tile.k_end - 1), mask=tile.k_end > tile.k_begin, other=0)

    @gluon.jit
    def next_tokens(self, tile, k, tokens):
        return self.tokens(tile, k)

    @gluon.jit
    def load(self, tile, k, tokens, ready, upper, lower):
        live = (k + gl.arange(0, BK, gl.SliceLayout(1, COPY)) < tile.k_end)[:, None]
        col = tile.row - tile.expert * self.width
        ptrs = _token_tile(self.ptr + col, self.stride, tokens, 0, HALF)
        async_copy.async_copy_global_to_shared(upper, ptrs, mask=live)
        async_copy.async_copy_global_to_shared(lower, ptrs + HALF, mask=live & (col + HALF < self.width))


@aggregate
class PlainSteps:
    """rhs of a weight gradient, read in place through a ragged descriptor: zeros past the expert's rows."""

    desc: tma.tensor_descriptor
    BYTES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc):
        self.desc = desc
        self.BYTES = gl.constexpr(2 * 64 * 256)

    @gluon.jit
    def load(self, tile, k, ready, buffer):
        tma.async_copy_global_to_shared(
            self.desc, _ragged(k, tile.k_end, tile.col), ready, _as_ragged(buffer, self.desc)
        )


@gluon.jit
def _ragged(row, row_end, col):
    """Coordinates of a ragged descriptor: a block from (row, col) whose rows end at row_end."""
    return RAGGED_ROWS, row_end, RAGGED_ROWS - (row_end - row), col


@gluon.jit
def _as_ragged(buffer, desc):
    return buffer._reinterpret(desc.dtype, [1, 1, buffer.shape[0], buffer.shape[1]], desc.layout)


@gluon.jit
def _halves(v):
    width: gl.constexpr = v.shape[1] // 2
    return v.reshape([v.shape[0], 2, width]).permute(0, 2, 1).split()


@gluon.jit
def _quarters(v):
    a, b = _halves(v)
    a0, a1 = _halves(a)
    b0, b1 = _halves(b)
    return a0, a1, b0, b1


@gluon.jit
def _borrowed(ring, stage, W: gl.constexpr):
    """Three (64, 64) buffers of consumer W in a lent stage."""
    rhs = ring.rhs.index(stage)._reinterpret(ring.rhs.dtype, [4, HALF, CHUNK], TILE_SMEM)
    return ring.lhs.index(2 * stage + W), rhs.index(2 * W), rhs.index(2 * W + 1)


@gluon.jit
def _send(blocks, descs, buffers, row, row_end, cols):
    """Sends (64, 64) blocks out, each through a buffer that no store is reading."""
    for i in gl.static_range(len(blocks)):
        buffers[i].store(blocks[i].to(descs[i].dtype))
    _send_buffers(descs, buffers, row, row_end, cols)


@gluon.jit
def _send_buffers(descs, buffers, row, row_end, cols):
    fence_async_shared()
    for i in gl.static_range(len(buffers)):
        where = _ragged(row, row_end, cols[i])
        tma.async_copy_shared_to_global(descs[i], where, _as_ragged(buffers[i], descs[i]))


@gluon.jit
def _sigmoid(g, FAST: gl.constexpr):
    """FAST: one special-function instruction with a relative error of 2^-11 in the tanh, well inside bfloat16."""
    if FAST:
        h = 0.5 * g
        s = 0.5 + 0.5 * gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [h], gl.float32, True, 1)
    else:
        s = 1.0 / (1.0 + gl.exp(-g))
    return s


@gluon.jit
def _up_consumer(ring, tiles, z_up_desc, z_gate_desc, act_desc, z_end, ACT: gl.constexpr, W: gl.constexpr):
    buffers = gl.allocate_shared_memory(act_desc.dtype, [2, HALF, CHUNK], TILE_SMEM)
    FAST: gl.constexpr = act_desc.dtype == gl.bfloat16
    stage = 0
    phase = 0
    held = -1
    acc = gl.zeros((HALF, BN), gl.float32, ACCUMULATOR)
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        row = tile.row + W * HALF
        if row < tile.row_end:
            acc, stage, phase = _accumulate(ring, tile, acc, stage, phase, held, W)
            up_0, up_1, gate_0, gate_1 = _quarters(acc)
            mbarrier.wait(ring.ready.index(stage), phase)
            first, second, third = _borrowed(ring, stage, W)
            z_row_end = gl.minimum(tile.row_end, z_end)
            left, right = tile.col, tile.col + CHUNK
            if row < z_row_end:
                blocks = up_0, gate_0, up_1, gate_1
                descs = z_up_desc, z_gate_desc, z_up_desc, z_gate_desc
                z_buffers = buffers.index(0), buffers.index(1), first, second
                _send(blocks, descs, z_buffers, row, z_row_end, (left, left, right, right))
            if ACT:
                act_0 = up_0 * gate_0 * _sigmoid(gate_0, FAST)
                act_1 = up_1 * gate_1 * _sigmoid(gate_1, FAST)
                tma.store_wait(3)  # frees the first buffer
                act_buffers = buffers.index(0), third
                _send((act_0, act_1), (act_desc, act_desc), act_buffers, row, tile.row_end, (left, right))
            held = stage
            stage, phase = _advance(stage, phase)
        else:
            stage, phase = _hand_back(ring, tile.steps() + 1, stage, phase, held)
            held = -1
    tma.store_wait(0)


@gluon.jit
def _first_live_tile(tiles_ptr, offsets_ptr, num_tiles, first_row):
    """Index of the first tile with a row at or past first_row, by bisection (tiles are in row order)."""
    low = gl.to_tensor(0)
    high = num_tiles
    while low < high:
        middle = (low + high) // 2
        word = gl.load(tiles_ptr + middle)
        expert = word & 0xFFFF
        row = gl.load(offsets_ptr + expert) + (word >> 16 & 0xFFFF) * BM
        is_before = gl.minimum(row + BM, gl.load(offsets_ptr + expert + 1)) <= first_row
        low = gl.where(is_before, middle + 1, low)
        high = gl.where(is_before, high, middle)
    return low


_METADATA = ["token_ptr", "tiles_ptr", "offsets_ptr", "num_tiles_ptr"]


@gluon.jit(do_not_specialize=["first_row", "z_end"], do_not_specialize_on_alignment=_METADATA)
def up_proj_kernel(
    x_ptr, x_stride, token_ptr, w_desc, z_up_desc, z_gate_desc, act_desc,
    tiles_ptr, offsets_ptr, num_tiles_ptr, D, F, first_row, z_end,
    ACT: gl.constexpr, IN_STEP: gl.constexpr,
):  # fmt: skip
    """z = gather(x_TD) @ w1[e], act = up * silu(gate).

    Grid: one program per SM, each walks 128-row x 128-column (of F) tiles.
    Writes z rows below z_end of the tiles that reach first_row, and if ACT act_RF for all their rows.
    """
    num_tiles = gl.load(num_tiles_ptr)
    if ACT:
        first_tile = gl.to_tensor(0)
    else:
        first_tile = _first_live_tile(tiles_ptr, offsets_ptr, num_tiles, first_row)
    ring = _make_ring(act_desc.dtype, LHS_IS_KM=False, RHS_IS_NK=False, GATHERS=True, IN_STEP=IN_STEP, LENDS=True)
    tiles = RowTiles(tiles_ptr, offsets_ptr, num_tiles, first_tile, gl.cdiv(F, BN // 2), D, 128)
    lhs = TokenRows(x_ptr, x_stride, token_ptr)
    rhs = ExpertWeights(w_desc, D, gl.to_tensor(0), F, False, True)
    gl.warp_specialize(
        [
            (_up_consumer, (ring, tiles, z_up_desc, z_gate_desc, act_desc, z_end, ACT, 0)),
            (_up_consumer, (ring, tiles, z_up_desc, z_gate_desc, act_desc, z_end, ACT, 1)),
            (_producer, (ring, tiles, lhs, rhs)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _store_consumer(ring, tiles, out_desc, W: gl.constexpr, TRANSPOSED: gl.constexpr = False):
    """TRANSPOSED: the tile is that of the transposed weight gradient of its expert."""
    buffers = gl.allocate_shared_memory(out_desc.dtype, [2, HALF, CHUNK], TILE_SMEM)
    stage = 0
    phase = 0
    held = -1
    acc = gl.zeros((HALF, BN), gl.float32, ACCUMULATOR)
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        row = tile.row + W * HALF
        if row < tile.row_end:
            acc, stage, phase = _accumulate(ring, tile, acc, stage, phase, held, W)
            quarters = _quarters(acc)
            if ring.LENDS:
                mbarrier.wait(ring.ready.index(stage), phase)
            for i in gl.static_range(4):
                if ring.LENDS and i >= 2:
                    buffer = _borrowed(ring, stage, W)[i - 2]
                else:
                    if not ring.LENDS:
                        tma.store_wait(1)
                    buffer = buffers.index(i % 2)
                block = quarters[i].to(out_desc.dtype)
                col = tile.col + i * CHUNK
                if TRANSPOSED:
                    buffer.permute((1, 0)).store(block)
                    before = tile.expert * tiles.N
                    where = _ragged(before + col, before + tiles.N, row - tile.expert * tiles.M)
                else:
                    buffer.store(block)
                    where = _ragged(row, tile.row_end, col)
                fence_async_shared()
                tma.async_copy_shared_to_global(out_desc, where, _as_ragged(buffer, out_desc))
            if ring.LENDS:
                held = stage
                stage, phase = _advance(stage, phase)
        else:
            stage, phase = _hand_back(ring, tile.steps() + (1 if ring.LENDS else 0), stage, phase, held)
            held = -1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["first_col"], do_not_specialize_on_alignment=_METADATA)
def rows_kernel(
    in_desc, w_desc, out_desc, tiles_ptr, offsets_ptr, num_tiles_ptr, width, w_rows, first_col, num_cols,
    W_IS_NK: gl.constexpr, LENDS: gl.constexpr,
):  # fmt: skip
    """out[r] = in[r] @ w[e], columns [first_col, first_col + width of out): down projection, and dx.

    Grid: one program per SM, each walks 128x256 tiles. in (R, width), out (R, columns);
    w_desc (E * w_rows, ...): (width, columns) of each expert, or (columns, width) if W_IS_NK.
    """
    num_tiles = gl.load(num_tiles_ptr)
    ring = _make_ring(out_desc.dtype, LHS_IS_KM=False, RHS_IS_NK=W_IS_NK, GATHERS=False, IN_STEP=False, LENDS=LENDS)
    tiles = RowTiles(tiles_ptr, offsets_ptr, num_tiles, gl.to_tensor(0), gl.cdiv(num_cols, BN), width, 256)
    lhs = PlainRows(in_desc)
    rhs = ExpertWeights(w_desc, w_rows, first_col, gl.to_tensor(0), W_IS_NK, False)
    gl.warp_specialize(
        [
            (_store_consumer, (ring, tiles, out_desc, 0)),
            (_store_consumer, (ring, tiles, out_desc, 1)),
            (_producer, (ring, tiles, lhs, rhs)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@aggregate
class SavedZ:
    """z rows of the backward, as (2, rows, F): of the tiles below num_saved from saved, of the others from rest."""

    saved_desc: tma.tensor_descriptor
    rest_desc: tma.tensor_descriptor
    num_saved: gl.tensor

    @gluon.constexpr_function
    def __init__(self, saved_desc, rest_desc, num_saved):
        self.saved_desc = saved_desc
        self.rest_desc = rest_desc
        self.num_saved = num_saved

    @gluon.jit
    def load(self, tile, col, ready, buffer):
        buffer = buffer._reinterpret(self.saved_desc.dtype, [2, BM, CHUNK], Z_SMEM)
        if gl.minimum(tile.row + BM, tile.row_end) <= self.num_saved:
            tma.async_copy_global_to_shared(self.saved_desc, [0, tile.row, col], ready, buffer)
        else:
            tma.async_copy_global_to_shared(self.rest_desc, [0, tile.row, col], ready, buffer)


@gluon.jit
def _down_backward_producer(ring, tiles, lhs, rhs, z):
    """After the steps of a tile, its z: 64 columns of up and gate in the rhs of each of four stages."""
    stage = 0
    phase = 1
    pending = -1
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        stage, phase, pending = _fill(ring, tile, lhs, rhs, stage, phase, pending)
        for i in range(Z_STEPS):
            ready = ring.ready.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(ready, rhs.BYTES)
            z.load(tile, tile.col + i * CHUNK, ready, ring.rhs.index(stage))
            pending = _commit(ring, stage, pending)
            stage, phase = _advance(stage, phase)
    _report_last(ring, pending)


@gluon.jit
def _down_backward_consumer(
    ring, tiles, score_ptr, dz_up_desc, dz_gate_desc, act_desc, dscore_ptr, W: gl.constexpr
):
    """The results take the place of z in its stage, score * act that of the lhs, until their stores have read them."""
    dtype: gl.constexpr = act_desc.dtype
    FAST: gl.constexpr = dtype == gl.bfloat16
    stage = 0
    phase = 0
    held = -1
    acc = gl.zeros((HALF, BN), gl.float32, ACCUMULATOR)
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        row = tile.row + W * HALF
        rows = row + gl.arange(0, HALF, gl.SliceLayout(1, SLICE_ACCUMULATOR))
        score = gl.load(score_ptr + rows, mask=rows < tile.row_end, other=0.0)
        if row < tile.row_end:
            acc, stage, phase = _accumulate(ring, tile, acc, stage, phase, held, W)
            slices = _quarters(acc)
            dscore = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, SLICE_ACCUMULATOR))
            for i in gl.static_range(Z_STEPS):
                mbarrier.wait(ring.ready.index(stage), phase)
                up_buffer = ring.rhs.index(stage).slice(W * HALF, HALF)
                gate_buffer = ring.rhs.index(stage).slice(BM + W * HALF, HALF)
                act_buffer = ring.lhs.index(2 * stage + W)
                halves = _halves(slices[i])
                for h in gl.static_range(2):  # 64 columns at once would not fit into the registers
                    up_half = up_buffer.slice(h * CHUNK // 2, CHUNK // 2, 1)
                    gate_half = gate_buffer.slice(h * CHUNK // 2, CHUNK // 2, 1)
                    dact = gl.convert_layout(halves[h], SLICE_ACCUMULATOR)
                    up = up_half.load(SLICE_ACCUMULATOR).to(gl.float32)
                    gate = gate_half.load(SLICE_ACCUMULATOR).to(gl.float32)
                    sigmoid = _sigmoid(gate, FAST)
                    silu = gate * sigmoid
                    act = up * silu
                    dscore += gl.sum(dact * act, axis=1)
                    scaled = dact * score[:, None]
                    up_half.store((scaled * silu).to(dtype))
                    gate_half.store((scaled * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype))
                    act_buffer.slice(h * CHUNK // 2, CHUNK // 2, 1).store((act * score[:, None]).to(dtype))
                col = tile.col + i * CHUNK
                descs = dz_up_desc, dz_gate_desc, act_desc
                _send_buffers(descs, (up_buffer, gate_buffer, act_buffer), row, tile.row_end, (col, col, col))
                if i > 0:
                    tma.store_wait(3)
                    mbarrier.arrive(ring.empty.index(held))
                held = stage
                stage, phase = _advance(stage, phase)
            part = rows.to(gl.int64) * tiles.num_cols + tile.col // BN
            gl.store(dscore_ptr + part, dscore, mask=rows < tile.row_end)
        else:
            stage, phase = _hand_back(ring, tile.steps() + Z_STEPS, stage, phase, held)
            held = -1
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["num_saved"],
    do_not_specialize_on_alignment=_METADATA + ["score_ptr", "dscore_ptr"],
)
def down_proj_backward_kernel(
    dout_ptr, dout_stride, token_ptr, w_desc, z_saved_desc, z_rest_desc, num_saved, score_ptr,
    dz_up_desc, dz_gate_desc, act_desc, dscore_ptr, tiles_ptr, offsets_ptr, num_tiles_ptr, D, F,
    IN_STEP: gl.constexpr,
):  # fmt: skip
    """dact = gather(dout_TD) @ w2[e]^T, then the backward of score * up * silu(gate).

    Grid: one program per SM, each walks 128-row x 256-column (of F) tiles.
    Writes dz_R2F (up and gate halves through a descriptor each), score * act, and per column tile
    the row sums of dact * act: dscore_ptr (R, cdiv(F, 256)) float32.
    """
    num_tiles = gl.load(num_tiles_ptr)
    ring = _make_ring(act_desc.dtype, LHS_IS_KM=False, RHS_IS_NK=True, GATHERS=True, IN_STEP=IN_STEP, LENDS=True)
    tiles = RowTiles(tiles_ptr, offsets_ptr, num_tiles, gl.to_tensor(0), gl.cdiv(F, BN), D, 256)
    lhs = TokenRows(dout_ptr, dout_stride, token_ptr)
    rhs = ExpertWeights(w_desc, F, gl.to_tensor(0), gl.to_tensor(0), True, False)
    z = SavedZ(z_saved_desc, z_rest_desc, num_saved)
    gl.warp_specialize(
        [
            (_down_backward_consumer, (ring, tiles, score_ptr, dz_up_desc, dz_gate_desc, act_desc, dscore_ptr, 0)),
            (_down_backward_consumer, (ring, tiles, score_ptr, dz_up_desc, dz_gate_desc, act_desc, dscore_ptr, 1)),
            (_down_backward_producer, (ring, tiles, lhs, rhs, z)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit(do_not_specialize=["E"], do_not_specialize_on_alignment=["token_ptr", "offsets_ptr"])
def weight_grad_kernel(
    gathered_ptr, stride, token_ptr, rows_desc, dw_desc, offsets_ptr, E, M, N, TRANSPOSED: gl.constexpr
):
    """gathered[token of the expert's rows]^T @ rows[the expert's rows], (E, M, N); stored as (E, N, M) if TRANSPOSED.

    Grid: one program per SM, each walks 128x256 tiles.
    """
    ring = _make_ring(dw_desc.dtype, LHS_IS_KM=True, RHS_IS_NK=False, GATHERS=True, IN_STEP=False, LENDS=True)
    tiles = WeightTiles(offsets_ptr, E, M, N, gl.cdiv(M, BM), gl.cdiv(N, BN))
    lhs = TokenSteps(gathered_ptr, stride, token_ptr, M)
    rhs = PlainSteps(rows_desc)
    gl.warp_specialize(
        [
            (_store_consumer, (ring, tiles, dw_desc, 0, TRANSPOSED)),
            (_store_consumer, (ring, tiles, dw_desc, 1, TRANSPOSED)),
            (_producer, (ring, tiles, lhs, rhs)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def supported(dtype, D, F, capability):
    """Whether the family takes this dtype (bfloat16, float16), these widths (multiples of 64), this GPU (9.0)
    and this Triton: 3.8 refuses to store from a slice of a buffer, as the ragged stores do."""
    fits = dtype in (torch.bfloat16, torch.float16) and D % 64 == 0 and F % 64 == 0
    return fits and tuple(capability) == (9, 0) and TRITON_VERSION in ((3, 6), (3, 7))


def dscore_parts(F):
    """Columns of the dscore_partial buffer of `down_proj_backward`."""
    return cdiv(F, BN.value)


@functools.cache
def _num_programs(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def _grid(tensor):
    return (_num_programs(tensor.device),)


class _Descriptor(TensorDescriptor):
    """A descriptor made at every launch: skips checks that cost more than the rest of its making."""

    def __init__(self, base, shape, strides, block_shape, layout):
        self.base = base
        self.shape = shape
        self.strides = strides
        self.block_shape = block_shape
        self.layout = layout
        self.padding = "zero"
        # the layout goes with the number of dimensions
        self.specialisation = base.dtype, *block_shape


def _block(tensor, rows, cols, block_rows, block_cols):
    return _Descriptor(tensor, [rows, cols], [cols, 1], [block_rows, block_cols], TILE_SMEM.value)


def _ragged_block(tensor, cols, block_rows=64, block_cols=64):
    """Descriptor over the rows of a 2-d tensor whose bounds can be set at any row; see RAGGED_ROWS."""
    stride = tensor.stride(0)
    return _Descriptor(
        tensor,
        [RAGGED_OUTER, RAGGED_OUTER, RAGGED_ROWS.value, cols],
        [RAGGED_WRAP - stride, stride, stride, 1],
        [1, 1, block_rows, block_cols],
        RAGGED_SMEM.value,
    )


def _up_and_gate(z, F):
    return _Descriptor(z, [2, z.shape[0], F], [F, z.stride(0), 1], [2, BM.value, CHUNK.value], Z_SMEM.value)


def _tiles(routing):
    return routing.tiles, routing.offsets_E1, routing.num_tiles


def _launch_up_proj(x_TD, w1_ED2F, routing, z, act_RF, first_row, z_end):
    E, D, F2 = w1_ED2F.shape
    F = F2 // 2
    with_act = act_RF is not None
    # without z rows the kernel still wants descriptors: any tensor of this width will do
    up, gate = (z, z[:, F:]) if z_end > 0 else (act_RF, act_RF)
    z_up_desc = _ragged_block(up, F)
    launch(
        up_proj_kernel, _grid(x_TD),
        x_TD, x_TD.stride(0), routing.token_R, _block(w1_ED2F, E * D, F2, 64, 128),
        z_up_desc, _ragged_block(gate, F), _ragged_block(act_RF, F) if with_act else z_up_desc,
        *_tiles(routing), D, F, first_row, z_end, ACT=with_act, IN_STEP=D >= IN_STEP_WIDTH, num_warps=4,
    )  # fmt: skip


def up_proj(x_TD, w1_ED2F, routing, z_S2F, num_saved, act_RF):
    """act[r] = up * silu(gate) of z[r] = x[token_R[r]] @ w1[e]; keeps z[r] for r < num_saved.

    Args:
        x_TD, w1_ED2F: bfloat16 or float16, contiguous.
        z_S2F: at least num_saved rows; may be None when num_saved is 0.
        act_RF: output.
    """
    if act_RF.shape[0]:
        _launch_up_proj(x_TD, w1_ED2F, routing, z_S2F, act_RF, 0, num_saved)


def recompute_z(x_TD, w1_ED2F, routing, first_row, z_R2F):
    """z[r] for r >= first_row into row r of z_R2F (R, 2F).

    Works in whole tiles: rows of the same tile that come before first_row are written too.
    """
    R = z_R2F.shape[0]
    if first_row < R:
        _launch_up_proj(x_TD, w1_ED2F, routing, z_R2F, None, first_row, R)


def _launch_rows(in_RC, w, w_shape, w_is_nk, routing, out, first_col):
    rows, cols = w_shape
    E, width = w.shape[0], in_RC.shape[1]
    w_desc = _block(w, E * rows, cols, *((256, 64) if w_is_nk else (64, 256)))
    launch(
        rows_kernel, _grid(in_RC),
        _block(in_RC, in_RC.shape[0], width, 64, 64), w_desc, _ragged_block(out, out.shape[1]),
        *_tiles(routing), width, rows, first_col, out.shape[1],
        W_IS_NK=w_is_nk, LENDS=width >= LENDING_WIDTH, num_warps=4,
    )  # fmt: skip


def down_proj(act_RF, w2_EFD, routing, y_RD, first_col=0):
    """y = act @ w2[e], columns [first_col, first_col + y.shape[1])."""
    if act_RF.shape[0]:
        _launch_rows(act_RF, w2_EFD, w2_EFD.shape[1:], False, routing, y_RD, first_col)


def up_proj_backward(dz_R2F, w1_ED2F, routing, dx_RD, first_col=0):
    """dx rows = dz @ w1[e]^T, columns [first_col, first_col + dx.shape[1])."""
    if dz_R2F.shape[0]:
        _launch_rows(dz_R2F, w1_ED2F, w1_ED2F.shape[1:], True, routing, dx_RD, first_col)


def down_proj_backward(
    dout_TD, w2_EFD, routing, score_R, z_saved, num_saved, z_rest, dz_R2F, act_scaled_RF, dscore_partial
):
    """Backward of score * down_proj(up * silu(gate)) up to dz.

    z of a tile comes from z_saved if all its rows are below num_saved, else from z_rest, which may
    share memory with dz_R2F. dscore_partial: (R, dscore_parts(F)) float32, whose row sums are the
    scores' gradients.
    """
    E, F, D = w2_EFD.shape
    if not dz_R2F.shape[0]:
        return
    z_saved = z_rest if num_saved == 0 else z_saved
    z_rest = z_saved if z_rest is None else z_rest
    launch(
        down_proj_backward_kernel, _grid(dout_TD),
        dout_TD, dout_TD.stride(0), routing.token_R, _block(w2_EFD, E * F, D, 256, 64),
        _up_and_gate(z_saved, F), _up_and_gate(z_rest, F), num_saved, score_R,
        _ragged_block(dz_R2F, F), _ragged_block(dz_R2F[:, F:], F), _ragged_block(act_scaled_RF, F), dscore_partial,
        *_tiles(routing), D, F, IN_STEP=D >= IN_STEP_WIDTH, num_warps=4,
    )  # fmt: skip


def weight_grad(gathered_TM, rows_RN, routing, dw, transposed=False):
    """dw[e] (M, N) = gathered[token of e's rows]^T @ rows[e's rows], or if transposed its transpose (N, M).

    An expert without rows gets zeros. The gathered side is the one whose tiles are 128 wide either
    way: it costs half the copies of a 256 wide one.
    """
    E = dw.shape[0]
    M, N = gathered_TM.shape[1], rows_RN.shape[1]
    if not rows_RN.shape[0]:
        dw.zero_()
        return
    launch(
        weight_grad_kernel, _grid(dw),
        gathered_TM, gathered_TM.stride(0), routing.token_R, _ragged_block(rows_RN, N, 64, 256),
        _ragged_block(dw.view(-1, dw.shape[2]), dw.shape[2]), routing.offsets_E1, E, M, N,
        TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip
