"""`Order`: which document stands at each position of the one sequence of documents that all ranks of a run share.

At every position stands a document of a source, and the sequence never ends. The sequence is computed, not stored:
every rank can look up any position, with little memory. The numbers of ranks and threads have no influence on it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from momoe_titan.data.source import Source

ROUNDS = 6  # of the Feistel network
BLOCK = 1 << 16  # positions in which each source has its exact share
MIXING = 2  # version of the order in which several sources are mixed
KEPT = 1 << 14  # sources of at most so many documents have their permutations kept, not computed place by place


class Order:
    """The documents of one or several sources in the order of training.

    Each source is read in passes: a pass holds each of its documents once, shuffled anew for each pass (or in their
    own order). With several sources, every `BLOCK` positions hold the same number of documents of a source, at places
    that the seed chooses, so that its text has the share of its weight. A source that is shorter than the others begins
    its next pass earlier.

    Args:
        sources: with one document or more each.
        weights: shares of text, above 0, in any unit. One source needs none.
        seed: of shuffling and mixing.
        shuffle: False keeps the documents of each source in their own order.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float] = (1.0,), seed: int = 0, shuffle: bool = True
    ):
        self.sources, self.weights, self.seed, self.shuffle = list(sources), tuple(weights), seed, shuffle
        self._lengths = [len(source) for source in self.sources]
        # A source of long documents needs fewer of them for the same share of text.
        shares = [
            weight * len(source) / max(source.size, 1) for weight, source in zip(weights, self.sources, strict=True)
        ]
        self._quotas = _round_to(shares, BLOCK)

    def with_seed(self, seed: int) -> "Order":
        """The same with another seed."""
        return Order(self.sources, self.weights, seed, self.shuffle)

    def described(self) -> dict[str, Any]:
        """What a position in this order depends on, as JSON has it."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "documents": self._lengths,
            "shares": self._quotas,
            "mixing": MIXING if len(self.sources) > 1 else 0,
            "content": [source.fingerprint for source in self.sources],
        }

    def find(self, positions: Sequence[int]) -> list[tuple[int, int, int]]:
        """The documents at these positions.

        Returns:
            For each position the number of a source, of a document in it, and of the pass over that source, all from 0.
        """
        if len(self.sources) == 1:
            counted = [(0, position) for position in positions]
        else:
            counted = [self._mixed(position) for position in positions]
        found = [(0, 0, 0)] * len(counted)
        of_pass: dict[tuple[int, int], list[int]] = {}
        for i, (source, count) in enumerate(counted):
            of_pass.setdefault((source, count // self._lengths[source]), []).append(i)
        for (source, number), at in of_pass.items():
            length = self._lengths[source]
            places = np.array([counted[i][1] % length for i in at], np.uint64)
            key = self.seed, source, number
            if not self.shuffle or length == 1:
                documents = places
            elif length <= KEPT:
                documents = _permutation(length, key)[places]
            else:
                documents = permute(places, length, key)
            for i, document in zip(at, documents.tolist(), strict=True):
                found[i] = source, document, number
        return found

    def _mixed(self, position: int) -> tuple[int, int]:
        """The source at a position, and how many documents of it stand before the position."""
        block, place = divmod(position, BLOCK)
        source, before = _arranged(self.seed, block, tuple(self._quotas))
        return int(source[place]), block * self._quotas[source[place]] + int(before[place])


def permute(places: np.ndarray, length: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a permutation of 0 to length - 1, which the key chooses, puts these places.

    Any place can be computed by itself, without a table of the permutation.
    A Feistel network permutes the numbers below a power of four. A number that lands at `length` or above is permuted
    again until it is below ("cycle walking"; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).

    Args:
        places: uint64 [n], below `length`.
        length: of the permutation.
        key: numbers of at least 0.

    Returns:
        uint64 [n].
    """
    half = np.uint64(max(2, ((length - 1).bit_length() + 1) // 2))
    keys, mask = _round_keys(key), (np.uint64(1) << half) - np.uint64(1)
    values = places.copy()
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & mask)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(length)
    return values


def _scramble(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of the result depends on all of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def _permutation(length: int, key: tuple[int, ...]) -> np.ndarray:
    return permute(np.arange(length, dtype=np.uint64), length, key)


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)


@lru_cache(maxsize=2)
def _arranged(seed: int, block: int, quotas: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The source at each place of a block, and how many documents of that source the block has before the place."""
    # Not by numpy's own permutation: another version of numpy may have another one.
    places = permute(np.arange(BLOCK, dtype=np.uint64), BLOCK, (seed, block, 0, 1))
    source = np.repeat(np.arange(len(quotas)), quotas)[places]
    before = np.empty(BLOCK, np.int64)
    for i, quota in enumerate(quotas):
        before[source == i] = np.arange(quota)
    return source, before


def _round_to(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers, 1 or more each, in the ratio of the shares, that add up to the total."""
    exact = [share / sum(shares) * total for share in shares]
    rounded = [max(1, int(each)) for each in exact]
    by_rest = sorted(range(len(shares)), key=lambda i: rounded[i] - exact[i])
    for i in by_rest[: max(0, total - sum(rounded))]:
        rounded[i] += 1
    rounded[rounded.index(max(rounded))] += total - sum(rounded)
    return rounded
