"""What a plan makes of the allocations it was traced from."""

import pytest

from momoe_titan.memory.plan import CUBLAS_BYTES, GIB, MemoryPlan, Moment, ZRows, context_bytes

MIB = 1 << 20


@pytest.mark.parametrize("save_percent, saved, others", [(0, 0, 60), (20, 20, 48 + 16), (100, 100, 0)])
def test_saved_rows_grow_with_save_percent_and_the_others_fall(save_percent, saved, others):
    """The others have a tile of both kinds beyond their share, where there are both."""
    events = [
        (0, 100 * MIB, ZRows("a", saved=True)),
        (1, 60 * MIB, ZRows("a", saved=False, tile_bytes=16 * MIB)),
        (2, 30 * MIB, ZRows("b", saved=True)),
        (3, 10 * MIB, None),
    ]
    moments = [
        Moment("loss", [("a", 100 * MIB), ("b", 30 * MIB)], 10 * MIB, {}),
        Moment("clip", [("a", 200 * MIB)], 0, {}),
    ]
    plan = MemoryPlan(["a", "b"], moments, {}, 1, events=events)
    assert plan.reserved([save_percent, 100]) == (saved + others + 30 + 10) * MIB + CUBLAS_BYTES
    assert plan.saved_z([save_percent, 100]) == (saved + 30) * MIB  # of the end of the forward
    assert plan.slack == 60 * MIB  # the others, at 0; nothing at 100


def test_what_cublas_takes_comes_on_top_of_a_graph_too():
    moments = [Moment("loss", [], 40 * MIB, {})]
    plan = MemoryPlan([], moments, {}, 1, events=[(0, 40 * MIB, None)], step=(0, 1), from_graph=True)
    assert plan.reserved(0) == 40 * MIB + CUBLAS_BYTES


def test_more_is_assumed_of_a_gpu_with_others_beside_it():
    assert [round(context_bytes(ranks) / GIB, 3) for ranks in (1, 2, 8)] == [0.6, 1.6, 1.6]
