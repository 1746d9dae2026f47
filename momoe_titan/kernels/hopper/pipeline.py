"""The pipeline of a program: a ring of shared-memory stages, the producer that fills it, the products that empty it.

A stage goes around: the producer waits until the stage is `empty`, loads both operands of one step of the
contraction, and its barrier `ready` completes when they have arrived; each consumer multiplies its half of lhs by
rhs and arrives at `empty` once its tensor cores have read the stage. Both sides walk the same tiles in the same
order, so a stage index and a phase bit are all they need to agree on.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

# Gluon's compiler reads this code; its types are not those of Python that runs.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

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

from momoe_titan.kernels.hopper.layouts import (
    BARRIER_SMEM,
    BK,
    BN,
    CHUNK,
    HALF,
    STAGES,
    SYNC_SLOTS,
    SYNC_STEPS,
    TILE_SMEM,
    Z_STEPS,
)
from momoe_titan.kernels.hopper.operands import TwoBufferRows, TwoBufferSteps, is_saved

DELAYS = gl.constexpr(False)  # of random length, in producer and consumers; only tests.trust.stress sets it


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
    STORES_FROM_STAGES: gl.constexpr  # results take the place of operands until their stores have read them

    @gluon.constexpr_function
    def __init__(self, lhs, rhs, ready, empty, LHS_IS_KM, RHS_IS_NK, GATHERS, STORES_FROM_STAGES):
        self.lhs = lhs
        self.rhs = rhs
        self.ready = ready
        self.empty = empty
        self.LHS_IS_KM = gl.constexpr(LHS_IS_KM)
        self.RHS_IS_NK = gl.constexpr(RHS_IS_NK)
        self.GATHERS = gl.constexpr(GATHERS)
        self.STORES_FROM_STAGES = gl.constexpr(STORES_FROM_STAGES)


@gluon.jit
def make_ring(
    dtype: gl.constexpr, LHS_IS_KM: gl.constexpr, RHS_IS_NK: gl.constexpr,
    GATHERS: gl.constexpr, STORES_FROM_STAGES: gl.constexpr,
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
    return Ring(lhs, rhs, ready, empty, LHS_IS_KM, RHS_IS_NK, GATHERS, STORES_FROM_STAGES)


@gluon.jit
def random_delay(PLACE: gl.constexpr):
    """A quarter of the times a sleep of up to 4 microseconds, of a length that the clock and the place decide.

    For a test: a role that relies on another's speed gives a wrong result. In no kernel unless DELAYS.
    """
    asm: gl.constexpr = """{
        .reg .pred p;
        .reg .u32 t;
        mov.u32 t, %clock;
        mad.lo.u32 t, t, 1664525, $1;
        shr.u32 t, t, 16;
        and.b32 $0, t, 3;
        setp.eq.u32 p, $0, 0;
        and.b32 t, t, 4095;
        @p nanosleep.u32 t;
        mov.u32 $0, t;
    }"""
    gl.inline_asm_elementwise(asm, "=r,r", [gl.to_tensor(PLACE * 1013904223 % 65521)], gl.int32, False, 1)


@gluon.jit
def advance(stage, phase):
    """The next stage, and the phase of its barriers."""
    if DELAYS:
        random_delay(1)
    stage += 1
    phase = gl.where(stage == STAGES, phase ^ 1, phase)
    stage = gl.where(stage == STAGES, 0, stage)
    return stage, phase


@gluon.jit
def _commit(ring, stage):
    """Makes this thread's copies into the stage signal `ready` when they are done."""
    if ring.GATHERS:
        async_copy.mbarrier_arrive(ring.ready.index(stage), increment_count=False)


