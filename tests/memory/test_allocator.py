"""The model of the caching allocator, by what its documentation and source say."""

import pytest

from momoe_titan.memory.allocator import (
    MIB,
    CachingAllocator,
    OutOfMemory,
    block_bytes,
    peak_with_graph,
    replay,
)


@pytest.mark.parametrize(
    "request_bytes, reserved",
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (21 * MIB, 22 * MIB),
    ],
)
def test_segments(request_bytes, reserved):
    assert CachingAllocator().reserved == 0
    assert replay([(0, request_bytes)]).peak_reserved == reserved


def test_requests_are_rounded_to_512_bytes():
    assert [block_bytes(n) for n in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    assert replay([(0, 1), (1, 513)]).peak_active == 512 + 1024


def test_a_large_block_keeps_a_rest_of_up_to_one_mebibyte():
    assert replay([(0, 20 * MIB), (0, 0), (1, 19 * MIB)]).active == 20 * MIB
    assert replay([(0, 20 * MIB), (0, 0), (1, 19 * MIB - 512)]).active == 19 * MIB - 512


def test_freed_blocks_are_reused_and_merged():
    thirds = [(i, 4 * MIB) for i in range(3)]  # of one segment
    assert replay([*thirds, *((i, 0) for i in (1, 0, 2)), (3, 12 * MIB)]).peak_reserved == 20 * MIB
    assert replay([*thirds, (0, 0), (2, 0), (3, 14 * MIB)]).peak_reserved == 34 * MIB  # 4 and 12 free, apart


def test_the_best_fit_is_taken():
    allocator = replay([(0, 40 * MIB), (1, 20 * MIB), (0, 0), (1, 0), (2, 20 * MIB), (3, 40 * MIB)])
    assert allocator.peak_reserved == 60 * MIB


def test_cached_segments_go_back_before_memory_runs_out():
    events = [(0, 40 * MIB), (0, 0), (1, 60 * MIB)]
    assert replay(events).peak_reserved == 100 * MIB
    allocator = replay(events, capacity=60 * MIB)
    assert allocator.reserved == 60 * MIB and allocator.retries == 1
    with pytest.raises(OutOfMemory):
        replay(events, capacity=60 * MIB - 1)


def test_a_graph_has_memory_of_its_own():
    """It keeps what a step frees; the rest keeps whole segments in which something of the first step lies."""
    begin, step = [(9, 40 * MIB), (9, 0)], [(0, 12 * MIB), (1, 12 * MIB), (0, 0)]  # 1 is a gradient
    first = [*begin, *step, (2, 16 * MIB), (1, 0)]  # 2 the optimizer's, in what is free of the 40 MiB
    captured = range(len(first), len(first) + len(step))
    events = [*first, *((number + 10, n) for number, n in step)]
    assert replay(events).peak_reserved == 40 * MIB and replay(step).peak_reserved == 24 * MIB
    assert peak_with_graph(events, captured) == 64 * MIB
    assert peak_with_graph([*events, (11, 0)], captured) == 64 * MIB
    assert peak_with_graph(events, captured, capacity=64 * MIB) == 64 * MIB
    with pytest.raises(OutOfMemory):
        peak_with_graph(events, captured, capacity=64 * MIB - 1)


def test_gradients_are_freed_before_a_capture():
    assert peak_with_graph([(0, 40 * MIB)], range(1)) == 40 * MIB
