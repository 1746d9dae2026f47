"""Launchers of the Hopper kernels: what each computes, its descriptors, and which tile order it takes.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from momoe_titan.kernels import gpu, versions
from momoe_titan.kernels.activations import is_gated
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


def fits(dtype: torch.dtype, D: int, F: int, capability: tuple[int, int]) -> bool:
    """Whether these kernels take this dtype (bfloat16, float16), these widths (multiples of 64) and this GPU (9.0)."""
    widths = D % 64 == 0 and F % 64 == 0
    return dtype in (torch.bfloat16, torch.float16) and widths and tuple(capability) == (9, 0)


def supported(dtype: torch.dtype, D: int, F: int, capability: tuple[int, int]) -> bool:
    """The same, and that this release of Triton runs them (see `versions`)."""
    return fits(dtype, D, F, capability) and versions.takes_hopper_kernels()


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


def refusal(experts: Experts) -> str | None:
    """What of these experts the kernels do not take, in words; None if they take all of it."""
    for name in ("w1", "w2", "gate"):
        w = getattr(experts, name)
        if w is not None and Stacked.of(w) is None:
            return f"{name} with strides {tuple(w.stride())}"
    if experts.bias1 is not None and experts.scores_on_input:
        return "a bias of the first product together with scores on the input"
    return None


class Stacked(NamedTuple):
    """How weights, logically (E, K, N) with the contraction K, lie in memory as one matrix.

    Attributes:
        is_nk: whether its rows are columns N of the weights, else they are rows K.
        rows: rows from one expert to the next.
        height: rows of an expert.
        width: columns.
        stride: elements from one row to the next.
    """

    is_nk: bool
    rows: int
    height: int
    width: int
    stride: int

    @classmethod
    def of(cls, w_EKN: Tensor) -> "Stacked | None":
        """None if TMA can't read them so."""
        _, height, width = w_EKN.shape
        expert, stride, last = w_EKN.stride()
        is_nk = last != 1
        if is_nk:
            height, width, stride, last = width, height, last, stride
        if last != 1 or stride % 8 or stride < width or (w_EKN.shape[0] > 1 and expert % stride):
            return None
        return cls(is_nk, expert // stride, height, width, stride)

    def block(self, w_EKN: Tensor, cols: int) -> _Descriptor:
        """Descriptor of blocks of 64 of K and some columns of N."""
        num_rows = (w_EKN.shape[0] - 1) * self.rows + self.height
        shape = (cols, 64) if self.is_nk else (64, cols)
        return _Descriptor(w_EKN, [num_rows, self.width], [self.stride, 1], list(shape), TILE_SMEM.value)


def _stacked(w_EKN: Tensor) -> Stacked:
    stacked = Stacked.of(w_EKN)
    assert stacked is not None, "see `refusal`"
    return stacked


def _form(experts: Experts) -> str:
    """FORM of the kernels."""
    if not is_gated(experts.activation):
        return "ungated"
    return "interleaved" if experts.order.startswith("interleaved") else "halves"


def _is_gate_first(experts: Experts) -> bool:
    return is_gated(experts.activation) and experts.order.endswith("gate_up")


def dscore_parts(F: int) -> int:
    """Columns of the dscore_partial buffer of `down_proj_backward`."""
    return cdiv(F, BN.value)


def num_programs(device: torch.device) -> int:
    """Programs of a launch on this device: one per multiprocessor."""
    return gpu.num_processors(device)


def _grid(tensor: Tensor) -> tuple[int]:
    return (num_programs(tensor.device),)


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

    def columns(self, begin: int, end: int) -> "SplitRows":
        """Some columns of all rows."""
        return replace(self, saved=self.saved[:, begin:end], rest=self.rest[:, begin:end])

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


def _z_blocks(z: Tensor, experts: Experts) -> _Descriptor:
    """Descriptor of z for `TwoBufferZ`."""
    form, rows, stride = _form(experts), z.shape[0], z.stride(0)
    if form == "halves":
        shape, strides = [2, rows, experts.ffn], [experts.ffn, stride, 1]
    elif form == "interleaved":
        shape, strides = [experts.width // CHUNK.value, rows, CHUNK.value], [CHUNK.value, stride, 1]
    else:
        shape, strides = [1, rows, experts.ffn], [stride, stride, 1]
    return _Descriptor(z, shape, strides, [2, BM.value, CHUNK.value], Z_SMEM.value)


def _z_stores(rows: Tensor, experts: Experts, *, in_order: bool) -> tuple[_Descriptor, _Descriptor]:
    """Descriptors of the columns of up and of gate; or, in_order, of the first and of the last F columns.

    Twice that of all columns where z has no halves.
    """
    if _form(experts) != "halves":
        whole = _ragged_block(rows, experts.width)
        return whole, whole
    F = experts.ffn
    first, last = _ragged_block(rows, F), _ragged_block(rows[:, F:], F)
    return (last, first) if _is_gate_first(experts) and not in_order else (first, last)


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
    experts: Experts,
    routing: RoutingMetadata,
    z: Tensor | None,
    act_RF: Tensor | None,
    *,
    first_row: int,
    z_first: int,
    z_end: int,
) -> None:
    D, F, form = x_TD.shape[1], experts.ffn, _form(experts)
    act_desc = _ragged_block(act_RF, F) if act_RF is not None else None
    if z is None:  # its own variant of the kernel
        z_up_desc = z_gate_desc = None
    elif z_end > 0:
        z_up_desc, z_gate_desc = _z_stores(z, experts, in_order=False)
    else:  # no row of z is written: any descriptors of this width will do
        z_up_desc = z_gate_desc = act_desc
    stacked, cols = _stacked(experts.w1), 128 if form == "halves" else 256
    launch(
        up_proj_kernel, _grid(x_TD),
        x_TD, x_TD.stride(0), routing.token_R, stacked.block(experts.w1, cols),
        z_up_desc, z_gate_desc, act_desc or z_up_desc, *_tiles(routing),
        *_program_sync(routing, 2 * (routing.token_R.shape[0] - first_row) * D * experts.width),
        D, F, first_row, z_first, z_end,
        None if experts.gate is None else stacked.block(experts.gate, cols),
        experts.bias1, routing.score_R if experts.scores_on_input else None, stacked.rows,
        ACT=act_RF is not None, COLS_AT_A_TIME=_at_a_time(UP_AT_A_TIME, D, experts.width), W_IS_NK=stacked.is_nk,
        FORM=form, GATE_FIRST=_is_gate_first(experts), ACTIVATION=experts.activation, num_warps=4,
    )  # fmt: skip


def up_proj(
    x_TD: Tensor, experts: Experts, routing: RoutingMetadata, z_SZ: Tensor | None, num_saved: int, act_RF: Tensor
) -> None:
    """act[r] = up * silu(gate) of z[r] = x[token_R[r]] @ w1[e]; saves z[r] for r < num_saved.

    z has bias1, but with scores on the input neither scores nor bias.

    Args:
        x_TD: bfloat16 or float16, contiguous.
        z_SZ: at least num_saved rows. None for the version that saves none.
        act_RF: output.
    """
    if act_RF.shape[0]:
        _launch_up_proj(x_TD, experts, routing, z_SZ, act_RF, first_row=0, z_first=0, z_end=num_saved)


def recompute_z(x_TD: Tensor, experts: Experts, routing: RoutingMetadata, z: SplitRows) -> None:
    """z[r] for r >= z.num_saved into z.rest.

    Works in whole tiles: rows before z.num_saved of the tile around it are written too.

    Args:
        z: (R, Z).
    """
    R = z.shape[0]
    if z.num_saved < R:
        _launch_up_proj(x_TD, experts, routing, z.rest, None, first_row=z.num_saved, z_first=z.first, z_end=R)


def _launch_rows(rows: SplitRows, weights: list[Tensor], routing: RoutingMetadata, out: Tensor, first_col: int) -> None:
    """Weights are (E, width, columns); if there are two, each has half of the width."""
    width, columns, stacked = rows.shape[1], weights[0].shape[2], _stacked(weights[0])
    in_desc = _block(rows.saved, rows.saved.shape[0], width, 64, 64)
    rest_desc = _block(rows.rest, rows.rest.shape[0], width, 64, 64) if rows.two_buffers else None
    w_descs = [stacked.block(w, 256) for w in weights]
    num_cols = cdiv(columns, BN.value)  # over all ranges: more ranges compile nothing new
    at_a_time = cdiv(num_cols, cdiv(num_cols, ROWS_AT_A_TIME)) if num_cols > ROWS_AT_A_TIME else 0
    launch(
        rows_kernel, _grid(out),
        in_desc, rest_desc, rows.num_saved, rows.first, w_descs[0], _ragged_block(out, out.shape[1]),
        *_tiles(routing), width, stacked.rows, first_col, out.shape[1], w_descs[1] if len(weights) == 2 else None,
        W_IS_NK=stacked.is_nk, COLS_AT_A_TIME=at_a_time, num_warps=4,
    )  # fmt: skip


def down_proj(act_RF: Tensor, w2_EFD: Tensor, routing: RoutingMetadata, y_RD: Tensor, first_col: int = 0) -> None:
    """y = act @ w2[e], columns [first_col, first_col + y.shape[1])."""
    if act_RF.shape[0]:
        _launch_rows(SplitRows.of(act_RF), [w2_EFD], routing, y_RD, first_col)


def up_proj_backward(
    dz: Tensor | SplitRows, experts: Experts, routing: RoutingMetadata, dx_RD: Tensor, first_col: int = 0
) -> None:
    """dx rows = dz @ w1[e]^T, columns [first_col, first_col + dx.shape[1]).

    Args:
        dz: (R, Z).
    """
    if dz.shape[0]:
        weights = [w.transpose(1, 2) for w in (experts.w1, experts.gate) if w is not None]
        _launch_rows(SplitRows.of(dz), weights, routing, dx_RD, first_col)


def down_proj_backward(
    dout_TD: Tensor,
    experts: Experts,
    routing: RoutingMetadata,
    z: SplitRows,
    dz: Tensor | SplitRows,
    act_scaled_RF: Tensor | None,
    dscore_partial: Tensor,
) -> None:
    """Backward of score * down_proj(up * silu(gate)) up to dz.

    With scores on the input z and dz are those of x @ w1, act is without scores, and dscore that of the input's scores.

    Args:
        z: (R, Z).
        dz: output, (R, Z), a tensor, or `SplitRows` with the num_saved of z; each of its buffers may be that of z.
        act_scaled_RF: output, score * act; None where it is not wanted.
        dscore_partial: output, (R, dscore_parts(F)) float32, whose row sums are the scores' gradients.
    """
    if not z.shape[0]:
        return
    D, F = dout_TD.shape[1], experts.ffn
    dz = SplitRows.of(dz)
    assert dz.num_saved == z.num_saved or dz.saved is dz.rest, "dz is split elsewhere than z"
    w_EDF = experts.w2.transpose(1, 2)
    stacked = _stacked(w_EDF)
    launch(
        down_proj_backward_kernel, _grid(dout_TD),
        dout_TD, dout_TD.stride(0), routing.token_R, stacked.block(w_EDF, 256),
        _z_blocks(z.saved, experts), _z_blocks(z.rest, experts), z.first, z.num_saved, routing.score_R,
        *_z_stores(dz.saved, experts, in_order=True), *_z_stores(dz.rest, experts, in_order=True), dz.first,
        None if act_scaled_RF is None else _ragged_block(act_scaled_RF, F), dscore_partial,
        *_tiles(routing), D, F, stacked.rows,
        COLS_AT_A_TIME=_at_a_time(DOWN_BACKWARD_AT_A_TIME, D, F), W_IS_NK=stacked.is_nk, FORM=_form(experts),
        GATE_FIRST=_is_gate_first(experts), ACTIVATION=experts.activation, SCORED=experts.scores_on_input, num_warps=4,
    )  # fmt: skip


def weight_grad(gathered_TM: Tensor, rows: Tensor | SplitRows, routing: RoutingMetadata, dw: Tensor) -> None:
    """dw[e] (M, N) = gathered[token of e's rows]^T @ rows[e's rows].

    An expert without rows gets zeros. The gathered side is the one whose tiles are 128 wide either
    way: it costs half the copies of a 256 wide one.

    Args:
        gathered_TM: contiguous, aligned to 16 bytes.
        rows: (R, N), a tensor or `SplitRows`, maybe some columns of wider ones.
        dw: contiguous in M or in N.
    """
    E = dw.shape[0]
    M, (R, N) = gathered_TM.shape[1], rows.shape
    if not R:
        dw.zero_()
        return
    rows = SplitRows.of(rows)
    rest_desc = _ragged_block(rows.rest, N, 64, 256) if rows.two_buffers else None
    transposed = dw.stride(2) != 1
    stored = dw.transpose(1, 2) if transposed else dw
    launch(
        weight_grad_kernel, _grid(dw),
        gathered_TM, gathered_TM.stride(0), routing.token_R,
        _ragged_block(rows.saved, N, 64, 256), rest_desc, rows.num_saved, rows.first,
        _ragged_block(stored.view(-1, stored.shape[2]), stored.shape[2]),
        routing.offsets_E1, *_program_sync(routing, 2 * R * M * N), E, M, N,
        TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip


def up_weight_grad(x_TD: Tensor, dz: Tensor | SplitRows, routing: RoutingMetadata, dw1s: list[Tensor | None]) -> None:
    """The gradient of w1; or of up and of gate, where they are two tensors (None where it is not wanted)."""
    for i, dw1 in enumerate(dw1s):
        if dw1 is not None:
            width = dw1.shape[2]
            part = dz if len(dw1s) == 1 else SplitRows.of(dz).columns(i * width, (i + 1) * width)
            weight_grad(x_TD, part, routing, dw1)