@aggregate
class ProgramSync:
    """Keeps the persistent programs of one launch on nearby tiles, so that operands they share stay in L2.

    Each program publishes how many tiles its producer has loaded. Before the next tile the producer polls until all
    programs have published that many; the wait hides behind the stages already in the ring. Speed only: results
    don't depend on it. After `max_polls` failed polls a program stops synchronising: another kernel may hold some
    SMs, or one program may have a far longer tile (a weight gradient of an expert with many more rows).
    """

    counts_ptr: gl.tensor  # (SYNC_SLOTS,) int32: at the launch 0 for each program, a huge count in the other slots
    max_polls: gl.tensor  # 0: no program polls or publishes

    @gluon.constexpr_function
    def __init__(self, counts_ptr, max_polls):
        self.counts_ptr = counts_ptr
        self.max_polls = max_polls

    @gluon.jit
    def _lowest_count(self):
        """The smallest of all counts. Each warp reads all of them, so that no warp waits for another."""
        layout: gl.constexpr = gl.BlockedLayout([SYNC_SLOTS // 32, 1], [1, 32], [4, 1], [1, 0])
        rows = gl.arange(0, SYNC_SLOTS // 32, gl.SliceLayout(1, layout))[:, None]
        slots = rows * 32 + gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
        return gl.min(gl.min(gl.load(self.counts_ptr + slots, volatile=True), 0), 0)

    @gluon.jit
    def wait(self, count, max_polls):
        """Polls until all programs have published count. Returns max_polls for the next wait: 0 if this one failed."""
        polls = gl.to_tensor(0)
        if max_polls > 0:
            while (polls < max_polls) & (self._lowest_count() < count):
                polls += 1
        return gl.where(polls < max_polls, max_polls, 0)

    @gluon.jit
    def publish_at(self, tile):
        """The step of a tile's contraction at which the tile is published; -1 for none."""
        step = tile.k_begin + gl.maximum(tile.steps() - SYNC_STEPS, 0) * BK
        return gl.where(self.max_polls > 0, step, -1)

    @gluon.jit
    def publish(self, count):
        gl.store(self.counts_ptr + gl.program_id(0), count)

    @gluon.jit
    def retire(self):
        """Publishes a count above any that others wait for, since this program has no tile left."""
        if self.max_polls > 0:
            self.publish(1 << 30)


@gluon.jit
def _fill(ring, tile, lhs, rhs, stage, phase, sync=None, count=0, publish_at=-1):
    """Fills the ring with the steps of one tile. A step's own tokens are fetched two steps before their rows.

    sync: at step publish_at the program publishes that it has loaded count tiles.
    """
    tokens = lhs.tokens(tile, tile.k_begin)
    next_tokens = lhs.next_tokens(tile, tile.k_begin + BK, tokens)
    for k in range(tile.k_begin, tile.k_stop(), BK):
        # Loaded first: the assignment at the end of the step waits for their arrival.
        new_tokens = lhs.next_tokens(tile, k + 2 * BK, next_tokens)
        if sync is not None:
            if k == publish_at:
                sync.publish(count)
        ready = ring.ready.index(stage)
        mbarrier.wait(ring.empty.index(stage), phase)
        mbarrier.expect(ready, lhs.BYTES + rhs.BYTES)
        rhs.load(tile, k, ready, ring.rhs.index(stage))
        if DELAYS:
            random_delay(2)
        lhs.load(tile, k, tokens, ready, ring.lhs.index(2 * stage), ring.lhs.index(2 * stage + 1))
        _commit(ring, stage)
        tokens = next_tokens
        next_tokens = new_tokens
        stage, phase = advance(stage, phase)
    return stage, phase


@gluon.jit
def producer(ring, tiles, lhs, rhs, sync):
    """Fills the ring, tile by tile.

    For an operand in two buffers, the buffer is chosen outside the loop over steps, which is faster.
    """
    lhs_in_two: gl.constexpr = isinstance(lhs, TwoBufferRows)
    rhs_in_two: gl.constexpr = isinstance(rhs, TwoBufferSteps)
    stage = 0
    phase = 1
    count = gl.to_tensor(0)
    publish_at = gl.to_tensor(-1)
    if sync is not None:
        max_polls = sync.max_polls
    packed_tile = tiles.packed_tile(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, packed_tile)
        packed_tile = tiles.packed_tile(t + gl.num_programs(0))
        if sync is not None:
            max_polls = sync.wait(count, max_polls)
            count += 1
            publish_at = sync.publish_at(tile)
        if lhs_in_two:
            if is_saved(tile.row, tile.row_end, lhs.num_saved):
                stage, phase = _fill(ring, tile, lhs.saved, rhs, stage, phase, sync, count, publish_at)
            else:
                stage, phase = _fill(ring, tile, lhs.rest, rhs, stage, phase, sync, count, publish_at)
        elif rhs_in_two:
            k = rhs.end_of_saved(tile)
            if k > tile.k_begin:
                part = tile.within(tile.k_begin, k)
                stage, phase = _fill(ring, part, lhs, rhs.saved, stage, phase, sync, count, publish_at)
            if k < tile.k_end or tile.k_begin == tile.k_end:
                part = tile.within(k, tile.k_end)
                stage, phase = _fill(ring, part, lhs, rhs.rest, stage, phase, sync, count, publish_at)
        else:
            stage, phase = _fill(ring, tile, lhs, rhs, stage, phase, sync, count, publish_at)
    if sync is not None:
        sync.retire()


@gluon.jit
def producer_with_z(ring, tiles, lhs, rhs, z):
    """Loads a tile's z after the steps of its product: 64 columns of up and gate in the rhs of each of four stages."""
    stage = 0
    phase = 1
    packed_tile = tiles.packed_tile(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, packed_tile)
        packed_tile = tiles.packed_tile(t + gl.num_programs(0))
        stage, phase = _fill(ring, tile, lhs, rhs, stage, phase)
        for i in range(Z_STEPS):
            ready = ring.ready.index(stage)
            mbarrier.wait(ring.empty.index(stage), phase)
            mbarrier.expect(ready, rhs.BYTES)
            z.load(tile, tile.col + i * CHUNK, ready, ring.rhs.index(stage))
            _commit(ring, stage)
            stage, phase = advance(stage, phase)


@gluon.jit
def _release(ring, stage):
    """Returns a stage (-1 for none) to the producer, once stores have read the results in it."""
    if ring.STORES_FROM_STAGES:
        tma.store_wait(0)
    if DELAYS:
        random_delay(3)
    mbarrier.arrive(ring.empty.index(gl.maximum(stage, 0)), pred=stage >= 0)


@gluon.jit
def multiply(ring, tile, acc, stage, phase, W: gl.constexpr, results_stage=-1, pending=None):
    """Returns the (64, 256) product of consumer W over the tile's contraction, one MMA in flight.

    acc: any value; it is overwritten.
    results_stage: the stage that holds results of the tile before, released under the first MMA.
    pending: the `PendingTile` before this one, stored under the MMAs: a block every few steps, which leaves the loads
        room, or a block each step in a tile of too few steps.
    """
    if pending is not None:
        wide: gl.constexpr = pending.store.STEPS_APART
        apart = gl.where(tile.steps() >= wide * pending.store.COUNT, wide * BK, BK)
    last = results_stage
    for k in range(tile.k_begin, tile.k_stop(), BK):
        if DELAYS:
            random_delay(4 + W)
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
        _release(ring, last)
        if pending is not None:
            for i in gl.static_range(pending.store.COUNT):
                if k == tile.k_begin + i * apart:
                    if DELAYS:
                        random_delay(6 + i)
                    pending.send(i)
        last = stage
        stage, phase = advance(stage, phase)
    acc = warpgroup_mma_wait(0, deps=[acc])
    _release(ring, last)
    if pending is not None:
        for i in gl.static_range(1, pending.store.COUNT):
            if tile.steps() * BK <= i * apart:
                pending.send(i)
    return acc, stage, phase
