"""Kernels of the grouped GEMMs for Hopper (sm_90), in Gluon; hopper.py launches them.

Every kernel here is one persistent, warp-specialised loop over 128x256 output tiles: a producer
warpgroup fills a ring of shared-memory stages (TMA, or cp.async where rows are gathered through
their token), two consumer warpgroups own 64 rows each and keep a 64x256 float32 accumulator, and
TMA stores, clipped at the last row of the expert, send the result out. The second consumer works
where none of its rows exist, too: a tile that took less time would put its program out of step
with those that read the same operands. Results wait in registers and go out under the products of
the next tile (`Results`): those of down, dx and the weight gradients, up's z, and its act where no z
is kept. Act beside z, and all of down backward, go out at once. In long launches of up and of the weight
gradients the producers keep in step (`Pace`). The kernels differ in their operands
(`TokenRows`, `PlainRows`, `RowsInTwo`, `ExpertWeights`, `TokenSteps`, `PlainSteps`, `StepsInTwo`), in
their tile order (`RowTiles`, `WeightTiles`) and in their epilogue.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

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
from triton.language.core import _aggregate as aggregate

HALF = gl.constexpr(64)  # output rows of one consumer
BM = gl.constexpr(128)  # output rows of a tile
BN = gl.constexpr(256)  # output columns of a tile; SwiGLU: 128 of up beside the same 128 of gate
BK = gl.constexpr(64)  # contraction of one stage
CHUNK = gl.constexpr(64)  # columns of one TMA store
STAGES = gl.constexpr(4)

# 504 registers are to be had for one thread of each of the three warpgroups: the second consumer and
# the producer ask for these, the first consumer is left with as many as the second.
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)

# Programs kept in step (see `Pace`) tell of a tile so many steps before its end.
PACE_STEPS = gl.constexpr(8)
PACE_SLOTS = gl.constexpr(256)  # no Hopper GPU has more programs
# Row tiles at a time of a weight gradient, all columns of them before the next ones.
WEIGHT_ROWS_AT_A_TIME = gl.constexpr(16)

# A descriptor for ragged rows has two extra dimensions whose strides cancel modulo 2^64, so that
# the bounds check on the row dimension can be placed at any row (see triton.tools.ragged_tma).
RAGGED_ROWS = gl.constexpr(1 << 30)

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
    LENDS: gl.constexpr  # results wait in a stage until their stores have read them

    @gluon.constexpr_function
    def __init__(self, lhs, rhs, ready, empty, LHS_IS_KM, RHS_IS_NK, GATHERS, LENDS):
        self.lhs = lhs
        self.rhs = rhs
        self.ready = ready
        self.empty = empty
        self.LHS_IS_KM = gl.constexpr(LHS_IS_KM)
        self.RHS_IS_NK = gl.constexpr(RHS_IS_NK)
        self.GATHERS = gl.constexpr(GATHERS)
        self.LENDS = gl.constexpr(LENDS)


@gluon.jit
def _make_ring(
    dtype: gl.constexpr, LHS_IS_KM: gl.constexpr, RHS_IS_NK: gl.constexpr,
    GATHERS: gl.constexpr, LENDS: gl.constexpr,
):  # fmt: skip
    lhs = gl.allocate_shared_memory(dtype, [2 * STAGES, HALF, BK], TILE_SMEM)
    if RHS_IS_NK:
        rhs = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], TILE_SMEM)
    else:
        rhs = gl.allocate_shared_memory(dtype, [STAGES, BK, BN], TILE_SMEM)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER_SMEM)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER_SMEM)
    for i in gl.static_range(STAGES):
        # one arrival for the TMA bytes, and one of each of the producer's threads for its copies
        mbarrier.init(ready.index(i), count=129 if GATHERS else 1)
        mbarrier.init(empty.index(i), count=2)
    return Ring(lhs, rhs, ready, empty, LHS_IS_KM, RHS_IS_NK, GATHERS, LENDS)


@gluon.jit
def _advance(stage, phase):
    stage += 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    stage = gl.where(stage == STAGES, 0, stage)
    return stage, phase


@gluon.jit
def _commit(ring, stage):
    """Has the copies into a stage reported when they are there."""
    if ring.GATHERS:
        async_copy.mbarrier_arrive(ring.ready.index(stage), increment_count=False)


@aggregate
class Pace:
    """Keeps the programs of a launch in step, so that the L2 still has what they share when the last of them asks for it.

    Programs that take the same time for every tile drift apart over milliseconds all the same. Each tells how many tiles its
    producer has all but filled, and before the next one its producer waits until every other one has told as much, under
    the stages that are ahead of the consumers. No result depends on it. Who has looked `patience` times in vain does not wait
    again: some programs may not run yet, where other kernels hold their multiprocessors, or have a tile that takes
    several times as long, of a weight gradient whose expert has thousands of rows more.
    """

    counts_ptr: gl.tensor  # (PACE_SLOTS,) int32: at the launch 0 for each program, very many in the other slots
    patience: gl.tensor  # 0 if nobody waits and nobody tells

    @gluon.constexpr_function
    def __init__(self, counts_ptr, patience):
        self.counts_ptr = counts_ptr
        self.patience = patience

    @gluon.jit
    def _least(self):
        """The least of all counts. Each warp reads all of them, so that none waits for another."""
        layout: gl.constexpr = gl.BlockedLayout([PACE_SLOTS // 32, 1], [1, 32], [4, 1], [1, 0])
        rows = gl.arange(0, PACE_SLOTS // 32, gl.SliceLayout(1, layout))[:, None]
        slots = rows * 32 + gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
        return gl.min(gl.min(gl.load(self.counts_ptr + slots, volatile=True), 0), 0)

    @gluon.jit
    def wait(self, count, patience):
        """Waits until all have told count. Returns the patience for the next time."""
        looks = gl.to_tensor(0)
        if patience > 0:
            while (looks < patience) & (self._least() < count):
                looks += 1
        return gl.where(looks < patience, patience, 0)

    @gluon.jit
    def tells_at(self, tile):
        """The step of a tile's contraction at which it is told of; -1 for none."""
        step = tile.k_begin + gl.maximum(tile.steps() - PACE_STEPS, 0) * BK
        return gl.where(self.patience > 0, step, -1)

    @gluon.jit
    def tell(self, count):
        gl.store(self.counts_ptr + gl.program_id(0), count)

    @gluon.jit
    def leave(self):
        if self.patience > 0:
            self.tell(1 << 30)


