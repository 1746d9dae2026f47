"""Packs documents into sequences of one length: one after the other, in turn, or so that none is cut."""

import bisect
from abc import ABC, abstractmethod
from collections import deque

import numpy as np

POOL = 256  # documents among which `BestFit` chooses
LINE = 64  # documents whose sequences `Interleave` gives in turn


class Packer(ABC):
    """Takes documents and gives sequences. What it gives depends only on which documents come, and in what order.

    The documents that it holds are its whole state: one that gets them again, from the tokens on that are not used,
    and then the same documents as this one, gives the same sequences.

    Args:
        length: tokens of a sequence.

    Attributes:
        ended: to set once no document follows.
    """

    def __init__(self, length: int):
        self.length = length
        self.ended = False

    @property
    @abstractmethod
    def wants_more(self) -> bool:
        """Whether the next sequence needs another document. `take` may be called if not, or if there is none left."""

    @abstractmethod
    def add(self, position: int, skip: int, tokens: np.ndarray) -> None:
        """Take a document.

        Args:
            position: in the order of documents.
            skip: how many of its tokens were used before.
            tokens: [tokens] the others, one or more.
        """

    @abstractmethod
    def take(self) -> list[np.ndarray] | None:
        """The next sequence: parts of documents, together at most `length` tokens. None if there is none."""

    @abstractmethod
    def begun(self) -> list[tuple[int, int]]:
        """The documents that it holds, in the order in which they came: position, and how many tokens are used."""


class Concatenate(Packer):
    """One document after the other, cut wherever a sequence is full. Nothing is padded."""

    def __init__(self, length: int):
        super().__init__(length)
        self._held: deque[tuple[int, int, np.ndarray]] = deque()
        self._tokens = 0

    @property
    def wants_more(self) -> bool:
        """See `Packer`."""
        return self._tokens < self.length

    def add(self, position: int, skip: int, tokens: np.ndarray) -> None:
        """See `Packer`."""
        self._held.append((position, skip, tokens))
        self._tokens += len(tokens)

    def take(self) -> list[np.ndarray] | None:
        """See `Packer`. At the end comes what fills no sequence, unless it is one token, which predicts nothing."""
        room = min(self._tokens, self.length)
        if self.wants_more and not (self.ended and room > 1):
            return None
        self._tokens -= room
        parts = []
        while room:
            position, skip, tokens = self._held.popleft()
            parts.append(tokens[:room])
            if len(tokens) > room:
                self._put_back(position, skip + room, tokens[room:])
            room -= len(parts[-1])
        return parts

    def _put_back(self, position: int, skip: int, tokens: np.ndarray) -> None:
        self._held.appendleft((position, skip, tokens))

    def begun(self) -> list[tuple[int, int]]:
        """See `Packer`."""
        return [(position, skip) for position, skip, _ in self._held]


class Interleave(Concatenate):
    """As `Concatenate`, but what is left of a document waits behind the `LINE` others that are begun.

    Sequences that follow each other, and hence those of a batch, are of different documents. An
    optimizer step sees more of them, and the next step is more like it.
    """

    @property
    def wants_more(self) -> bool:
        """See `Packer`."""
        return len(self._held) < LINE or super().wants_more

    def _put_back(self, position: int, skip: int, tokens: np.ndarray) -> None:
        self._held.append((position, skip, tokens))


class BestFit(Packer):
    """Whole documents, chosen among `POOL` so that little room is left; only one longer than a sequence is cut.

    A sequence begins with the document that has waited longest, and goes on with the longest that fits, until none
    does. Such packing is best-fit decreasing (Ding et al., Fewer Truncations Improve Language Modeling, 2024) on what
    is known at the time.
    """

    def __init__(self, length: int):
        super().__init__(length)
        self._held: dict[int, tuple[int, int, np.ndarray]] = {}  # by a number that grows
        self._by_length: list[tuple[int, int]] = []  # tokens, and minus that number
        self._next = 0

    @property
    def wants_more(self) -> bool:
        """See `Packer`."""
        return len(self._held) < POOL

    def add(self, position: int, skip: int, tokens: np.ndarray) -> None:
        """See `Packer`."""
        self._held[self._next] = position, skip, tokens
        bisect.insort(self._by_length, (len(tokens), -self._next))
        self._next += 1

    def take(self) -> list[np.ndarray] | None:
        """See `Packer`."""
        if not self._held:
            return None
        oldest = next(iter(self._held))
        position, skip, tokens = self._held[oldest]
        self._by_length.remove((len(tokens), -oldest))
        if len(tokens) > self.length:
            self._held[oldest] = position, skip + self.length, tokens[self.length :]  # where it was
            bisect.insort(self._by_length, (len(tokens) - self.length, -oldest))
            return [tokens[: self.length]]
        del self._held[oldest]
        parts, room = [tokens], self.length - len(tokens)
        while room and (at := bisect.bisect_right(self._by_length, (room, 1)) - 1) >= 0:
            _, number = self._by_length.pop(at)
            _, _, tokens = self._held.pop(-number)
            parts.append(tokens)
            room -= len(tokens)
        return parts

    def begun(self) -> list[tuple[int, int]]:
        """See `Packer`."""
        return [(position, skip) for position, skip, _ in self._held.values()]


PACKERS: dict[str, type[Packer]] = {"concatenate": Concatenate, "interleave": Interleave, "best_fit": BestFit}
