"""The four kernels of the grouped GEMMs for Hopper (sm_90), in Gluon; launch.py launches them.

Each is a persistent, warp-specialised loop over 128x256 output tiles. docs/kernels.md explains the design.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

# Gluon's compiler reads this code; its types are not those of Python that runs.
# pyright: reportCallIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from momoe_titan.kernels.hopper.epilogues import (
    OtherUpEpilogue,
    PlainEpilogue,
    UpEpilogue,
    down_backward_consumer,
    storing_consumer,
)
from momoe_titan.kernels.hopper.layouts import BM, BN, CONSUMER_REGISTERS, PRODUCER_REGISTERS
from momoe_titan.kernels.hopper.operands import (
    ContiguousK,
    ContiguousRows,
    ExpertWeights,
    GatedWeights,
    GatheredK,
    GatheredRows,
    SplitWeights,
    TwoBufferRows,
    TwoBufferSteps,
    TwoBufferZ,
)
from momoe_titan.kernels.hopper.pipeline import ProgramSync, make_ring, producer, producer_with_z
from momoe_titan.kernels.hopper.tile_order import RowTiles, WeightTiles, first_live_tile

_METADATA = ["token_ptr", "tiles_ptr", "offsets_ptr", "num_tiles_ptr"]


@gluon.jit(
    do_not_specialize=["max_polls", "first_row", "z_first", "z_end"],
    do_not_specialize_on_alignment=_METADATA + ["counts_ptr"],
)
def up_proj_kernel(
    x_ptr, x_stride, token_ptr, w_desc, z_up_desc, z_gate_desc, act_desc,
    tiles_ptr, offsets_ptr, num_tiles_ptr, counts_ptr, max_polls, D, F, first_row, z_first, z_end,
    gate_w_desc, bias_ptr, score_ptr, w_rows,
    ACT: gl.constexpr, COLS_AT_A_TIME: gl.constexpr, W_IS_NK: gl.constexpr, FORM: gl.constexpr,
    GATE_FIRST: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """z[r] = x[token_R[r]] @ w1[e], act = up * silu(gate): the up projection, and the recomputation of z.

    Grid: one program per SM. Each walks tiles of 128 rows x 128 columns of F (128 of up and 128 of gate), `RowTiles`.
    In: x (T, D); w_desc over w1 (E * D, 2F), of which an expert has w_rows rows, or (E * 2F, D) if W_IS_NK; over up
        alone if gate_w_desc is not None; the routing (token_R, tiles, offsets); counts, max_polls: `ProgramSync`.
    Out: act (R, F) if ACT. z (rows, 2F) from row z_first to row z_end, unless z_up_desc is None. Without ACT only the
        tiles that reach first_row are computed.
    Roles: `producer` (`GatheredRows`, cp.async; `GatedWeights` or `ExpertWeights`, TMA); two `storing_consumer`s with
        `UpEpilogue` or `OtherUpEpilogue`.
    A stage: lhs 128 rows x 64 of D, rhs 64 of D x (128 columns of up | the same 128 of gate).
    Timeline of a tile: D / 64 steps; SwiGLU in registers; act goes out at once, z under the products of the next
        tile. Without z (a version of its own) act goes out under the next tile.
    FORM, ACTIVATION, bias_ptr, score_ptr: of `OtherUpEpilogue`; GATE_FIRST: the order in z and in one w1.
    """
    ring = make_ring(act_desc.dtype, LHS_IS_KM=False, RHS_IS_NK=W_IS_NK, GATHERS=True, STORES_FROM_STAGES=False)
    num_tiles = gl.load(num_tiles_ptr)
    first_tile = gl.to_tensor(0) if ACT else first_live_tile(tiles_ptr, offsets_ptr, num_tiles, first_row)
    HALVES: gl.constexpr = FORM == "halves"
    lhs = GatheredRows(x_ptr, x_stride, token_ptr)
    zero = gl.to_tensor(0)
    if HALVES:
        tiles = RowTiles(tiles_ptr, offsets_ptr, num_tiles, first_tile, gl.cdiv(F, BN // 2), D, 128, COLS_AT_A_TIME)
        if gate_w_desc is not None:
            rhs = GatedWeights(w_desc, gate_w_desc, gl.to_tensor(w_rows), zero, zero, W_IS_NK)
        elif GATE_FIRST:
            rhs = GatedWeights(w_desc, w_desc, gl.to_tensor(w_rows), gl.to_tensor(F), zero, W_IS_NK)
        else:
            rhs = GatedWeights(w_desc, w_desc, gl.to_tensor(w_rows), zero, gl.to_tensor(F), W_IS_NK)
    else:
        width = 2 * F if FORM == "interleaved" else F
        tiles = RowTiles(tiles_ptr, offsets_ptr, num_tiles, first_tile, gl.cdiv(width, BN), D, 256, COLS_AT_A_TIME)
        rhs = ExpertWeights(w_desc, gl.to_tensor(w_rows), zero, W_IS_NK)
    Z: gl.constexpr = z_up_desc is not None
    if Z:
        up_desc, gate_desc = z_up_desc, z_gate_desc
    else:
        up_desc, gate_desc = act_desc, act_desc
    epilogue = UpEpilogue(up_desc, gate_desc, act_desc, z_first, z_end, ACT, Z)
    BIASED: gl.constexpr = bias_ptr is not None
    SCORED: gl.constexpr = score_ptr is not None
    if not HALVES or ACTIVATION != "swiglu" or BIASED or SCORED:
        extra_ptr = bias_ptr if BIASED else score_ptr if SCORED else token_ptr  # the last is not read
        epilogue = OtherUpEpilogue(epilogue, extra_ptr, gl.to_tensor(F), FORM, ACTIVATION, GATE_FIRST, BIASED, SCORED)
    gl.warp_specialize(
        [
            (storing_consumer, (ring, tiles, epilogue, 0)),
            (storing_consumer, (ring, tiles, epilogue, 1)),
            (producer, (ring, tiles, lhs, rhs, ProgramSync(counts_ptr, max_polls))),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit(do_not_specialize=["num_saved", "first", "first_col"], do_not_specialize_on_alignment=_METADATA)
def rows_kernel(
    in_desc, rest_desc, num_saved, first, w_desc, out_desc, tiles_ptr, offsets_ptr, num_tiles_ptr,
    width, w_rows, first_col, num_cols, second_w_desc,
    W_IS_NK: gl.constexpr, COLS_AT_A_TIME: gl.constexpr,
):  # fmt: skip
    """out[r] = in[r] @ w[e], or in[r] @ w[e]^T if W_IS_NK: the down projection, and dx row by row.

    Grid: one program per SM. Each walks 128x256 tiles of out, `RowTiles`.
    In: in (R, width), in two buffers unless rest_desc is None (see `SplitRows`); w_desc over the weights, stacked:
        (E * width, columns), or (E * columns, width) if W_IS_NK; over those of the first half of width alone, unless
        second_w_desc is None; the routing (tiles, offsets).
    Out: out (R, num_cols): columns [first_col, first_col + num_cols) of the product.
    Roles: `producer` (`ContiguousRows` or `TwoBufferRows`, `ExpertWeights`, all TMA); two `storing_consumer`s with
        `PlainEpilogue`.
    A stage: lhs 128 rows x 64 of width, rhs 64 of width x 256 columns (256 x 64 if W_IS_NK).
    Timeline of a tile: width / 64 steps; the results are packed in registers and go out under the products of the
        next tile, a block of 64 columns every second step.
    """
    ring = make_ring(out_desc.dtype, LHS_IS_KM=False, RHS_IS_NK=W_IS_NK, GATHERS=False, STORES_FROM_STAGES=False)
    num_tiles = gl.load(num_tiles_ptr)
    tiles = RowTiles(
        tiles_ptr, offsets_ptr, num_tiles, gl.to_tensor(0), gl.cdiv(num_cols, BN), width, 256, COLS_AT_A_TIME
    )
    if rest_desc is None:
        lhs = ContiguousRows(in_desc, gl.to_tensor(0))
    else:
        saved, rest = ContiguousRows(in_desc, gl.to_tensor(0)), ContiguousRows(rest_desc, first)
        lhs = TwoBufferRows(saved, rest, num_saved)
    rhs = ExpertWeights(w_desc, w_rows, first_col, W_IS_NK)
    if second_w_desc is not None:
        second = ExpertWeights(second_w_desc, w_rows, first_col, W_IS_NK)
        rhs = SplitWeights(rhs, second, width // 2)
    epilogue = PlainEpilogue(out_desc, TRANSPOSED=False, STEPS_APART=2)
    gl.warp_specialize(
        [
            (storing_consumer, (ring, tiles, epilogue, 0)),
            (storing_consumer, (ring, tiles, epilogue, 1)),
            (producer, (ring, tiles, lhs, rhs, None)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit(
    do_not_specialize=["z_first", "num_saved", "dz_first"],
    do_not_specialize_on_alignment=_METADATA + ["score_ptr", "dscore_ptr"],
)
def down_proj_backward_kernel(
    dout_ptr, dout_stride, token_ptr, w_desc, z_saved_desc, z_rest_desc, z_first, num_saved, score_ptr,
    dz_saved_up_desc, dz_saved_gate_desc, dz_rest_up_desc, dz_rest_gate_desc, dz_first, act_desc, dscore_ptr,
    tiles_ptr, offsets_ptr, num_tiles_ptr, D, F, w_rows,
    COLS_AT_A_TIME: gl.constexpr, W_IS_NK: gl.constexpr, FORM: gl.constexpr, GATE_FIRST: gl.constexpr,
    ACTIVATION: gl.constexpr, SCORED: gl.constexpr,
):  # fmt: skip
    """dact[r] = dout[token_R[r]] @ w2[e]^T, then the backward of score * up * silu(gate).

    Grid: one program per SM. Each walks tiles of 128 rows x 256 columns of F, `RowTiles`.
    In: dout (T, D); w_desc over w2 (E * F, D), or (E * D, F) if not W_IS_NK, of which an expert has w_rows rows;
        score (R,); z (R, 2F) in two buffers, which may be the same one (see `SplitRows`); the routing (token_R, tiles,
        offsets).
    Out: dz (R, 2F), split as z is, perhaps over z, the up and gate halves of each buffer through a descriptor each;
        score * act (R, F), for dw2, unless act_desc is None; dscore (R, cdiv(F, 256)) float32, the row sums of
        dact * act in each column tile.
    Roles: `producer_with_z` (`GatheredRows`, cp.async; `ExpertWeights` and `TwoBufferZ`, TMA); two
        `down_backward_consumer`s.
    A stage: lhs 128 rows x 64 of D, rhs 256 of F x 64 of D; then, four times, z: 128 rows x 64 columns of up and of
        gate, in rhs.
    Timeline of a tile: D / 64 steps; then for each of the four stages of z: dz over z, score * act over lhs, and the
        stores out of the stage, which goes back to the producer when they have read it.
    FORM and others: of `down_backward_consumer`.
    """
    dtype: gl.constexpr = z_saved_desc.dtype
    ring = make_ring(dtype, LHS_IS_KM=False, RHS_IS_NK=W_IS_NK, GATHERS=True, STORES_FROM_STAGES=True)
    num_tiles = gl.load(num_tiles_ptr)
    tiles = RowTiles(tiles_ptr, offsets_ptr, num_tiles, gl.to_tensor(0), gl.cdiv(F, BN), D, 256, COLS_AT_A_TIME)
    lhs = GatheredRows(dout_ptr, dout_stride, token_ptr)
    rhs = ExpertWeights(w_desc, gl.to_tensor(w_rows), gl.to_tensor(0), W_IS_NK)
    z = TwoBufferZ(z_saved_desc, z_rest_desc, num_saved, z_first, FORM == "interleaved")
    saved, rest = (dz_saved_up_desc, dz_saved_gate_desc), (dz_rest_up_desc, dz_rest_gate_desc)
    gl.warp_specialize(
        [
            (
                down_backward_consumer,
                (ring, tiles, score_ptr, saved, rest, num_saved, dz_first, act_desc, dscore_ptr,
                 FORM, ACTIVATION, GATE_FIRST, SCORED, 0),
            ),
            (
                down_backward_consumer,
                (ring, tiles, score_ptr, saved, rest, num_saved, dz_first, act_desc, dscore_ptr,
                 FORM, ACTIVATION, GATE_FIRST, SCORED, 1),
            ),
            (producer_with_z, (ring, tiles, lhs, rhs, z)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["num_saved", "first", "max_polls", "E"],
    do_not_specialize_on_alignment=["token_ptr", "offsets_ptr", "counts_ptr"],
)
def weight_grad_kernel(
    gathered_ptr, stride, token_ptr, rows_desc, rest_desc, num_saved, first, dw_desc, offsets_ptr,
    counts_ptr, max_polls, E, M, N,
    TRANSPOSED: gl.constexpr,
):  # fmt: skip
    """dw[e] = gathered[token_R of e's rows]^T @ rows[e's rows]: dw1 (x and dz), and dw2 (dout and score * act).

    Grid: one program per SM. Each walks 128x256 tiles of dw (E * M, N), `WeightTiles`.
    In: gathered (T, M); rows (R, N), in two buffers unless rest_desc is None (see `SplitRows`); the routing (token_R,
        offsets); counts, max_polls: `ProgramSync`.
    Out: dw (E, M, N), or (E, N, M) if TRANSPOSED; zeros for an expert without rows.
    Roles: `producer` (`GatheredK`, cp.async; `ContiguousK` or `TwoBufferSteps`, TMA); two `storing_consumer`s with
        `PlainEpilogue`.
    A stage: lhs 64 rows of the expert x 128 columns of gathered, rhs the same 64 rows x 256 columns of rows.
    Timeline of a tile: a step for every 64 rows of the expert, at least one; the results are packed in registers and
        go out under the products of the next tile, a block of 64 columns every third step.
    """
    ring = make_ring(dw_desc.dtype, LHS_IS_KM=True, RHS_IS_NK=False, GATHERS=True, STORES_FROM_STAGES=False)
    tiles = WeightTiles(offsets_ptr, E, M, N, gl.cdiv(M, BM), gl.cdiv(N, BN))
    lhs = GatheredK(gathered_ptr, stride, token_ptr, M)
    if rest_desc is None:
        rhs = ContiguousK(rows_desc, gl.to_tensor(0))
    else:
        saved, rest = ContiguousK(rows_desc, gl.to_tensor(0)), ContiguousK(rest_desc, first)
        rhs = TwoBufferSteps(saved, rest, num_saved)
    epilogue = PlainEpilogue(dw_desc, TRANSPOSED, STEPS_APART=3)
    gl.warp_specialize(
        [
            (storing_consumer, (ring, tiles, epilogue, 0)),
            (storing_consumer, (ring, tiles, epilogue, 1)),
            (producer, (ring, tiles, lhs, rhs, ProgramSync(counts_ptr, max_polls))),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