@gluon.jit
def _fill(ring, tile, lhs, rhs, stage, phase, pace=None, count=0, tells_at=-1):
    """Fills the ring with the steps of one tile. A step's own tokens are fetched two steps before their rows.

    pace: told at step tells_at that the program has filled count tiles.
    """
    tokens = lhs.tokens(tile, tile.k_begin)
    next_tokens = lhs.next_tokens(tile, tile.k_begin + BK, tokens)
    for k in range(tile.k_begin, tile.k_stop(), BK):
        # Asked for first, since to pass them on at the end of the step is to wait for them.
        new_tokens = lhs.next_tokens(tile, k + 2 * BK, next_tokens)
        if pace is not None:
            if k == tells_at:
                pace.tell(count)
        ready = ring.ready.index(stage)
        mbarrier.wait(ring.empty.index(stage), phase)
        mbarrier.expect(ready, lhs.BYTES + rhs.BYTES)
        rhs.load(tile, k, ready, ring.rhs.index(stage))
        lhs.load(tile, k, tokens, ready, ring.lhs.index(2 * stage), ring.lhs.index(2 * stage + 1))
        _commit(ring, stage)
        tokens = next_tokens
        next_tokens = new_tokens
        stage, phase = _advance(stage, phase)
    return stage, phase


@gluon.jit
def _producer(ring, tiles, lhs, rhs, pace):
    """Fills the ring, tile by tile.

    Of an operand in two buffers, `RowsInTwo` or `StepsInTwo`, the buffer is chosen outside of the loop over steps.
    """
    lhs_in_two: gl.constexpr = isinstance(lhs, RowsInTwo)
    rhs_in_two: gl.constexpr = isinstance(rhs, StepsInTwo)
    stage = 0
    phase = 1
    count = gl.to_tensor(0)
    tells_at = gl.to_tensor(-1)
    if pace is not None:
        patience = pace.patience
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        if pace is not None:
            patience = pace.wait(count, patience)
            count += 1
            tells_at = pace.tells_at(tile)
        if lhs_in_two:
            if _is_kept(tile.row, tile.row_end, lhs.num_kept):
                stage, phase = _fill(ring, tile, lhs.kept, rhs, stage, phase, pace, count, tells_at)
            else:
                stage, phase = _fill(ring, tile, lhs.rest, rhs, stage, phase, pace, count, tells_at)
        elif rhs_in_two:
            k = rhs.end_of_kept(tile)
            if k > tile.k_begin:
                part = tile.within(tile.k_begin, k)
                stage, phase = _fill(ring, part, lhs, rhs.kept, stage, phase, pace, count, tells_at)
            if k < tile.k_end or tile.k_begin == tile.k_end:
                part = tile.within(k, tile.k_end)
                stage, phase = _fill(ring, part, lhs, rhs.rest, stage, phase, pace, count, tells_at)
        else:
            stage, phase = _fill(ring, tile, lhs, rhs, stage, phase, pace, count, tells_at)
    if pace is not None:
        pace.leave()


