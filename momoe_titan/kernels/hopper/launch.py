"""Launchers of the Hopper kernels: what each computes, its descriptors, and which tile order it takes.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from momoe_titan.kernels import gpu
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.hopper.kernels import (
    down_proj_backward_kernel,
    rows_kernel,
    up_proj_kernel,
    weight_grad_kernel,
)
from momoe_titan.kernels.hopper.layouts import (
    BM,
    BN,
    CHUNK,
    RAGGED_ROWS,
    RAGGED_SMEM,
    SYNC_SLOTS,
    TILE_SMEM,
    Z_SMEM,
)
from momoe_titan.kernels.launch import cdiv, launch
from momoe_titan.kernels.routing import RoutingMetadata

TRITON_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# Column tiles at a time (see `RowTiles`) where an expert's weights are at least this large: (bytes, column tiles).
UP_AT_A_TIME = (6 << 20, 2)
DOWN_BACKWARD_AT_A_TIME = (8 << 20, 2)
ROWS_AT_A_TIME = 12  # the most column tiles at a time in down_proj and dx, whatever the size of the weights

# Launches of at least this many FLOPs (3 ms) are kept in step by `ProgramSync`. A poll takes 1 us, a tile 30 to 70.
SYNC_FLOPS = 2e12
MAX_POLLS = 100

# Strides of a descriptor for ragged rows: see RAGGED_ROWS.
RAGGED_OUTER = 0x7FFF0000
RAGGED_WRAP = 1 << 34


def supported(dtype: torch.dtype, D: int, F: int, capability: tuple[int, int]) -> bool:
    """Whether these kernels take this dtype (bfloat16, float16), these widths (multiples of 64), this GPU (9.0)
    and this Triton: 3.8 refuses to store from a slice of a buffer, as the ragged stores do."""
    fits = dtype in (torch.bfloat16, torch.float16) and D % 64 == 0 and F % 64 == 0
    return fits and tuple(capability) == (9, 0) and TRITON_VERSION in ((3, 6), (3, 7))


def refusal(experts: Experts) -> str | None:
    """What of these experts the kernels do not take, in words; None if they take all of it."""
    if experts.gate is not None or not experts.w1.is_contiguous() or not experts.w2.is_contiguous():
        return "weights that are not stored as (E, D, 2F) and (E, F, D)"
    if not experts.is_swiglu or experts.order != "up_gate":
        return "other experts than SwiGLU with up before gate"
    return None


def dscore_parts(F: int) -> int:
    """Columns of the dscore_partial buffer of `down_proj_backward`."""
    return cdiv(F, BN.value)


def num_programs(device: torch.device) -> int:
    """Programs of a launch on this device: one per multiprocessor."""
    return gpu.num_processors(device)


def _grid(tensor: Tensor) -> tuple[int]:
    return (num_programs(tensor.device),)


class _Descriptor(TensorDescriptor):
    """A descriptor made at every launch; it skips checks that cost more than the rest of making it."""

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
    """The rows of an (R, C) matrix in two buffers, so that gradients can take the place of saved rows.

    A row tile that ends at or before num_saved lies in `saved`, any other in `rest`, whose first row is row `first` of
    the matrix. The tile around num_saved begins at most 127 rows before it: `first = max(num_saved - 127, 0)` is early
    enough.

    Attributes:
        saved: at least num_saved rows, or the same as `rest` if num_saved is 0.
        rest: (R - first, C), or the same as `saved` if all rows are saved.
        two_buffers: whether kernels that have a version for two buffers take it.
    """

    saved: Tensor
    rest: Tensor
    num_saved: int
    first: int = 0
    two_buffers: bool = True

    @classmethod
    def of(cls, rows: "Tensor | SplitRows") -> "SplitRows":
        """rows themselves, or a tensor as both buffers."""
        return rows if isinstance(rows, SplitRows) else cls(rows, rows, rows.shape[0], two_buffers=False)

    @classmethod
    def beside(cls, saved: Tensor, num_rows: int, two_buffers: bool = True) -> "SplitRows":
        """All rows of `saved`, and a new buffer for the others; only one of the two where that is enough.

        The caller chooses two_buffers, not the number of rows: another number must not compile another version.
        """
        num_saved = saved.shape[0]
        if num_saved == num_rows:
            return cls(saved, saved, num_saved, two_buffers=two_buffers)
        first = max(num_saved - BM.value + 1, 0)
        rest = saved.new_empty(num_rows - first, saved.shape[1])
        return cls(saved if num_saved else rest, rest, num_saved, first, two_buffers)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.first + self.rest.shape[0], self.rest.shape[1])


def _block(tensor: Tensor, rows: int, cols: int, block_rows: int, block_cols: int) -> _Descriptor:
    return _Descriptor(tensor, [rows, cols], [cols, 1], [block_rows, block_cols], TILE_SMEM.value)


def _ragged_block(tensor: Tensor, cols: int, block_rows: int = 64, block_cols: int = 64) -> _Descriptor:
    """Descriptor over the rows of a 2-d tensor whose bounds can be set at any row; see RAGGED_ROWS."""
    stride = tensor.stride(0)
    return _Descriptor(
        tensor,
        [RAGGED_OUTER, RAGGED_OUTER, RAGGED_ROWS.value, cols],
        [RAGGED_WRAP - stride, stride, stride, 1],
        [1, 1, block_rows, block_cols],
        RAGGED_SMEM.value,
    )


def _up_and_gate(z: Tensor, F: int) -> _Descriptor:
    """Descriptor of z as (2, rows, F)."""
    return _Descriptor(z, [2, z.shape[0], F], [F, z.stride(0), 1], [2, BM.value, CHUNK.value], Z_SMEM.value)


def _halves_blocks(rows: Tensor, F: int) -> tuple[_Descriptor, _Descriptor]:
    """Descriptors of the first and the last F columns."""
    return _ragged_block(rows, F), _ragged_block(rows[:, F:], F)


def _tiles(routing: RoutingMetadata) -> tuple[Tensor, Tensor, Tensor]:
    return routing.tiles, routing.offsets_E1, routing.num_tiles


def _at_a_time(rule: tuple[int, int], width: int, cols: int) -> int:
    from_bytes, tiles = rule
    return tiles if 2 * width * cols >= from_bytes else 0


def _program_sync(routing: RoutingMetadata, flops: float) -> tuple[Tensor, int]:
    """Arguments of a launch's `ProgramSync`: counts and max_polls; any pointer and 0 for a launch too short for it."""
    if flops < SYNC_FLOPS:
        return routing.offsets_E1, 0
    device = routing.offsets_E1.device
    counts = torch.full((SYNC_SLOTS.value,), 1 << 30, dtype=torch.int32, device=device)
    counts[: num_programs(device)] = 0
    return counts, MAX_POLLS


