"""Decides from sizes alone in which pieces and in which order one layer allocates memory.

op.py follows the schedule, and the memory planner foresees it by calling the same functions. Nothing here
touches a tensor.
"""

import functools
from dataclasses import dataclass, replace

from momoe_titan.kernels.launch import cdiv

Ranges = tuple[tuple[int, int], ...]  # (first column, last column + 1) of each range

_MAX_RANGES = 4
_SMALL_BYTES = 64 << 20  # buffers up to this size are not worth more launches
_L2_BYTES = 16 << 20  # from this size on, an expert's weights are read faster in two ranges of columns
# Least work of each range, in FLOPs, if a product is split into ranges.
Y_RANGE_FLOPS = 0.75e11  # y: 0.16 ms at 7B-n256, where another range costs 0.05 ms
SAVED_Y_RANGE_FLOPS = 3e11  # y, where a range only makes room for saved z
DX_RANGE_FLOPS = 1.5e11  # dx, where each range reads rows that are twice as wide


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of one call of the op, and which weights get a gradient."""

    num_tokens: int  # T
    num_rows: int  # R
    num_experts: int  # E
    d_model: int  # D
    ffn: int  # F
    itemsize: int  # bytes of an element of x, the weights, and every buffer below
    gated: bool = True  # whether z and w1 are 2F wide, not F
    trains_w1: bool = True
    trains_w2: bool = True

    def fair_share(self, tokens: int, rows: int) -> "LayerSizes":
        """Sizes of an even share, if these are `tokens` and `rows` times that share."""
        return replace(self, num_tokens=self.num_tokens // tokens, num_rows=self.num_rows // rows)

    @property
    def width(self) -> int:
        """Z, columns of z."""
        return self.ffn * (2 if self.gated else 1)

    @property
    def act_bytes(self) -> int:
        return self.num_rows * self.ffn * self.itemsize

    @property
    def z_bytes(self) -> int:
        """Bytes of z or dz."""
        return self.num_rows * self.width * self.itemsize

    @property
    def out_bytes(self) -> int:
        """Bytes of out, x or dx."""
        return self.num_tokens * self.d_model * self.itemsize

    @property
    def dw1_bytes(self) -> int:
        return self.num_experts * self.d_model * self.width * self.itemsize if self.trains_w1 else 0

    @property
    def dw2_bytes(self) -> int:
        return self.num_experts * self.ffn * self.d_model * self.itemsize if self.trains_w2 else 0


@dataclass(frozen=True)
class KernelTraits:
    """What a family of kernels allows in memory.

    Attributes:
        tile_cols: width of an output tile, where y and dx may be computed in ranges of columns; None where not.
        dz_over_z: whether dz may take the place of saved rows of z.
    """

    tile_cols: int | None
    dz_over_z: bool


@dataclass(frozen=True)
class MemorySchedule:
    """How one layer uses memory.

    Attributes:
        y_ranges: columns of y (R, D) that exist at a time, one range after another, in the forward.
        dx_ranges: the same of the rows of dx, in the backward.
        dw2_last: whether the backward computes dw2 after dz is freed, and holds act until then.
    """

    y_ranges: Ranges
    dx_ranges: Ranges
    dw2_last: bool


@functools.lru_cache(maxsize=1024)
def memory_schedule(sizes: LayerSizes, traits: KernelTraits, inference: bool) -> MemorySchedule:
    """The schedule of a layer of these sizes.

    It is the same at every save_percent, which must not change what is launched; a plan made at 100 so
    foresees all others.
    """
    return MemorySchedule(y_ranges(sizes, traits, inference), dx_ranges(sizes, traits), dw2_comes_last(sizes))


def dw2_comes_last(sizes: LayerSizes) -> bool:
    """Whether dw2 is computed after dz is freed: so if act, which is held until then, is smaller than dw2.

    The backward's peak is then dz (twice the size of act), dw1, dx and the smaller of act and dw2; or act
    with all gradients, if that is more.
    """
    return sizes.act_bytes < sizes.dw2_bytes


def y_ranges(sizes: LayerSizes, traits: KernelTraits, inference: bool) -> Ranges:
    """Ranges of y's columns that keep the forward's peak, z + act + y, below the backward's.

    There are enough ranges for act + y to stay below dz and all gradients. Further ranges, for z + act + y, are made
    only if each has much work, since they gain nothing at a low save_percent.
    """
    act, dx, dw1, dw2 = sizes.act_bytes, sizes.out_bytes, sizes.dw1_bytes, sizes.dw2_bytes
    ranges = column_ranges(sizes, traits, sizes.ffn, sizes.z_bytes - act + dx + dw1 + dw2, Y_RANGE_FLOPS)
    if inference:
        return ranges
    beside_z = dx + dw1 + min(act, dw2) - act  # dz is as large as z
    return max(ranges, column_ranges(sizes, traits, sizes.ffn, beside_z, SAVED_Y_RANGE_FLOPS), key=len)


def dx_ranges(sizes: LayerSizes, traits: KernelTraits) -> Ranges:
    """Ranges of the columns of dx's rows: each fits into memory that is needed anyway.

    That is dw1, which is allocated next, or where w1 is frozen act, which the forward has beside z.
    """
    return column_ranges(sizes, traits, sizes.width, sizes.dw1_bytes or sizes.act_bytes, DX_RANGE_FLOPS)


def column_ranges(sizes: LayerSizes, traits: KernelTraits, width: int, max_bytes: int, range_flops: float) -> Ranges:
    """Divides the columns of an (R, D) product into ranges that are computed one after another.

    Whole tiles wide, and as few ranges as let a range fit into max_bytes; but at most four, and each with
    range_flops to do, so that y or dx costs the layer no more than about 2% of its speed. One H100, ms of
    forward, backward in one, two, three ranges: 7B-n256 1.184, 2.162; 1.231, 2.216; 1.265, 2.263; 1.4B-n512
    0.828, 1.698; 0.871, 1.754; 0.915, 1.831. Two where an expert's weights are large, which was faster
    (30B-n1024 dx on an H200 3.27 -> 2.99, before few column tiles at a time) and takes less memory.

    Args:
        width: the contraction, columns of the rows that are multiplied.
        max_bytes: the size that a range should not exceed.
        range_flops: the least work of a range, if there are several.
    """
    cols = sizes.d_model
    if traits.tile_cols is None:
        return ((0, cols),)
    num_bytes = sizes.num_rows * cols * sizes.itemsize
    num_ranges = cdiv(num_bytes, max(max_bytes, _SMALL_BYTES))
    num_ranges = min(num_ranges, _MAX_RANGES, max(int(2 * sizes.num_rows * width * cols / range_flops), 1))
    if width * cols * sizes.itemsize >= _L2_BYTES and num_bytes > _SMALL_BYTES:
        num_ranges = max(num_ranges, 2)
    step = cdiv(cdiv(cols, traits.tile_cols), max(num_ranges, 1)) * traits.tile_cols
    return tuple((begin, min(begin + step, cols)) for begin in range(0, cols, step))
