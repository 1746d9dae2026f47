"""The consumers' work on a finished product (SwiGLU, its backward), and the stores of the results.

`storing_consumer` keeps a tile's results packed in registers and sends them out under the products of the next
tile. Its epilogue says what the results are: `UpEpilogue` (z, act) or `PlainEpilogue` (the product).
`down_backward_consumer` has no registers left for results: it writes them over z in the ring.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

# Gluon's compiler reads this code; its types are not those of Python that runs.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.core import _aggregate as aggregate

from momoe_titan.kernels.hopper.activations import activation, activation_by_up, gate_factor, gate_slope, sigmoid_of
from momoe_titan.kernels.hopper.layouts import (
    ACCUMULATOR,
    BK,
    BM,
    BN,
    CHUNK,
    HALF,
    HALF_ACCUMULATOR,
    PAIRS_ACCUMULATOR,
    SLICE_ACCUMULATOR,
    TILE_SMEM,
    Z_STEPS,
    as_ragged,
    ragged_coordinates,
)
from momoe_titan.kernels.hopper.operands import is_saved
from momoe_titan.kernels.hopper.pipeline import advance, multiply
from momoe_titan.kernels.versions import reinterpret, tma_store


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
    """Stores (64, 64) blocks, each through a buffer that no other store is reading."""
    for i in gl.static_range(len(blocks)):
        buffers[i].store(blocks[i].to(descs[i].dtype))
    fence_async_shared()
    _send_fenced(descs, buffers, row, row_end, cols)


@gluon.jit
def _send_fenced(descs, buffers, row, row_end, cols):
    for i in gl.static_range(len(buffers)):
        where = ragged_coordinates(row, row_end, cols[i])
        tma_store(descs[i], where, as_ragged(buffers[i], descs[i]))


@gluon.jit
def _pack(block, dtype: gl.constexpr):
    """(64, 64) float32 as (64, 32) int32 of two columns each: loops keep a single 16-bit value in a register of 32."""
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
class EpilogueStore:
    """The destination of a consumer's results, and how they are stored there."""

    desc: tma.tensor_descriptor
    gate_desc: tma.tensor_descriptor
    buffers: gl.shared_memory_descriptor  # (2, 64, 64)
    COUNT: gl.constexpr  # blocks of 64 columns in a tile
    GATED: gl.constexpr  # blocks 2 and 3 go to the same columns as blocks 0 and 1, through gate_desc
    TRANSPOSED: gl.constexpr  # blocks follow each other along the rows of the output
    STEPS_APART: gl.constexpr  # steps of the next tile between two stores; the fastest of 1 to 4 for each kernel

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
class PendingTile:
    """A consumer's (64, 256) results of a tile, in registers, and where they will be stored."""

    store: EpilogueStore
    block_0: gl.tensor  # 64 columns, packed
    block_1: gl.tensor
    block_2: gl.tensor
    block_3: gl.tensor
    row: gl.tensor  # first row of the output
    row_end: gl.tensor  # rows from here on are not stored
    col: gl.tensor

    @gluon.constexpr_function
    def __init__(self, store, block_0, block_1, block_2, block_3, row, row_end, col):
        self.store = store
        self.block_0 = block_0
        self.block_1 = block_1
        self.block_2 = block_2
        self.block_3 = block_3
        self.row = row
        self.row_end = row_end
        self.col = col

    @gluon.jit
    def send(self, i: gl.constexpr):
        """Stores block i; blocks must be stored in order."""
        out = self.store
        if self.row < self.row_end:
            block = _unpack((self.block_0, self.block_1, self.block_2, self.block_3)[i], out.desc.dtype)
            buffer = out.buffers.index(i % 2)
            tma.store_wait(1)
            if out.TRANSPOSED:
                buffer.permute((1, 0)).store(block)
                where = ragged_coordinates(self.row + i * CHUNK, self.row_end, self.col)
            else:
                buffer.store(block)
                where = ragged_coordinates(self.row, self.row_end, self.col + (i % 2 if out.GATED else i) * CHUNK)
            fence_async_shared()
            desc = out.gate_desc if out.GATED and i >= 2 else out.desc
            tma_store(desc, where, as_ragged(buffer, desc))

    @gluon.jit
    def send_all(self):
        for i in gl.static_range(self.store.COUNT):
            self.send(i)


@aggregate
class UpEpilogue:
    """Epilogue of up_proj: z waits in registers for the next tile and act is stored at once; without Z, act waits."""

    up_desc: tma.tensor_descriptor  # the halves of z, whose first row is row z_first; act_desc twice if not Z
    gate_desc: tma.tensor_descriptor
    act_desc: tma.tensor_descriptor
    z_first: gl.tensor
    z_end: gl.tensor  # rows of z from here on are not stored
    ACT: gl.constexpr  # act is wanted
    Z: gl.constexpr  # z is wanted

    @gluon.constexpr_function
    def __init__(self, up_desc, gate_desc, act_desc, z_first, z_end, ACT, Z):
        self.up_desc = up_desc
        self.gate_desc = gate_desc
        self.act_desc = act_desc
        self.z_first = z_first
        self.z_end = z_end
        self.ACT = gl.constexpr(ACT)
        self.Z = gl.constexpr(Z)

    @gluon.jit
    def store(self):
        buffers = gl.allocate_shared_memory(self.act_desc.dtype, [2, HALF, CHUNK], TILE_SMEM)
        if self.Z:
            store = EpilogueStore(self.up_desc, self.gate_desc, buffers, 4, True, False, 2)
        else:
            store = EpilogueStore(self.up_desc, self.gate_desc, buffers, 2, True, False, 1)
        return store

    @gluon.jit
    def finish(self, store, acc, tiles, tile, row):
        """The four packed blocks that wait, and the row, row end and column they go to."""
        dtype: gl.constexpr = self.act_desc.dtype
        FAST: gl.constexpr = dtype == gl.bfloat16
        if self.ACT:
            up_0, up_1, gate_0, gate_1 = _quarters(acc)
            act_0 = up_0 * gate_0 * sigmoid_of(gate_0, FAST)
            act_1 = up_1 * gate_1 * sigmoid_of(gate_1, FAST)
        if self.Z:
            if self.ACT:
                tma.store_wait(0)
                cols = tile.col, tile.col + CHUNK
                buffers = store.buffers.index(0), store.buffers.index(1)
                _send((act_0, act_1), (self.act_desc, self.act_desc), buffers, row, tile.row_end, cols)
            b0, b1, b2, b3 = _pack_quarters(acc, dtype)
            out_row = row - self.z_first
            out_end = gl.minimum(tile.row_end, self.z_end) - self.z_first
        else:
            b0, b1 = _pack(act_0, dtype), _pack(act_1, dtype)
            b2, b3 = b0, b1  # never stored
            out_row = row
            out_end = tile.row_end
        return b0, b1, b2, b3, out_row, out_end, tile.col