def _launch_up_proj(
    x_TD: Tensor,
    w1_ED2F: Tensor,
    routing: RoutingMetadata,
    z: Tensor | None,
    act_RF: Tensor | None,
    *,
    first_row: int,
    z_first: int,
    z_end: int,
) -> None:
    E, D, F2 = w1_ED2F.shape
    F = F2 // 2
    act_desc = _ragged_block(act_RF, F) if act_RF is not None else None
    if z is None:  # its own variant of the kernel
        z_up_desc = z_gate_desc = None
    elif z_end > 0:
        z_up_desc, z_gate_desc = _halves_blocks(z, F)
    else:  # no row of z is written: any descriptors of this width will do
        z_up_desc = z_gate_desc = act_desc
    launch(
        up_proj_kernel, _grid(x_TD),
        x_TD, x_TD.stride(0), routing.token_R, _block(w1_ED2F, E * D, F2, 64, 128),
        z_up_desc, z_gate_desc, act_desc or z_up_desc, *_tiles(routing),
        *_program_sync(routing, 4 * (routing.token_R.shape[0] - first_row) * D * F), D, F, first_row, z_first, z_end,
        ACT=act_RF is not None, COLS_AT_A_TIME=_at_a_time(UP_AT_A_TIME, D, F2), num_warps=4,
    )  # fmt: skip


def up_proj(
    x_TD: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, z_S2F: Tensor | None, num_saved: int, act_RF: Tensor
) -> None:
    """act[r] = up * silu(gate) of z[r] = x[token_R[r]] @ w1[e]; saves z[r] for r < num_saved.

    Args:
        x_TD, w1_ED2F: bfloat16 or float16, contiguous.
        z_S2F: at least num_saved rows. None for the version that saves none.
        act_RF: output.
    """
    if act_RF.shape[0]:
        _launch_up_proj(x_TD, w1_ED2F, routing, z_S2F, act_RF, first_row=0, z_first=0, z_end=num_saved)


def recompute_z(x_TD: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, z: SplitRows) -> None:
    """z[r] for r >= z.num_saved into z.rest.

    Works in whole tiles: rows before z.num_saved of the tile around it are written too.

    Args:
        z: (R, 2F).
    """
    R = z.shape[0]
    if z.num_saved < R:
        _launch_up_proj(x_TD, w1_ED2F, routing, z.rest, None, first_row=z.num_saved, z_first=z.first, z_end=R)