@gluon.jit
def _give_back(ring, held):
    """Frees the stage, if there is one, once the stores have read what they find there."""
    if ring.LENDS:
        tma.store_wait(0)
    mbarrier.arrive(ring.empty.index(gl.maximum(held, 0)), pred=held >= 0)


@gluon.jit
def _accumulate(ring, tile, acc, stage, phase, W: gl.constexpr, held=-1, results=None):
    """Returns the (64, 256) product of consumer W over the tile's contraction, one MMA in flight.

    acc: any value, to be overwritten. held: the stage that holds results of the tile before, which goes back under the first
    MMA. results: of the tile before, still in registers, sent under the MMAs, a block every few steps, which leaves the loads
    room; in a tile of too few steps for that a block each.
    """
    if results is not None:
        wide: gl.constexpr = results.outlet.STEPS_APART
        apart = gl.where(tile.steps() >= wide * results.outlet.COUNT, wide * BK, BK)
    last = held
    for k in range(tile.k_begin, tile.k_stop(), BK):
        mbarrier.wait(ring.ready.index(stage), phase)
        if ring.GATHERS:
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
        if results is not None:
            for i in gl.static_range(results.outlet.COUNT):
                if k == tile.k_begin + i * apart:
                    results.send(i)
        last = stage
        stage, phase = _advance(stage, phase)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _give_back(ring, last)
    if results is not None:
        for i in gl.static_range(1, results.outlet.COUNT):
            if tile.steps() * BK <= i * apart:
                results.send(i)
    return acc, stage, phase


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

    @gluon.jit
    def within(self, k_begin, k_end):
        """The same for a part of the contraction."""
        return Tile(self.expert, self.row, self.row_end, self.col, k_begin, k_end)


@aggregate
class RowTiles:
    """Tiles over routed rows, columns fastest: neighbours in time share their rows and their expert.

    If COLS_AT_A_TIME, so many column tiles for all rows, then the next ones: their share of an expert's weights is what
    the L2 has to hold.
    """

    tiles_ptr: gl.tensor
    offsets_ptr: gl.tensor
    num_tiles: gl.tensor
    first_tile: gl.tensor
    num_cols: gl.tensor  # column tiles
    k_end: gl.tensor
    COLS: gl.constexpr  # columns of a tile in each output
    COLS_AT_A_TIME: gl.constexpr  # column tiles; 0 for all

    @gluon.constexpr_function
    def __init__(self, tiles_ptr, offsets_ptr, num_tiles, first_tile, num_cols, k_end, COLS, COLS_AT_A_TIME):
        self.tiles_ptr = tiles_ptr
        self.offsets_ptr = offsets_ptr
        self.num_tiles = num_tiles
        self.first_tile = first_tile
        self.num_cols = num_cols
        self.k_end = k_end
        self.COLS = gl.constexpr(COLS)
        self.COLS_AT_A_TIME = gl.constexpr(COLS_AT_A_TIME)

    @gluon.jit
    def begin(self):
        return self.first_tile * self.num_cols + gl.program_id(0)

    @gluon.jit
    def end(self):
        return self.num_tiles * self.num_cols

    @gluon.jit
    def _place(self, t):
        """Row tile and column tile of tile t."""
        if self.COLS_AT_A_TIME:
            t -= self.first_tile * self.num_cols
            rows = gl.maximum(self.num_tiles - self.first_tile, 1)
            first_col = t // (rows * self.COLS_AT_A_TIME) * self.COLS_AT_A_TIME
            width = gl.minimum(self.num_cols - first_col, self.COLS_AT_A_TIME)
            t -= first_col * rows
            row, col = self.first_tile + t // width, first_col + t % width
        else:
            row, col = t // self.num_cols, t % self.num_cols
        return row, col

    @gluon.jit
    def word(self, t):
        """Packed (j << 16) | expert of tile t; fetched one tile ahead of its use."""
        row, _ = self._place(gl.minimum(t, gl.maximum(self.end() - 1, 0)) if self.COLS_AT_A_TIME else t)
        return gl.load(self.tiles_ptr + gl.maximum(gl.minimum(row, self.num_tiles - 1), 0))

    @gluon.jit
    def tile(self, t, word):
        expert = word & 0xFFFF
        row = gl.load(self.offsets_ptr + expert) + (word >> 16 & 0xFFFF) * BM
        row_end = gl.load(self.offsets_ptr + expert + 1)
        _, col = self._place(t)
        return Tile(expert, row, row_end, col * self.COLS, gl.to_tensor(0), self.k_end)


@gluon.jit
def _uniform(value):
    """A number that all threads have alike, made known as such: loops that it bounds keep their counters in uniform
    registers. To be called where all threads of a warp are."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [value], gl.int32, True, 1)


@aggregate
class WeightTiles:
    """Tiles over a weight gradient (E * M, N), expert by expert; within one, rows fastest, a few row tiles at a time."""

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
        first = q // (WEIGHT_ROWS_AT_A_TIME * self.num_cols) * WEIGHT_ROWS_AT_A_TIME
        height = gl.minimum(self.num_rows - first, WEIGHT_ROWS_AT_A_TIME)
        q -= first * self.num_cols
        return Tile(
            expert,
            expert * self.M + (first + q % height) * BM,
            (expert + 1) * self.M,
            q // height * BN,
            _uniform(gl.load(self.offsets_ptr + expert)),
            _uniform(gl.load(self.offsets_ptr + expert + 1)),
        )


@gluon.jit
def _row_ptrs(ptr, rows, stride):
    """Pointers to rows of 2-byte elements, aligned to 16 bytes: one instruction each, where a 64-bit product takes eight."""
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
        async_copy.async_copy_global_to_shared(upper, _token_tile(self.ptr + k, self.stride, tokens[0]))
        async_copy.async_copy_global_to_shared(lower, _token_tile(self.ptr + k, self.stride, tokens[1]))


@aggregate
class PlainRows:
    """lhs read in place: rows, from row `first` on, of an (R, contraction) tensor. Rows past the expert are not stored."""

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
        tma.async_copy_global_to_shared(self.desc, [row, k], ready, upper)
        tma.async_copy_global_to_shared(self.desc, [row + HALF, k], ready, lower)


@gluon.jit
def _is_kept(row, row_end, num_kept):
    """Whether the row tile from row lies in the first of two buffers: see `SplitRows`."""
    return gl.minimum(row + BM, row_end) <= num_kept


@aggregate
class RowsInTwo:
    """lhs read in place, each row tile in one of two buffers."""

    kept: PlainRows
    rest: PlainRows
    num_kept: gl.tensor

    @gluon.constexpr_function
    def __init__(self, kept, rest, num_kept):
        self.kept = kept
        self.rest = rest
        self.num_kept = num_kept


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
        # Past the last row that row again: rhs is zero there. Of an expert without rows any, which `load` masks.
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
        async_copy.async_copy_global_to_shared(upper, ptrs, mask=live)
        async_copy.async_copy_global_to_shared(lower, ptrs + HALF, mask=live & (col + HALF < self.width))


@aggregate
class PlainSteps:
    """rhs of a weight gradient, rows from row `first` on, through a ragged descriptor: zeros past the expert's rows."""

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
        where = _ragged(k - self.first, tile.k_end - self.first, tile.col)
        tma.async_copy_global_to_shared(self.desc, where, ready, _as_ragged(buffer, self.desc))


@aggregate
class StepsInTwo:
    """rhs of a weight gradient, read in place, each row tile in one of two buffers."""

    kept: PlainSteps
    rest: PlainSteps
    num_kept: gl.tensor

    @gluon.constexpr_function
    def __init__(self, kept, rest, num_kept):
        self.kept = kept
        self.rest = rest
        self.num_kept = num_kept

    @gluon.jit
    def end_of_kept(self, tile):
        """Where the row tiles of `kept` end within the tile's contraction."""
        end = tile.k_begin + gl.maximum(self.num_kept - tile.k_begin, 0) // BM * BM
        return gl.where(tile.k_end <= self.num_kept, tile.k_end, end)


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
def _send(blocks, descs, buffers, row, row_end, cols):
    """Sends (64, 64) blocks out, each through a buffer that no store is reading."""
    for i in gl.static_range(len(blocks)):
        buffers[i].store(blocks[i].to(descs[i].dtype))
    _send_buffers(descs, buffers, row, row_end, cols)


@gluon.jit
def _send_buffers(descs, buffers, row, row_end, cols):
    fence_async_shared()
    _send_fenced(descs, buffers, row, row_end, cols)


@gluon.jit
def _send_fenced(descs, buffers, row, row_end, cols):
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
def _pack(block, dtype: gl.constexpr):
    """(64, 64) float32 as (64, 32) int32 of two columns each: loops keep single 16-bit values in a register of 32."""
    even, odd = block.reshape([HALF, CHUNK // 2, 2]).split()
    asm: gl.constexpr = f"cvt.rn.{'bf16' if dtype == gl.bfloat16 else 'f16'}x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], gl.int32, True, 1)


@gluon.jit
def _pack_quarters(acc, dtype: gl.constexpr):
    a, b, c, d = _quarters(acc)
    return _pack(a, dtype), _pack(b, dtype), _pack(c, dtype), _pack(d, dtype)


@gluon.jit
def _unpack(packed, dtype: gl.constexpr):
    even = packed.to(gl.int16).to(dtype, bitcast=True)
    odd = (packed >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.join(even, odd).reshape([HALF, CHUNK])


@aggregate
class Outlet:
    """Where a consumer's results go, and how."""

    desc: tma.tensor_descriptor
    gate_desc: tma.tensor_descriptor
    buffers: gl.shared_memory_descriptor  # (2, 64, 64)
    COUNT: gl.constexpr  # blocks of 64 columns in a tile
    GATED: gl.constexpr  # the third and the fourth go to the columns of the first two, through gate_desc
    TRANSPOSED: gl.constexpr  # blocks follow each other along the rows of the output
    STEPS_APART: (
        gl.constexpr
    )  # blocks go out so many steps of the next tile apart: the fastest of 1 to 4 for each kernel

    @gluon.constexpr_function
    def __init__(self, desc, gate_desc, buffers, COUNT, GATED, TRANSPOSED, STEPS_APART):
        self.desc = desc
        self.gate_desc = gate_desc
        self.buffers = buffers
        self.COUNT = gl.constexpr(COUNT)
        self.GATED = gl.constexpr(GATED)
        self.TRANSPOSED = gl.constexpr(TRANSPOSED)
        self.STEPS_APART = gl.constexpr(STEPS_APART)


@aggregate
class Results:
    """What a consumer has computed of a tile, (64, 256), on its way out."""

    outlet: Outlet
    block_0: gl.tensor  # 64 columns, packed
    block_1: gl.tensor
    block_2: gl.tensor
    block_3: gl.tensor
    row: gl.tensor  # of the output
    row_end: gl.tensor  # no row from here on is stored
    col: gl.tensor

    @gluon.constexpr_function
    def __init__(self, outlet, block_0, block_1, block_2, block_3, row, row_end, col):
        self.outlet = outlet
        self.block_0 = block_0
        self.block_1 = block_1
        self.block_2 = block_2
        self.block_3 = block_3
        self.row = row
        self.row_end = row_end
        self.col = col

    @gluon.jit
    def send(self, I: gl.constexpr):
        """Sends block I, after the ones before it."""
        out = self.outlet
        if self.row < self.row_end:
            block = _unpack((self.block_0, self.block_1, self.block_2, self.block_3)[I], out.desc.dtype)
            buffer = out.buffers.index(I % 2)
            tma.store_wait(1)
            if out.TRANSPOSED:
                buffer.permute((1, 0)).store(block)
                where = _ragged(self.row + I * CHUNK, self.row_end, self.col)
            else:
                buffer.store(block)
                where = _ragged(self.row, self.row_end, self.col + (I % 2 if out.GATED else I) * CHUNK)
            fence_async_shared()
            desc = out.gate_desc if out.GATED and I >= 2 else out.desc
            tma.async_copy_shared_to_global(desc, where, _as_ragged(buffer, desc))

    @gluon.jit
    def send_all(self):
        for i in gl.static_range(self.outlet.COUNT):
            self.send(i)


@gluon.jit
def _up_consumer(
    ring, tiles, out_desc, gate_desc, act_desc, z_first, z_end, ACT: gl.constexpr, Z: gl.constexpr, W: gl.constexpr
):
    """Stores z, or act if there is no Z, while the next tile is computed, and act beside Z at once.

    out_desc, gate_desc: the halves of z, whose first row is z_first and of which none from z_end on is stored; or act.
    """
    buffers = gl.allocate_shared_memory(act_desc.dtype, [2, HALF, CHUNK], TILE_SMEM)
    dtype: gl.constexpr = act_desc.dtype
    FAST: gl.constexpr = dtype == gl.bfloat16
    if Z:
        outlet = Outlet(out_desc, gate_desc, buffers, 4, True, False, 2)
    else:
        outlet = Outlet(out_desc, gate_desc, buffers, 2, True, False, 1)
    stage = 0
    phase = 0
    acc = gl.zeros((HALF, BN), gl.float32, ACCUMULATOR)
    b0, b1, b2, b3 = _pack_quarters(acc, dtype)
    out_row = gl.to_tensor(0)
    out_end = gl.to_tensor(0)
    out_col = gl.to_tensor(0)
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        row = tile.row + W * HALF
        before = Results(outlet, b0, b1, b2, b3, out_row, out_end, out_col)
        acc, stage, phase = _accumulate(ring, tile, acc, stage, phase, W, results=before)
        if ACT:
            up_0, up_1, gate_0, gate_1 = _quarters(acc)
            act_0 = up_0 * gate_0 * _sigmoid(gate_0, FAST)
            act_1 = up_1 * gate_1 * _sigmoid(gate_1, FAST)
        if Z:
            if ACT:
                tma.store_wait(0)
                cols = tile.col, tile.col + CHUNK
                act_buffers = buffers.index(0), buffers.index(1)
                _send((act_0, act_1), (act_desc, act_desc), act_buffers, row, tile.row_end, cols)
            b0, b1, b2, b3 = _pack_quarters(acc, dtype)
            out_row = row - z_first
            out_end = gl.minimum(tile.row_end, z_end) - z_first
        else:
            b0 = _pack(act_0, dtype)
            b1 = _pack(act_1, dtype)
            out_row = row
            out_end = tile.row_end
        out_col = tile.col
    Results(outlet, b0, b1, b2, b3, out_row, out_end, out_col).send_all()
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


@gluon.jit(
    do_not_specialize=["patience", "first_row", "z_first", "z_end"],
    do_not_specialize_on_alignment=_METADATA + ["counts_ptr"],
)
def up_proj_kernel(
    x_ptr, x_stride, token_ptr, w_desc, z_up_desc, z_gate_desc, act_desc,
    tiles_ptr, offsets_ptr, num_tiles_ptr, counts_ptr, patience, D, F, first_row, z_first, z_end,
    ACT: gl.constexpr, COLS_AT_A_TIME: gl.constexpr,
):  # fmt: skip
    """z = gather(x_TD) @ w1[e], act = up * silu(gate).

    Grid: one program per SM, each walks 128-row x 128-column (of F) tiles.
    Writes z rows below z_end of the tiles that reach first_row, row z_first of all first, unless z_up_desc is None,
    and if ACT act_RF for all their rows. counts, patience: see `Pace`.
    """
    ring = _make_ring(act_desc.dtype, LHS_IS_KM=False, RHS_IS_NK=False, GATHERS=True, LENDS=False)
    num_tiles = gl.load(num_tiles_ptr)
    if ACT:
        first_tile = gl.to_tensor(0)
    else:
        first_tile = _first_live_tile(tiles_ptr, offsets_ptr, num_tiles, first_row)
    tiles = RowTiles(tiles_ptr, offsets_ptr, num_tiles, first_tile, gl.cdiv(F, BN // 2), D, 128, COLS_AT_A_TIME)
    lhs = TokenRows(x_ptr, x_stride, token_ptr)
    rhs = ExpertWeights(w_desc, D, gl.to_tensor(0), F, False, True)
    Z: gl.constexpr = z_up_desc is not None
    if Z:
        up_desc, gate_desc = z_up_desc, z_gate_desc
    else:
        up_desc, gate_desc = act_desc, act_desc
    gl.warp_specialize(
        [
            (_up_consumer, (ring, tiles, up_desc, gate_desc, act_desc, z_first, z_end, ACT, Z, 0)),
            (_up_consumer, (ring, tiles, up_desc, gate_desc, act_desc, z_first, z_end, ACT, Z, 1)),
            (_producer, (ring, tiles, lhs, rhs, Pace(counts_ptr, patience))),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def _store_consumer(ring, tiles, out_desc, W: gl.constexpr, TRANSPOSED: gl.constexpr = False):
    """Stores a tile while the next one is computed.

    TRANSPOSED: the tile is that of the transposed weight gradient of its expert.
    """
    dtype: gl.constexpr = out_desc.dtype
    buffers = gl.allocate_shared_memory(dtype, [2, HALF, CHUNK], TILE_SMEM)
    outlet = Outlet(out_desc, out_desc, buffers, 4, False, TRANSPOSED, 3 if isinstance(tiles, WeightTiles) else 2)
    stage = 0
    phase = 0
    acc = gl.zeros((HALF, BN), gl.float32, ACCUMULATOR)
    # Before the first tile there is nothing: no row is stored.
    b0, b1, b2, b3 = _pack_quarters(acc, dtype)
    out_row = gl.to_tensor(0)
    out_end = gl.to_tensor(0)
    out_col = gl.to_tensor(0)
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        row = tile.row + W * HALF
        before = Results(outlet, b0, b1, b2, b3, out_row, out_end, out_col)
        acc, stage, phase = _accumulate(ring, tile, acc, stage, phase, W, results=before)
        b0, b1, b2, b3 = _pack_quarters(acc, dtype)
        if TRANSPOSED:
            out_row = tile.expert * tiles.N + tile.col
            out_end = (tile.expert + 1) * tiles.N
            out_col = row - tile.expert * tiles.M
        else:
            out_row = row
            out_end = tile.row_end
            out_col = tile.col
    Results(outlet, b0, b1, b2, b3, out_row, out_end, out_col).send_all()
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_kept", "first", "first_col"], do_not_specialize_on_alignment=_METADATA)
def rows_kernel(
    in_desc, rest_desc, num_kept, first, w_desc, out_desc, tiles_ptr, offsets_ptr, num_tiles_ptr,
    width, w_rows, first_col, num_cols,
    W_IS_NK: gl.constexpr, COLS_AT_A_TIME: gl.constexpr,
):  # fmt: skip
    """out[r] = in[r] @ w[e], columns [first_col, first_col + width of out): down projection, and dx.

    Grid: one program per SM, each walks 128x256 tiles. in (R, width), in two buffers unless rest_desc
    is None; out (R, columns); w_desc (E * w_rows, ...): (width, columns) of each expert, or (columns, width) if W_IS_NK.
    """
    ring = _make_ring(out_desc.dtype, LHS_IS_KM=False, RHS_IS_NK=W_IS_NK, GATHERS=False, LENDS=False)
    num_tiles = gl.load(num_tiles_ptr)
    tiles = RowTiles(
        tiles_ptr, offsets_ptr, num_tiles, gl.to_tensor(0), gl.cdiv(num_cols, BN), width, 256, COLS_AT_A_TIME
    )
    if rest_desc is None:
        lhs = PlainRows(in_desc, gl.to_tensor(0))
    else:
        lhs = RowsInTwo(PlainRows(in_desc, gl.to_tensor(0)), PlainRows(rest_desc, first), num_kept)
    rhs = ExpertWeights(w_desc, w_rows, first_col, gl.to_tensor(0), W_IS_NK, False)
    gl.warp_specialize(
        [
            (_store_consumer, (ring, tiles, out_desc, 0)),
            (_store_consumer, (ring, tiles, out_desc, 1)),
            (_producer, (ring, tiles, lhs, rhs, None)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@aggregate
class ZInTwo:
    """z rows of the backward, as (2, rows, F), each row tile in one of two buffers."""

    kept_desc: tma.tensor_descriptor
    rest_desc: tma.tensor_descriptor
    num_kept: gl.tensor
    first: gl.tensor

    @gluon.constexpr_function
    def __init__(self, kept_desc, rest_desc, num_kept, first):
        self.kept_desc = kept_desc
        self.rest_desc = rest_desc
        self.num_kept = num_kept
        self.first = first

    @gluon.jit
    def load(self, tile, col, ready, buffer):
        buffer = buffer._reinterpret(self.kept_desc.dtype, [2, BM, CHUNK], Z_SMEM)
        if _is_kept(tile.row, tile.row_end, self.num_kept):
            tma.async_copy_global_to_shared(self.kept_desc, [0, tile.row, col], ready, buffer)
        else:
            tma.async_copy_global_to_shared(self.rest_desc, [0, tile.row - self.first, col], ready, buffer)


@gluon.jit
def _down_backward_producer(ring, tiles, lhs, rhs, z):
    """After the steps of a tile, its z: 64 columns of up and gate in the rhs of each of four stages."""
    stage = 0
    phase = 1
    word = tiles.word(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, word)
        word = tiles.word(t + gl.num_programs(0))
        stage, phase = _fill(ring, tile, lhs, rhs, stage, phase)
        for i in range(Z_STEPS):
            ready = ring.ready.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(ready, rhs.BYTES)
            z.load(tile, tile.col + i * CHUNK, ready, ring.rhs.index(stage))
            _commit(ring, stage)
            stage, phase = _advance(stage, phase)


@gluon.jit
def _down_backward_consumer(
    ring, tiles, score_ptr, dz_kept_descs, dz_rest_descs, num_kept, dz_first, act_desc, dscore_ptr, W: gl.constexpr
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
        acc, stage, phase = _accumulate(ring, tile, acc, stage, phase, W, held)
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
            _send_buffers((act_desc,), (act_buffer,), row, tile.row_end, (col,))
            if _is_kept(tile.row, tile.row_end, num_kept):
                _send_fenced(dz_kept_descs, (up_buffer, gate_buffer), row, tile.row_end, (col, col))
            else:
                buffers = up_buffer, gate_buffer
                _send_fenced(dz_rest_descs, buffers, row - dz_first, tile.row_end - dz_first, (col, col))
            if i > 0:
                tma.store_wait(3)
                mbarrier.arrive(ring.empty.index(held))
            held = stage
            stage, phase = _advance(stage, phase)
        part = rows.to(gl.int64) * tiles.num_cols + tile.col // BN
        gl.store(dscore_ptr + part, dscore, mask=rows < tile.row_end)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=["z_first", "num_kept", "dz_first"],
    do_not_specialize_on_alignment=_METADATA + ["score_ptr", "dscore_ptr"],
)
def down_proj_backward_kernel(
    dout_ptr, dout_stride, token_ptr, w_desc, z_kept_desc, z_rest_desc, z_first, num_kept, score_ptr,
    dz_kept_up_desc, dz_kept_gate_desc, dz_rest_up_desc, dz_rest_gate_desc, dz_first, act_desc, dscore_ptr,
    tiles_ptr, offsets_ptr, num_tiles_ptr, D, F,
    COLS_AT_A_TIME: gl.constexpr,
):  # fmt: skip
    """dact = gather(dout_TD) @ w2[e]^T, then the backward of score * up * silu(gate).

    Grid: one program per SM, each walks 128-row x 256-column (of F) tiles.
    z and dz are in two buffers each, which may be the same.
    Writes dz_R2F (up and gate halves of each buffer through a descriptor each), score * act, and per column tile
    the row sums of dact * act: dscore_ptr (R, cdiv(F, 256)) float32.
    """
    ring = _make_ring(act_desc.dtype, LHS_IS_KM=False, RHS_IS_NK=True, GATHERS=True, LENDS=True)
    num_tiles = gl.load(num_tiles_ptr)
    tiles = RowTiles(tiles_ptr, offsets_ptr, num_tiles, gl.to_tensor(0), gl.cdiv(F, BN), D, 256, COLS_AT_A_TIME)
    lhs = TokenRows(dout_ptr, dout_stride, token_ptr)
    rhs = ExpertWeights(w_desc, F, gl.to_tensor(0), gl.to_tensor(0), True, False)
    z = ZInTwo(z_kept_desc, z_rest_desc, num_kept, z_first)
    kept, rest = (dz_kept_up_desc, dz_kept_gate_desc), (dz_rest_up_desc, dz_rest_gate_desc)
    gl.warp_specialize(
        [
            (
                _down_backward_consumer,
                (ring, tiles, score_ptr, kept, rest, num_kept, dz_first, act_desc, dscore_ptr, 0),
            ),
            (
                _down_backward_consumer,
                (ring, tiles, score_ptr, kept, rest, num_kept, dz_first, act_desc, dscore_ptr, 1),
            ),
            (_down_backward_producer, (ring, tiles, lhs, rhs, z)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit(
    do_not_specialize=["num_kept", "first", "patience", "E"],
    do_not_specialize_on_alignment=["token_ptr", "offsets_ptr", "counts_ptr"],
)
def weight_grad_kernel(
    gathered_ptr, stride, token_ptr, rows_desc, rest_desc, num_kept, first, dw_desc, offsets_ptr, counts_ptr, patience, E, M, N,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """gathered[token of the expert's rows]^T @ rows[the expert's rows], (E, M, N); stored as (E, N, M) if TRANSPOSED.

    Grid: one program per SM, each walks 128x256 tiles. rows in two buffers unless rest_desc is None. counts, patience: see
    `Pace`.
    """
    ring = _make_ring(dw_desc.dtype, LHS_IS_KM=True, RHS_IS_NK=False, GATHERS=True, LENDS=False)
    tiles = WeightTiles(offsets_ptr, E, M, N, gl.cdiv(M, BM), gl.cdiv(N, BN))
    lhs = TokenSteps(gathered_ptr, stride, token_ptr, M)
    if rest_desc is None:
        rhs = PlainSteps(rows_desc, gl.to_tensor(0))
    else:
        rhs = StepsInTwo(PlainSteps(rows_desc, gl.to_tensor(0)), PlainSteps(rest_desc, first), num_kept)
    gl.warp_specialize(
        [
            (_store_consumer, (ring, tiles, dw_desc, 0, TRANSPOSED)),
            (_store_consumer, (ring, tiles, dw_desc, 1, TRANSPOSED)),
            (_producer, (ring, tiles, lhs, rhs, Pace(counts_ptr, patience))),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
