"""Divides documents among ranks, as lists of [start, stop) ranges of document numbers."""


def part_of(ranges: list[tuple[int, int]], index: int, count: int) -> list[tuple[int, int]]:
    """Part `index` of these documents, in order, cut into `count` parts of the same number (give or take one)."""
    each, more = divmod(sum(stop - start for start, stop in ranges), count)
    first = each * index + min(index, more)
    return cut(ranges, first, first + each + (index < more))


def cut(ranges: list[tuple[int, int]], first: int, last: int | None = None) -> list[tuple[int, int]]:
    """The documents at places `first` to `last` (not included) of those in `ranges`.

    cut([(0, 3), (10, 13)], 2, 5) is [(2, 3), (10, 12)].
    """
    found = []
    for start, stop in ranges:
        begin = start + max(first, 0)
        end = stop if last is None else min(stop, start + max(last, 0))
        if begin < end:
            found.append((begin, end))
        first -= stop - start
        last = None if last is None else last - (stop - start)
    return found