def _launch_rows(
    rows: SplitRows, w: Tensor, w_is_nk: bool, routing: RoutingMetadata, out: Tensor, first_col: int
) -> None:
    E, w_rows, w_cols = w.shape
    width = rows.shape[1]
    in_desc = _block(rows.saved, rows.saved.shape[0], width, 64, 64)
    rest_desc = _block(rows.rest, rows.rest.shape[0], width, 64, 64) if rows.two_buffers else None
    w_desc = _block(w, E * w_rows, w_cols, *((256, 64) if w_is_nk else (64, 256)))
    num_cols = cdiv(w_rows if w_is_nk else w_cols, BN.value)  # over all ranges: more ranges compile nothing new
    at_a_time = cdiv(num_cols, cdiv(num_cols, ROWS_AT_A_TIME)) if num_cols > ROWS_AT_A_TIME else 0
    launch(
        rows_kernel, _grid(out),
        in_desc, rest_desc, rows.num_saved, rows.first, w_desc, _ragged_block(out, out.shape[1]),
        *_tiles(routing), width, w_rows, first_col, out.shape[1],
        W_IS_NK=w_is_nk, COLS_AT_A_TIME=at_a_time, num_warps=4,
    )  # fmt: skip


def down_proj(act_RF: Tensor, w2_EFD: Tensor, routing: RoutingMetadata, y_RD: Tensor, first_col: int = 0) -> None:
    """y = act @ w2[e], columns [first_col, first_col + y.shape[1])."""
    if act_RF.shape[0]:
        _launch_rows(SplitRows.of(act_RF), w2_EFD, False, routing, y_RD, first_col)


def up_proj_backward(
    dz: Tensor | SplitRows, w1_ED2F: Tensor, routing: RoutingMetadata, dx_RD: Tensor, first_col: int = 0
) -> None:
    """dx rows = dz @ w1[e]^T, columns [first_col, first_col + dx.shape[1]).

    Args:
        dz: (R, 2F).
    """
    if dz.shape[0]:
        _launch_rows(SplitRows.of(dz), w1_ED2F, True, routing, dx_RD, first_col)


def down_proj_backward(
    dout_TD: Tensor,
    w2_EFD: Tensor,
    routing: RoutingMetadata,
    score_R: Tensor,
    z: SplitRows,
    dz: Tensor | SplitRows,
    act_scaled_RF: Tensor,
    dscore_partial: Tensor,
) -> None:
    """Backward of score * down_proj(up * silu(gate)) up to dz.

    Args:
        z: (R, 2F).
        dz: output, (R, 2F), a tensor, or `SplitRows` with the num_saved of z; each of its buffers may be that of z.
        act_scaled_RF: output, score * act.
        dscore_partial: output, (R, dscore_parts(F)) float32, whose row sums are the scores' gradients.
    """
    E, F, D = w2_EFD.shape
    if not act_scaled_RF.shape[0]:
        return
    dz = SplitRows.of(dz)
    assert dz.num_saved == z.num_saved or dz.saved is dz.rest, "dz is split elsewhere than z"
    launch(
        down_proj_backward_kernel, _grid(dout_TD),
        dout_TD, dout_TD.stride(0), routing.token_R, _block(w2_EFD, E * F, D, 256, 64),
        _up_and_gate(z.saved, F), _up_and_gate(z.rest, F), z.first, z.num_saved, score_R,
        *_halves_blocks(dz.saved, F), *_halves_blocks(dz.rest, F), dz.first,
        _ragged_block(act_scaled_RF, F), dscore_partial,
        *_tiles(routing), D, F, COLS_AT_A_TIME=_at_a_time(DOWN_BACKWARD_AT_A_TIME, D, F), num_warps=4,
    )  # fmt: skip


def weight_grad(
    gathered_TM: Tensor, rows: Tensor | SplitRows, routing: RoutingMetadata, dw: Tensor, transposed: bool = False
) -> None:
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
    rest_desc = _ragged_block(rows.rest, N, 64, 256) if rows.two_buffers else None
    launch(
        weight_grad_kernel, _grid(dw),
        gathered_TM, gathered_TM.stride(0), routing.token_R,
        _ragged_block(rows.saved, N, 64, 256), rest_desc, rows.num_saved, rows.first,
        _ragged_block(dw.view(-1, dw.shape[2]), dw.shape[2]),
        routing.offsets_E1, *_program_sync(routing, 2 * R * M * N), E, M, N,
        TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip
