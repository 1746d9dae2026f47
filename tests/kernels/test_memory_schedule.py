"""In which ranges of columns y and dx come, and when dw2 does."""

from dataclasses import replace

import pytest

from momoe_titan.kernels.memory_schedule import (
    DX_RANGE_FLOPS,
    Y_RANGE_FLOPS,
    KernelTraits,
    LayerSizes,
    column_ranges,
    dx_ranges,
    memory_schedule,
)

HOPPER = KernelTraits(tile_cols=256, dz_over_z=True)
PORTABLE = KernelTraits(tile_cols=None, dz_over_z=False)


def sizes_of(rows, cols, ffn=1):
    return LayerSizes(num_tokens=1, num_rows=rows, num_experts=1, d_model=cols, ffn=ffn, itemsize=2)


@pytest.mark.parametrize(
    "rows, width, cols, max_mib, want",
    [
        # 7B-n256, dx: 576 MiB would take three, but each has little to do
        (196608, 512, 1536, 192, ((0, 768), (768, 1536))),
        (196608, 256, 1536, 192, ((0, 1536),)),  # half of that: one
        (131072, 2048, 4096, 1024, ((0, 2048), (2048, 4096))),  # fits; two are faster with experts as large as these
        (131072, 1024, 4096, 1024, ((0, 4096),)),
        (8192, 2048, 2048, 256, ((0, 2048),)),  # fits
        (1024, 4096, 4096, 1024, ((0, 4096),)),  # small
        (1000, 2304, 2176, 0, ((0, 2176),)),  # small anyway
        (65536, 2304, 2176, 200, ((0, 1280), (1280, 2176))),  # 272 MiB; whole tiles
        (1 << 20, 1024, 1152, 1, ((0, 512), (512, 1024), (1024, 1152))),
        (1 << 20, 512, 8192, 1, ((0, 2048), (2048, 4096), (4096, 6144), (6144, 8192))),  # no more than four
        (0, 64, 320, 0, ((0, 320),)),
    ],
)
def test_column_ranges(rows, width, cols, max_mib, want):
    assert column_ranges(sizes_of(rows, cols), HOPPER, width, max_mib << 20, DX_RANGE_FLOPS) == want
    assert column_ranges(sizes_of(rows, cols), PORTABLE, width, max_mib << 20, DX_RANGE_FLOPS) == ((0, cols),)


def test_y_comes_in_smaller_ranges():
    halves = ((0, 768), (768, 1536))  # 7B-n256
    assert column_ranges(sizes_of(196608, 1536), HOPPER, 256, 456 << 20, Y_RANGE_FLOPS) == halves
    assert column_ranges(sizes_of(98304, 1536), HOPPER, 256, 100 << 20, Y_RANGE_FLOPS) == ((0, 1536),)


@pytest.mark.parametrize(
    "shape, want",  # T, D, F, E, K; ranges at a width without gradients, with them
    [
        # 30B-n512: z and act beside y, 2816 MiB, are more than the backward's 2048
        ((32768, 4096, 512, 128, 8), (1, 2)),
        ((65536, 2048, 1024, 128, 8), (1, 3)),  # seed-128e-long: 5120, 3840
        ((32768, 4096, 256, 256, 16), (2, 3)),  # 30B-n256
        ((40960, 768, 512, 64, 4), (1, 1)),  # 1.4B-n512: 720, 668, but a range of half would have too little to do
        ((32768, 4096, 1024, 128, 8), (1, 1)),  # 120B-n1024: less than the backward
    ],
)
def test_y_makes_room_for_z(shape, want):
    tokens, cols, ffn, experts, chosen = shape
    sizes = LayerSizes(tokens, tokens * chosen, experts, cols, ffn, itemsize=2)
    got = [len(memory_schedule(sizes, HOPPER, inference).y_ranges) for inference in (True, False)]
    assert tuple(got) == want


def test_dx_fits_into_dw1():
    sizes = LayerSizes(24576, 196608, 128, 1536, 256, itemsize=2)  # 7B-n256
    assert dx_ranges(sizes, HOPPER) == column_ranges(sizes, HOPPER, 512, 192 << 20, DX_RANGE_FLOPS)
    assert len(dx_ranges(sizes, HOPPER)) == 2


def test_dw2_waits_where_act_is_smaller():
    """act (R, F) beside dw2 (E, F, D): the smaller one waits."""
    sizes = LayerSizes(100, 1023, 8, 128, 64, itemsize=2)
    assert memory_schedule(sizes, HOPPER, False).dw2_last
    assert not memory_schedule(replace(sizes, num_rows=1024), HOPPER, False).dw2_last


@pytest.mark.parametrize(
    "trained, want",  # w1 and w2; ranges of y and of dx, 512 MiB each
    [
        ((True, True), (1, 1)),  # dw1 is as large
        ((False, True), (1, 2)),  # act, 256 MiB, is what dx must not exceed
        ((True, False), (1, 1)),
        ((False, False), (2, 2)),
    ],
)
def test_frozen_weights_leave_no_room(trained, want):
    """Without weight gradients the rows of y and dx are a larger part of the peak, and come in more ranges."""
    sizes = LayerSizes(16384, 131072, 64, 2048, 1024, itemsize=2, trains_w1=trained[0], trains_w2=trained[1])
    schedule = memory_schedule(sizes, HOPPER, False)
    assert (len(schedule.y_ranges), len(schedule.dx_ranges)) == want
    assert memory_schedule(replace(sizes, num_rows=1024), HOPPER, False).dw2_last == trained[1]


def test_without_a_gate_z_and_dw1_are_half_as_wide():
    sizes = LayerSizes(1, 1000, 8, 128, 64, itemsize=2)
    assert (sizes.z_bytes, sizes.dw1_bytes) == (2 * sizes.act_bytes, 2 * sizes.dw2_bytes)
    sizes = replace(sizes, gated=False)
    assert (sizes.z_bytes, sizes.dw1_bytes) == (sizes.act_bytes, sizes.dw2_bytes)