@aggregate
class OtherUpEpilogue:
    """Epilogue of up_proj for all experts but SwiGLU in two halves without biases: like `UpEpilogue`.

    FORM "halves": 128 columns of up beside the same 128 of gate. "interleaved": 256 columns of z, whose pairs are up
    and gate. "ungated": 256 columns of z and of act.
    BIASED: bias (E, Z), in the order of z, is added to z before it is stored.
    SCORED, which excludes BIASED: z is stored without scores, and act is made of score * z.
    """

    base: UpEpilogue
    extra_ptr: gl.tensor  # of the bias, or of the scores of all rows
    F: gl.tensor
    FORM: gl.constexpr
    ACTIVATION: gl.constexpr
    GATE_FIRST: gl.constexpr
    BIASED: gl.constexpr
    SCORED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, base, extra_ptr, F, FORM, ACTIVATION, GATE_FIRST, BIASED, SCORED):
        self.base = base
        self.extra_ptr = extra_ptr
        self.F = F
        self.FORM = gl.constexpr(FORM)
        self.ACTIVATION = gl.constexpr(ACTIVATION)
        self.GATE_FIRST = gl.constexpr(GATE_FIRST)
        self.BIASED = gl.constexpr(BIASED)
        self.SCORED = gl.constexpr(SCORED)

    @gluon.jit
    def store(self):
        base = self.base
        buffers = gl.allocate_shared_memory(base.act_desc.dtype, [2, HALF, CHUNK], TILE_SMEM)
        halves: gl.constexpr = self.FORM == "halves"
        if base.Z:
            store = EpilogueStore(base.up_desc, base.gate_desc, buffers, 4, halves, False, 2)
        elif self.FORM == "ungated":
            store = EpilogueStore(base.act_desc, base.act_desc, buffers, 4, False, False, 1)
        else:
            store = EpilogueStore(base.act_desc, base.act_desc, buffers, 2, False, False, 1)
        return store

    @gluon.jit
    def _with_bias(self, acc, tile):
        cols = gl.arange(0, BN, gl.SliceLayout(0, ACCUMULATOR))
        if self.FORM == "halves":
            hidden = tile.col + cols % (BN // 2)
            if self.GATE_FIRST:
                z_col = hidden + gl.where(cols < BN // 2, self.F, 0)
            else:
                z_col = hidden + gl.where(cols < BN // 2, 0, self.F)
            live = hidden < self.F
            width = 2 * self.F
        elif self.FORM == "interleaved":
            z_col = tile.col + cols
            width = 2 * self.F
            live = z_col < width
        else:
            z_col = tile.col + cols
            width = self.F
            live = z_col < width
        bias = gl.load(self.extra_ptr + tile.expert.to(gl.int64) * width + z_col, mask=live, other=0.0)
        return acc + bias.to(gl.float32)[None, :]

    @gluon.jit
    def _gated(self, acc, FAST: gl.constexpr):
        """Two blocks of act."""
        if self.FORM == "halves":
            up_0, up_1, gate_0, gate_1 = _quarters(acc)
            act_0 = activation(up_0, gate_0, self.ACTIVATION, FAST)
            act_1 = activation(up_1, gate_1, self.ACTIVATION, FAST)
        else:
            even, odd = acc.reshape([HALF, BN // 2, 2]).split()
            if self.GATE_FIRST:
                act = activation(odd, even, self.ACTIVATION, FAST)
            else:
                act = activation(even, odd, self.ACTIVATION, FAST)
            act_0, act_1 = _halves(gl.convert_layout(act, HALF_ACCUMULATOR))
        return act_0, act_1

    @gluon.jit
    def _send_act(self, z_0, z_1, buffers, row, tile, col):
        """Stores act of two blocks of z, which has no gate."""
        base = self.base
        FAST: gl.constexpr = base.act_desc.dtype == gl.bfloat16
        act_0 = activation(z_0, z_0, self.ACTIVATION, FAST)
        act_1 = activation(z_1, z_1, self.ACTIVATION, FAST)
        tma.store_wait(0)
        _send((act_0, act_1), (base.act_desc, base.act_desc), buffers, row, tile.row_end, (col, col + CHUNK))

    @gluon.jit
    def finish(self, store, acc, tiles, tile, row):
        """The four packed blocks that wait, and the row, row end and column they go to."""
        base = self.base
        dtype: gl.constexpr = base.act_desc.dtype
        FAST: gl.constexpr = dtype == gl.bfloat16
        act_col = tile.col // 2 if self.FORM == "interleaved" else tile.col
        if self.BIASED:
            acc = self._with_bias(acc, tile)
        if base.Z:
            b0, b1, b2, b3 = _pack_quarters(acc, dtype)
            out_row = row - base.z_first
            out_end = gl.minimum(tile.row_end, base.z_end) - base.z_first
            out_col = tile.col
        if base.ACT:
            if self.SCORED:
                rows = row + gl.arange(0, HALF, gl.SliceLayout(1, ACCUMULATOR))
                score = gl.load(self.extra_ptr + rows, mask=rows < tile.row_end, other=0.0)
                acc = acc * score[:, None]
            if base.Z:
                buffers = store.buffers.index(0), store.buffers.index(1)
                if self.FORM == "ungated":
                    quarters = _quarters(acc)
                    for i in gl.static_range(2):  # the activations of all four would not fit into the registers
                        self._send_act(quarters[2 * i], quarters[2 * i + 1], buffers, row, tile, act_col + i * BN // 2)
                else:
                    act_0, act_1 = self._gated(acc, FAST)
                    tma.store_wait(0)
                    cols = act_col, act_col + CHUNK
                    _send((act_0, act_1), (base.act_desc, base.act_desc), buffers, row, tile.row_end, cols)
            else:
                if self.FORM == "ungated":
                    b0, b1, b2, b3 = _pack_quarters(activation(acc, acc, self.ACTIVATION, FAST), dtype)
                else:
                    act_0, act_1 = self._gated(acc, FAST)
                    b0, b1 = _pack(act_0, dtype), _pack(act_1, dtype)
                    b2, b3 = b0, b1  # never stored
                out_row = row
                out_end = tile.row_end
                out_col = act_col
        return b0, b1, b2, b3, out_row, out_end, out_col


@aggregate
class PlainEpilogue:
    """Epilogue of down_proj, dx and weight gradients: the product, or its transpose, waits for the next tile."""

    out_desc: tma.tensor_descriptor
    TRANSPOSED: gl.constexpr  # the tile of a weight gradient goes to the transposed gradient of its expert
    STEPS_APART: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, out_desc, TRANSPOSED, STEPS_APART):
        self.out_desc = out_desc
        self.TRANSPOSED = gl.constexpr(TRANSPOSED)
        self.STEPS_APART = gl.constexpr(STEPS_APART)

    @gluon.jit
    def store(self):
        buffers = gl.allocate_shared_memory(self.out_desc.dtype, [2, HALF, CHUNK], TILE_SMEM)
        return EpilogueStore(self.out_desc, self.out_desc, buffers, 4, False, self.TRANSPOSED, self.STEPS_APART)

    @gluon.jit
    def finish(self, store, acc, tiles, tile, row):
        """The four packed blocks that wait, and the row, row end and column they go to."""
        b0, b1, b2, b3 = _pack_quarters(acc, self.out_desc.dtype)
        if self.TRANSPOSED:
            out_row = tile.expert * tiles.N + tile.col
            out_end = (tile.expert + 1) * tiles.N
            out_col = row - tile.expert * tiles.M
        else:
            out_row = row
            out_end = tile.row_end
            out_col = tile.col
        return b0, b1, b2, b3, out_row, out_end, out_col


@gluon.jit
def storing_consumer(ring, tiles, epilogue, W: gl.constexpr):
    """Computes rows [64 W, 64 W + 64) of each tile and stores a tile's results while the next one is computed."""
    store = epilogue.store()
    stage = 0
    phase = 0
    acc = gl.zeros((HALF, BN), gl.float32, ACCUMULATOR)
    # Before the first tile nothing is pending: no row is stored.
    b0, b1, b2, b3 = _pack_quarters(acc, store.desc.dtype)
    out_row = gl.to_tensor(0)
    out_end = gl.to_tensor(0)
    out_col = gl.to_tensor(0)
    packed_tile = tiles.packed_tile(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, packed_tile)
        packed_tile = tiles.packed_tile(t + gl.num_programs(0))
        row = tile.row + W * HALF
        pending = PendingTile(store, b0, b1, b2, b3, out_row, out_end, out_col)
        acc, stage, phase = multiply(ring, tile, acc, stage, phase, W, pending=pending)
        b0, b1, b2, b3, out_row, out_end, out_col = epilogue.finish(store, acc, tiles, tile, row)
    PendingTile(store, b0, b1, b2, b3, out_row, out_end, out_col).send_all()
    tma.store_wait(0)


@gluon.jit
def _activation_backward_of_half(
    dact, score, up_buffer, gate_buffer, act_buffer, h: gl.constexpr, dscore, dtype: gl.constexpr,
    ACTIVATION: gl.constexpr, GATED: gl.constexpr, SCORED: gl.constexpr, WRITE_ACT: gl.constexpr,
):  # fmt: skip
    """dz over z and act into its buffer, for half h of 64 columns; returns dscore plus this half's row sums."""
    FAST: gl.constexpr = dtype == gl.bfloat16
    up_half = up_buffer.slice(h * CHUNK // 2, CHUNK // 2, 1)
    gate_half = gate_buffer.slice(h * CHUNK // 2, CHUNK // 2, 1)
    dact = gl.convert_layout(dact, SLICE_ACCUMULATOR)
    up = up_half.load(SLICE_ACCUMULATOR).to(gl.float32)
    gate = up
    if GATED:
        gate = gate_half.load(SLICE_ACCUMULATOR).to(gl.float32)
    if SCORED:
        raw_up, raw_gate = up, gate
        up, gate = up * score[:, None], gate * score[:, None]
    act, by_up, part = activation_by_up(up, gate, ACTIVATION, FAST)
    if SCORED:
        dscore += gl.sum(dact * by_up * raw_up, axis=1)
    else:
        dscore += gl.sum(dact * act, axis=1)
    scaled = dact * score[:, None]
    up_half.store((scaled * by_up).to(dtype))
    if GATED:
        dgate = scaled * gate_factor(up, ACTIVATION)  # first, which decides the order of instructions
        slope = gate_slope(gate, by_up, part, ACTIVATION)
        if SCORED:
            dscore += gl.sum(dact * gate_factor(up, ACTIVATION) * slope * raw_gate, axis=1)
        gate_half.store((dgate * slope).to(dtype))
    if WRITE_ACT:
        if not SCORED:
            act = act * score[:, None]
        act_buffer.slice(h * CHUNK // 2, CHUNK // 2, 1).store(act.to(dtype))
    return dscore


@gluon.jit
def _activation_backward_of_pairs(
    dact, score, pairs_buffer, act_buffer, h: gl.constexpr, dscore, dtype: gl.constexpr,
    ACTIVATION: gl.constexpr, GATE_FIRST: gl.constexpr, SCORED: gl.constexpr, WRITE_ACT: gl.constexpr,
):  # fmt: skip
    """The same where the 64 columns of a buffer are 32 pairs of up and gate."""
    FAST: gl.constexpr = dtype == gl.bfloat16
    z = pairs_buffer.load(PAIRS_ACCUMULATOR).to(gl.float32)
    even, odd = z.reshape([HALF, CHUNK // 2, 2]).split()
    layout: gl.constexpr = even.type.layout
    dact = gl.convert_layout(dact, layout)
    score = gl.convert_layout(score, gl.SliceLayout(1, layout))
    if GATE_FIRST:
        up, gate = odd, even
    else:
        up, gate = even, odd
    if SCORED:
        raw_up, raw_gate = up, gate
        up, gate = up * score[:, None], gate * score[:, None]
    act, by_up, part = activation_by_up(up, gate, ACTIVATION, FAST)
    factor, slope = gate_factor(up, ACTIVATION), gate_slope(gate, by_up, part, ACTIVATION)
    if SCORED:
        sums = gl.sum(dact * (by_up * raw_up + factor * slope * raw_gate), axis=1)
    else:
        sums = gl.sum(dact * act, axis=1)
    dscore += gl.convert_layout(sums, gl.SliceLayout(1, SLICE_ACCUMULATOR))
    scaled = dact * score[:, None]
    dup, dgate = (scaled * by_up).to(dtype), (scaled * factor * slope).to(dtype)
    if GATE_FIRST:
        dz = gl.join(dgate, dup)
    else:
        dz = gl.join(dup, dgate)
    pairs_buffer.store(gl.convert_layout(dz.reshape([HALF, CHUNK]), PAIRS_ACCUMULATOR))
    if WRITE_ACT:
        if not SCORED:
            act = act * score[:, None]
        act_half = act_buffer.slice(h * CHUNK // 2, CHUNK // 2, 1)
        act_half.store(gl.convert_layout(act.to(dtype), SLICE_ACCUMULATOR))
    return dscore


@gluon.jit
def down_backward_consumer(
    ring, tiles, score_ptr, dz_saved_descs, dz_rest_descs, num_saved, dz_first, act_desc, dscore_ptr,
    FORM: gl.constexpr, ACTIVATION: gl.constexpr, GATE_FIRST: gl.constexpr, SCORED: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Computes dz, score * act unless act_desc is None, and a part of dscore from dact and z.

    dz takes the place of z in its stage, and score * act the place of lhs, until their stores have read them. Of the
    two blocks of z in a stage the first is gate if GATE_FIRST; FORM as in `OtherUpEpilogue`.
    """
    dtype: gl.constexpr = dz_rest_descs[0].dtype
    WRITE_ACT: gl.constexpr = act_desc is not None
    GATED: gl.constexpr = FORM != "ungated"
    STORES: gl.constexpr = (2 if GATED else 1) + (1 if WRITE_ACT else 0)  # in a stage
    stage = 0
    phase = 0
    results_stage = -1
    acc = gl.zeros((HALF, BN), gl.float32, ACCUMULATOR)
    packed_tile = tiles.packed_tile(tiles.begin())
    for t in range(tiles.begin(), tiles.end(), gl.num_programs(0)):
        tile = tiles.tile(t, packed_tile)
        packed_tile = tiles.packed_tile(t + gl.num_programs(0))
        row = tile.row + W * HALF
        rows = row + gl.arange(0, HALF, gl.SliceLayout(1, SLICE_ACCUMULATOR))
        score = gl.load(score_ptr + rows, mask=rows < tile.row_end, other=0.0)
        acc, stage, phase = multiply(ring, tile, acc, stage, phase, W, results_stage)
        slices = _quarters(acc)
        dscore = gl.zeros((HALF,), gl.float32, gl.SliceLayout(1, SLICE_ACCUMULATOR))
        for i in gl.static_range(Z_STEPS):
            mbarrier.wait(ring.ready.index(stage), phase)
            rhs = ring.rhs.index(stage)
            z_blocks = reinterpret(rhs, dtype, [BN // HALF, HALF, BK], TILE_SMEM)  # the same, to be sent
            if not ring.RHS_IS_NK:
                rhs = reinterpret(rhs, dtype, [BN, BK], TILE_SMEM)
            first_buffer = rhs.slice(W * HALF, HALF)
            second_buffer = rhs.slice(BM + W * HALF, HALF)
            act_buffer = ring.lhs.index(2 * stage + W)
            halves = _halves(slices[i])
            for h in gl.static_range(2):  # 64 columns at once would not fit into the registers
                if FORM == "interleaved":
                    pairs = second_buffer if h else first_buffer
                    dscore = _activation_backward_of_pairs(
                        halves[h], score, pairs, act_buffer, h, dscore, dtype, ACTIVATION, GATE_FIRST, SCORED, WRITE_ACT
                    )
                elif GATE_FIRST:
                    dscore = _activation_backward_of_half(
                        halves[h], score, second_buffer, first_buffer, act_buffer, h, dscore, dtype,
                        ACTIVATION, GATED, SCORED, WRITE_ACT,
                    )  # fmt: skip
                else:
                    dscore = _activation_backward_of_half(
                        halves[h], score, first_buffer, second_buffer, act_buffer, h, dscore, dtype,
                        ACTIVATION, GATED, SCORED, WRITE_ACT,
                    )  # fmt: skip
            col = tile.col + i * CHUNK
            fence_async_shared()
            if WRITE_ACT:
                _send_fenced((act_desc,), (act_buffer,), row, tile.row_end, (col,))
            first_dz, second_dz = z_blocks.index(W), z_blocks.index(BM // HALF + W)
            if FORM == "interleaved":
                buffers, cols = (first_dz, second_dz), (2 * col, 2 * col + CHUNK)
            elif GATED:
                buffers, cols = (first_dz, second_dz), (col, col)
            else:
                buffers, cols = (first_dz,), (col,)
            if is_saved(tile.row, tile.row_end, num_saved):
                _send_fenced(dz_saved_descs, buffers, row, tile.row_end, cols)
            else:
                _send_fenced(dz_rest_descs, buffers, row - dz_first, tile.row_end - dz_first, cols)
            if i > 0:
                tma.store_wait(STORES)
                mbarrier.arrive(ring.empty.index(results_stage))
            results_stage = stage
            stage, phase = advance(stage, phase)
        part = rows.to(gl.int64) * tiles.num_cols + tile.col // BN
        gl.store(dscore_ptr + part, dscore, mask=rows < tile.row_end)
    tma.store_wait(0)
