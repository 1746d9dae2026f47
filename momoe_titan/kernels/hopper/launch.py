"""Grouped GEMMs of the expert MLP for Hopper (sm_90): launching the kernels of hopper_kernels.py.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

import functools
from dataclasses import dataclass

import torch
import triton
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from momoe_titan.kernels.hopper.kernels import (
    BM,
    BN,
    CHUNK,
    PACE_SLOTS,
    RAGGED_ROWS,
    RAGGED_SMEM,
    TILE_SMEM,
    Z_SMEM,
    down_proj_backward_kernel,
    rows_kernel,
    up_proj_kernel,
    weight_grad_kernel,
)
from momoe_titan.kernels.launch import cdiv, launch

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Column tiles at a time (see `RowTiles`) where an expert's weights are so large, in bytes: (from bytes, tiles).
UP_AT_A_TIME = (6 << 20, 2)
DOWN_BACKWARD_AT_A_TIME = (8 << 20, 2)
ROWS_AT_A_TIME = 12  # of down and dx, at most, whatever the weights

# The programs of a launch of so many FLOPs, 3 ms and more, are kept in step: see `Pace`. A look takes about 1 us, a tile 30 to 70.
PACED_FLOPS = 2e12
PATIENCE = 100

# Strides of a descriptor for ragged rows: see RAGGED_ROWS.
RAGGED_OUTER = 0x7FFF0000
RAGGED_WRAP = 1 << 34


def supported(dtype, D, F, capability):
    """Whether the family takes this dtype (bfloat16, float16), these widths (multiples of 64), this GPU (9.0)
    and this Triton: 3.8 refuses to store from a slice of a buffer, as the ragged stores do."""
    fits = dtype in (torch.bfloat16, torch.float16) and D % 64 == 0 and F % 64 == 0
    return fits and tuple(capability) == (9, 0) and TRITON_VERSION in ((3, 6), (3, 7))


def dscore_parts(F):
    """Columns of the dscore_partial buffer of `down_proj_backward`."""
    return cdiv(F, BN.value)


@functools.cache
def num_programs(device):
    """Of a launch on this device: one per multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _grid(tensor):
    return (num_programs(tensor.device),)


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


@dataclass(frozen=True)
class SplitRows:
    """The rows of an (R, C) matrix in two buffers, so that gradients can take the place of rows that were kept.

    A row tile that ends at or before num_kept lies in `kept`, any other in `rest`, whose first row is row `first` of the
    matrix. The tile around num_kept begins at most 127 rows before it: `first = max(num_kept - 127, 0)` is early enough.

    Attributes:
        kept: at least num_kept rows, or the same as `rest` if num_kept is 0.
        rest: (R - first, C), or the same as `kept` if all rows are kept.
        in_two: whether kernels that have a version for two buffers are to take it.
    """

    kept: torch.Tensor
    rest: torch.Tensor
    num_kept: int
    first: int = 0
    in_two: bool = True

    @classmethod
    def of(cls, rows):
        """rows, or all of a tensor as both buffers."""
        return rows if isinstance(rows, cls) else cls(rows, rows, rows.shape[0], in_two=False)

    @classmethod
    def beside(cls, kept, num_rows, in_two=True):
        """All rows of `kept` and a new buffer for the others; one of the two where that is enough.

        in_two is the caller's, not told from the rows: another number of rows must not compile another version.
        """
        num_kept = kept.shape[0]
        if num_kept == num_rows:
            return cls(kept, kept, num_kept, in_two=in_two)
        first = max(num_kept - BM.value + 1, 0)
        rest = kept.new_empty(num_rows - first, kept.shape[1])
        return cls(kept if num_kept else rest, rest, num_kept, first, in_two)

    @property
    def shape(self):
        return (self.first + self.rest.shape[0], self.rest.shape[1])


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


def _halves_blocks(rows, F):
    """Descriptors of the first and the last F columns."""
    return _ragged_block(rows, F), _ragged_block(rows[:, F:], F)


def _tiles(routing):
    return routing.tiles, routing.offsets_E1, routing.num_tiles


def _at_a_time(rule, width, cols):
    from_bytes, tiles = rule
    return tiles if 2 * width * cols >= from_bytes else 0


def _pace(routing, flops):
    """The counts of a launch's programs, and their patience: 0, and any pointer, where they need not keep in step."""
    if flops < PACED_FLOPS:
        return routing.offsets_E1, 0
    device = routing.offsets_E1.device
    counts = torch.full((PACE_SLOTS.value,), 1 << 30, dtype=torch.int32, device=device)
    counts[: num_programs(device)] = 0
    return counts, PATIENCE


def _launch_up_proj(x_TD, w1_ED2F, routing, z, act_RF, first_row, z_first, z_end):
    E, D, F2 = w1_ED2F.shape
    F = F2 // 2
    with_act = act_RF is not None
    act_desc = _ragged_block(act_RF, F) if with_act else None
    if z is None:  # a version of its own
        z_up_desc = z_gate_desc = None
    elif z_end > 0:
        z_up_desc, z_gate_desc = _halves_blocks(z, F)
    else:  # no row of it is written: any descriptors of this width will do
        z_up_desc = z_gate_desc = act_desc
    launch(
        up_proj_kernel, _grid(x_TD),
        x_TD, x_TD.stride(0), routing.token_R, _block(w1_ED2F, E * D, F2, 64, 128),
        z_up_desc, z_gate_desc, act_desc if with_act else z_up_desc,
        *_tiles(routing), *_pace(routing, 4 * (routing.token_R.shape[0] - first_row) * D * F), D, F, first_row, z_first, z_end,
        ACT=with_act, COLS_AT_A_TIME=_at_a_time(UP_AT_A_TIME, D, F2), num_warps=4,
    )  # fmt: skip


def up_proj(x_TD, w1_ED2F, routing, z_S2F, num_saved, act_RF):
    """act[r] = up * silu(gate) of z[r] = x[token_R[r]] @ w1[e]; keeps z[r] for r < num_saved.

    Args:
        x_TD, w1_ED2F: bfloat16 or float16, contiguous.
        z_S2F: at least num_saved rows. None for the version that keeps none.
        act_RF: output.
    """
    if act_RF.shape[0]:
        _launch_up_proj(x_TD, w1_ED2F, routing, z_S2F, act_RF, 0, 0, num_saved)


def recompute_z(x_TD, w1_ED2F, routing, z):
    """z[r] for r >= z.num_kept into z.rest.

    Works in whole tiles: rows before z.num_kept of the tile around it are written too.

    Args:
        z: `SplitRows` of (R, 2F).
    """
    R = z.shape[0]
    if z.num_kept < R:
        _launch_up_proj(x_TD, w1_ED2F, routing, z.rest, None, z.num_kept, z.first, R)


def _launch_rows(in_desc, rest_desc, num_kept, first, width, w, w_is_nk, routing, out, first_col):
    E, rows, cols = w.shape
    num_cols = cdiv(rows if w_is_nk else cols, BN.value)  # of all ranges: another one must not compile another version
    at_a_time = cdiv(num_cols, cdiv(num_cols, ROWS_AT_A_TIME)) if num_cols > ROWS_AT_A_TIME else 0
    w_desc = _block(w, E * rows, cols, *((256, 64) if w_is_nk else (64, 256)))
    launch(
        rows_kernel, _grid(out),
        in_desc, rest_desc, num_kept, first, w_desc, _ragged_block(out, out.shape[1]),
        *_tiles(routing), width, rows, first_col, out.shape[1],
        W_IS_NK=w_is_nk, COLS_AT_A_TIME=at_a_time, num_warps=4,
    )  # fmt: skip


def down_proj(act_RF, w2_EFD, routing, y_RD, first_col=0):
    """y = act @ w2[e], columns [first_col, first_col + y.shape[1])."""
    if act_RF.shape[0]:
        act_desc, F = _block(act_RF, *act_RF.shape, 64, 64), act_RF.shape[1]
        _launch_rows(act_desc, None, 0, 0, F, w2_EFD, False, routing, y_RD, first_col)


def up_proj_backward(dz, w1_ED2F, routing, dx_RD, first_col=0):
    """dx rows = dz @ w1[e]^T, columns [first_col, first_col + dx.shape[1]).

    Args:
        dz: (R, 2F), a tensor or `SplitRows`.
    """
    dz = SplitRows.of(dz)
    if dz.shape[0]:
        kept_desc = _block(dz.kept, *dz.kept.shape, 64, 64)
        rest_desc = _block(dz.rest, *dz.rest.shape, 64, 64) if dz.in_two else None
        _launch_rows(kept_desc, rest_desc, dz.num_kept, dz.first, dz.shape[1], w1_ED2F, True, routing, dx_RD, first_col)


def down_proj_backward(dout_TD, w2_EFD, routing, score_R, z, dz, act_scaled_RF, dscore_partial):
    """Backward of score * down_proj(up * silu(gate)) up to dz.

    Args:
        z: `SplitRows` of (R, 2F).
        dz: output, (R, 2F), a tensor, or `SplitRows` with the num_kept of z; each of its buffers may be that of z.
        act_scaled_RF: output, score * act.
        dscore_partial: output, (R, dscore_parts(F)) float32, whose row sums are the scores' gradients.
    """
    E, F, D = w2_EFD.shape
    if not act_scaled_RF.shape[0]:
        return
    dz = SplitRows.of(dz)
    assert dz.num_kept == z.num_kept or dz.kept is dz.rest, "dz is split elsewhere than z"
    launch(
        down_proj_backward_kernel, _grid(dout_TD),
        dout_TD, dout_TD.stride(0), routing.token_R, _block(w2_EFD, E * F, D, 256, 64),
        _up_and_gate(z.kept, F), _up_and_gate(z.rest, F), z.first, z.num_kept, score_R,
        *_halves_blocks(dz.kept, F), *_halves_blocks(dz.rest, F), dz.first, _ragged_block(act_scaled_RF, F), dscore_partial,
        *_tiles(routing), D, F, COLS_AT_A_TIME=_at_a_time(DOWN_BACKWARD_AT_A_TIME, D, F), num_warps=4,
    )  # fmt: skip


def weight_grad(gathered_TM, rows, routing, dw, transposed=False):
    """dw[e] (M, N) = gathered[token of e's rows]^T @ rows[e's rows], or if transposed its transpose (N, M).

    An expert without rows gets zeros. The gathered side is the one whose tiles are 128 wide either
    way: it costs half the copies of a 256 wide one.

    Args:
        gathered_TM: contiguous, aligned to 16 bytes.
        rows: (R, N), a tensor, or if not transposed `SplitRows` too.
    """
    E = dw.shape[0]
    M, (R, N) = gathered_TM.shape[1], rows.shape
    if not R:
        dw.zero_()
        return
    rows = SplitRows.of(rows)
    rest_desc = _ragged_block(rows.rest, N, 64, 256) if rows.in_two else None
    launch(
        weight_grad_kernel, _grid(dw),
        gathered_TM, gathered_TM.stride(0), routing.token_R,
        _ragged_block(rows.kept, N, 64, 256), rest_desc, rows.num_kept, rows.first,
        _ragged_block(dw.view(-1, dw.shape[2]), dw.shape[2]), routing.offsets_E1, *_pace(routing, 2 * R * M * N), E, M, N,
        TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip
