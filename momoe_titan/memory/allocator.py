"""A model of PyTorch's caching allocator, which predicts reserved from allocated GPU memory.

Follows c10/cuda/CUDACachingAllocator.cpp with its default options and one stream: two pools, best
fit, blocks that are split and merged again, cached segments given back when the GPU is full.
"""

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MIB = 1 << 20
_UNIT = 512
_SMALL = 1 * MIB  # the largest request for the small pool
_SMALL_SEGMENT = 2 * MIB
_LARGE_SEGMENT = 20 * MIB  # for requests below _MIN_LARGE
_MIN_LARGE = 10 * MIB
_ROUND_LARGE = 2 * MIB


def block_bytes(num_bytes: int) -> int:
    """What is handed out for a request, at least."""
    return (num_bytes + _UNIT - 1) // _UNIT * _UNIT


@dataclass(eq=False)
class _Block:
    num_bytes: int
    address: int
    small: bool
    free: bool = True
    before: "_Block | None" = None  # its neighbours in the segment
    after: "_Block | None" = None


class OutOfMemory(Exception):
    """A request that the GPU has no room for."""


class CachingAllocator:
    """
    Args:
        capacity: bytes it may reserve; None for no limit.

    Attributes:
        active, reserved: bytes in blocks handed out, and in segments.
        peak_active, peak_reserved: their highest values.
        retries: how often cached segments had to be given back to make room.
    """

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity
        self.active = self.reserved = self.peak_active = self.peak_reserved = self.retries = 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {True: [], False: []}
        self._next_address = 0

    def allocate(self, num_bytes: int) -> _Block:
        """
        Raises:
            OutOfMemory: no room.
        """
        size = block_bytes(num_bytes)
        small = size <= _SMALL
        block = self._take(size, small) or self._reserve(size, small)
        rest = block.num_bytes - size
        if rest >= _UNIT if small else rest > _SMALL:
            tail = _Block(rest, block.address + size, small, before=block, after=block.after)
            if tail.after:
                tail.after.before = tail
            block.after, block.num_bytes = tail, size
            self._give(tail)
        block.free = False
        self.active += block.num_bytes
        self.peak_active = max(self.peak_active, self.active)
        return block

    def release(self, block: _Block) -> None:
        self.active -= block.num_bytes
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._remove(neighbour)
                first, second = sorted((neighbour, block), key=lambda b: b.address)
                block.address, block.num_bytes = first.address, first.num_bytes + second.num_bytes
                block.before, block.after = first.before, second.after
        if block.before:
            block.before.after = block
        if block.after:
            block.after.before = block
        self._give(block)

    def _take(self, size: int, small: bool) -> _Block | None:
        pool = self._free[small]
        i = bisect.bisect_left(pool, (size, -1))
        return pool.pop(i)[2] if i < len(pool) else None

    def _give(self, block: _Block) -> None:
        bisect.insort(self._free[block.small], (block.num_bytes, block.address, block))

    def _remove(self, block: _Block) -> None:
        pool = self._free[block.small]
        del pool[bisect.bisect_left(pool, (block.num_bytes, block.address))]

    def _reserve(self, size: int, small: bool) -> _Block:
        if small:
            segment = _SMALL_SEGMENT
        elif size < _MIN_LARGE:
            segment = _LARGE_SEGMENT
        else:
            segment = (size + _ROUND_LARGE - 1) // _ROUND_LARGE * _ROUND_LARGE
        if self.capacity is not None and self.reserved + segment > self.capacity:
            self.retries += 1
            self._trim()
            if self.reserved + segment > self.capacity:
                raise OutOfMemory
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._next_address += segment + 1  # segments never merge
        return _Block(segment, self._next_address - segment, small)

    def _trim(self) -> None:
        """Give back every segment that is free as a whole."""
        for pool in self._free.values():
            whole = [entry for entry in pool if entry[2].before is None and entry[2].after is None]
            for entry in whole:
                pool.remove(entry)
                self.reserved -= entry[0]


def peak_with_graph(events: Sequence[tuple[int, int]], captured: range, capacity: int | None = None) -> int:
    """The most bytes reserved where a CUDA graph is captured behind these events, of some of them once more.

    A graph's memory is a pool of its own, which it keeps. Before a capture PyTorch gives back what is free of the rest,
    but for segments of which a block is in use: an optimizer's state made in the first step lies between what the
    forward and the backward have freed.

    Args:
        events: as for `replay`, the steps before the capture.
        captured: numbers of events in the last step: its forward and backward. What they leave, gradients, is freed
            before the capture.

    Raises:
        OutOfMemory: no room.
    """
    outside, blocks = _replay(events, capacity)
    for number in {events[i][0] for i in captured} & blocks.keys():
        outside.release(blocks.pop(number))
    outside._trim()
    pool, _ = _replay([events[i] for i in captured], None if capacity is None else capacity - outside.reserved)
    return max(outside.peak_reserved, outside.reserved + pool.peak_reserved)


def replay(events: Iterable[tuple[int, int]], capacity: int | None = None) -> CachingAllocator:
    """The allocator after (block, +bytes to allocate it or 0 to release it) in this order.

    Raises:
        OutOfMemory: no room.
    """
    return _replay(events, capacity)[0]


def _replay(events: Iterable[tuple[int, int]], capacity: int | None) -> tuple[CachingAllocator, dict[int, _Block]]:
    """The allocator, and the blocks in use, by number."""
    allocator = CachingAllocator(capacity)
    blocks: dict[int, _Block] = {}
    for number, num_bytes in events:
        if number in blocks:
            allocator.release(blocks.pop(number))
        if num_bytes:
            blocks[number] = allocator.allocate(num_bytes)
    return allocator, blocks
