"""The stages between an order of documents and batches, as nodes of torchdata: each runs ahead of the next.

    Documents -> ParallelMapper (threads that turn text into tokens) -> Batches -> PinMemory -> Prefetcher

Every batch comes with the place at which the data goes on behind it, so that a checkpoint holds the right place however
far the stages have read ahead. The nodes' own states are not used: they nest, and cannot be divided among another
number of ranks.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torchdata.nodes import BaseNode, ParallelMapper, PinMemory, Prefetcher
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.tools.logging import logger

from momoe_titan.data.errors import DataError
from momoe_titan.data.order import Order
from momoe_titan.data.packing import Packer
from momoe_titan.data.source import Source
from momoe_titan.data.tokenizer import TextTokenizer

GROUP = 32  # documents that a thread takes at once
LOOKED_UP = 256  # positions whose documents are looked up at once


@dataclass(frozen=True)
class Place:
    """Where a rank is in an order of documents.

    Attributes:
        left: documents to read first: for each its position, and how many of its tokens are used already.
        next: the position of the document to read after those.
        step: from each position to the rank's next one, which is the number of ranks.
    """

    left: list[tuple[int, int]]
    next: int
    step: int


@dataclass
class Group:
    """Documents that go through the stages together.

    Attributes:
        at: for each document its position, and how many of its tokens are used already.
        documents: see `Order.find`.
        taken: how many documents of `Place.left` have been read up to the end of this group.
        next: `Place.next` at the end of this group.
        tokens: int32 [n], for each document those not yet used. Empty until `Encode` has filled it.
        error: why `Encode` could not.
    """

    at: list[tuple[int, int]]
    documents: list[tuple[int, int, int]]
    taken: int
    next: int
    tokens: list[np.ndarray] = field(default_factory=list)
    error: DataError | None = None


@dataclass
class Batch:
    """What the model gets of the data.

    Attributes:
        inputs: "input", int64 [sequences, tokens]. If asked for also "positions", int64 of the same shape: the place of
            each token in the part of its document that is in the sequence, so that it is 0 where a part begins.
        labels: int64 of the same shape: the token that follows each, or `IGNORE_INDEX` where none does.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor

    def pin_memory(self, device: Any = None) -> "Batch":
        """The same in memory that a GPU copies from while the CPU goes on."""
        return Batch({name: tensor.pin_memory() for name, tensor in self.inputs.items()}, self.labels.pin_memory())


class _Node(BaseNode):
    """A node that begins where its constructor says, and saves no state."""

    def get_state(self) -> dict[str, Any]:
        return {}


class Documents(_Node):
    """Groups of documents in order, without their text.

    Args:
        order: of all ranks.
        place: where to begin.
        end: the position at which the data ends; None for data without an end.
        says_passes: warn where a dataset is read again. Groups are read ahead, so that a run which stops early may
            never come to the pass that a warning has named.
    """

    def __init__(self, order: Order, place: Place, end: int | None = None, says_passes: bool = True):
        super().__init__()
        self.order, self.place, self.end, self.says_passes = order, place, end, says_passes
        self._ahead: deque[tuple[int, tuple[int, int, int]]] = deque()

    def reset(self, initial_state: dict | None = None) -> None:
        """See the base class."""
        super().reset(initial_state)
        self._taken, self._next, self._looked_up = 0, self.place.next, self.place.next
        self._ahead.clear()
        self._passes: dict[int, int] = {}

    def next(self) -> Group:
        """See the base class."""
        left = self.place.left[self._taken : self._taken + GROUP]
        if left:
            self._taken += len(left)
            return Group(left, self.order.find([position for position, _ in left]), self._taken, self._next)
        if not self._ahead:
            self._look_up()
        if not self._ahead:
            raise StopIteration
        taken = [self._ahead.popleft() for _ in range(min(GROUP, len(self._ahead)))]
        self._next = taken[-1][0] + self.place.step
        if self.says_passes:
            self._say_passes([document for _, document in taken])
        return Group([(position, 0) for position, _ in taken], [d for _, d in taken], self._taken, self._next)

    def _look_up(self) -> None:
        stop = self._looked_up + LOOKED_UP * self.place.step
        positions = range(self._looked_up, stop if self.end is None else min(stop, self.end), self.place.step)
        self._looked_up = stop
        self._ahead.extend(zip(positions, self.order.find(positions), strict=True))

    def _say_passes(self, documents: Sequence[tuple[int, int, int]]) -> None:
        for source, _, number in documents:
            if number > self._passes.setdefault(source, number):
                self._passes[source] = number
                if len(str(number + 1).rstrip("0")) == 1:  # the 2nd to 9th, 10th, 20th, ..., 100th, 200th, ...
                    logger.warning(f"{self.order.sources[source].name}: begins to read it for time {number + 1}")


class Encode:
    """Gives groups of documents their tokens. Several threads call one object."""

    def __init__(self, order: Order, tokenizer: TextTokenizer):
        self.order, self.tokenizer = order, tokenizer

    def __call__(self, group: Group) -> Group:
        """The same group, with tokens or an error. An exception would lose its type on the way to the trainer."""
        tokens: list[Any] = [None] * len(group.at)
        try:
            for number in {source for source, _, _ in group.documents}:
                of_source = [i for i, (other, _, _) in enumerate(group.documents) if other == number]
                read = self._read(self.order.sources[number], [group.documents[i][1] for i in of_source])
                for i, ids in zip(of_source, read, strict=True):
                    tokens[i] = ids[group.at[i][1] :]
        except DataError as e:
            group.error = e
        except OSError as e:
            group.error = DataError(f"the data cannot be read any more: {e}")
        group.tokens = tokens
        return group

    def _read(self, source: Source, documents: list[int]) -> list[Any]:
        read: list[Any] = source.read(documents)
        if source.holds_tokens:
            return read
        try:
            read = self.tokenizer.encode_documents(read)
        except BaseException as e:  # a panic of the library is no Exception, and would end this thread without a word
            raise DataError(f"{source.name}: one of the documents {documents} cannot be tokenized: {e}") from e
        return [np.fromiter(ids, np.int32, len(ids)) for ids in read]


class Batches(_Node):
    """Batches, each with the place where the data goes on after it; a `DataError` where the data cannot be read.

    Args:
        source: of groups with tokens.
        packer: makes sequences of one token more than the model sees, for the last label.
        order, place: see `Documents`.
        batch_size: sequences of a batch; at the end of the data there may be fewer.
        pad: token for what is left of a sequence. Its label is ignored.
        with_positions: give "positions" beside the tokens.
    """

    def __init__(
        self,
        source: BaseNode,
        packer: Packer,
        order: Order,
        place: Place,
        batch_size: int,
        pad: int,
        with_positions: bool,
    ):
        super().__init__()
        self.source, self.packer, self.order, self.place = source, packer, order, place
        self.batch_size, self.pad, self.with_positions = batch_size, pad, with_positions
        self._group: Group | None = None  # the last one
        self._waiting: deque[tuple[int, int, np.ndarray]] = deque()  # documents of it that are not yet packed
        self._empty = 0  # documents without a token, one after the other

    def reset(self, initial_state: dict | None = None) -> None:
        """See the base class."""
        super().reset(initial_state)
        self.source.reset()

    def next(self) -> tuple[Batch, Place] | DataError:
        """See the base class."""
        rows: list[list[np.ndarray]] = []
        while len(rows) < self.batch_size:
            try:
                while self.packer.wants_more:
                    self._add_document()
            except DataError as e:
                return e
            except StopIteration:
                self.packer.ended = True
            if (parts := self.packer.take()) is None:
                break
            rows.append(parts)
        if not rows:
            raise StopIteration
        return self._batch(rows), self._place()

    def _add_document(self) -> None:
        while not self._waiting:
            group: Any = next(self.source)
            self._group = group
            if group.error:
                raise group.error
            self._waiting.extend((p, skip, tokens) for (p, skip), tokens in zip(group.at, group.tokens, strict=True))
        position, skip, tokens = self._waiting.popleft()
        if len(tokens):
            self._empty = 0
            self.packer.add(position, skip, tokens)
            return
        self._empty += 1
        if self._empty > 2 * sum(map(len, self.order.sources)) + len(self.place.left):
            raise DataError(f"{', '.join(source.name for source in self.order.sources)}: no document has a token")

    def _place(self) -> Place:
        held = self.packer.begun() + [(position, skip) for position, skip, _ in self._waiting]
        taken, behind = (self._group.taken, self._group.next) if self._group else (0, self.place.next)
        return Place(held + self.place.left[taken:], behind, self.place.step)

    def _batch(self, rows: list[list[np.ndarray]]) -> Batch:
        tokens_BL = np.full((len(rows), self.packer.length), self.pad, np.int64)
        labels_BL = np.full_like(tokens_BL, IGNORE_INDEX)
        positions_BL = np.zeros_like(tokens_BL)
        for b, parts in enumerate(rows):
            lengths = [len(part) for part in parts]
            end = sum(lengths)
            np.concatenate(parts, out=tokens_BL[b, :end], casting="unsafe")
            labels_BL[b, :end] = tokens_BL[b, :end]
            if self.with_positions:
                lengths.append(self.packer.length - end)  # what is padded counts as one more document
                positions_BL[b] = np.arange(self.packer.length) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inputs = {"input": torch.from_numpy(tokens_BL[:, :-1].copy())}
        if self.with_positions:
            inputs["positions"] = torch.from_numpy(positions_BL[:, :-1].copy())
        return Batch(inputs, torch.from_numpy(labels_BL[:, 1:].copy()))


def build_pipeline(
    order: Order,
    place: Place,
    tokenizer: TextTokenizer,
    packer: Packer,
    batch_size: int,
    *,
    threads: int,
    ahead: int,
    pin: bool = False,
    with_positions: bool = False,
    end: int | None = None,
    says_passes: bool = True,
) -> BaseNode:
    """The last node of the whole pipeline, which gives what `Batches` does.

    Args:
        order, place, end, says_passes: see `Documents`.
        packer, batch_size, with_positions: see `Batches`.
        threads: how many tokenize; with 0 the thread that makes the batches does.
        ahead: batches that are made before they are asked for; 0 makes each when it is asked for.
        pin: put batches into pinned memory.
    """
    documents = Documents(order, place, end, says_passes)
    tokens = ParallelMapper(documents, Encode(order, tokenizer), threads, in_order=True, method="thread")
    pad = 0 if tokenizer.eos_id is None else tokenizer.eos_id
    node: BaseNode = Batches(tokens, packer, order, place, batch_size, pad, with_positions)
    node = PinMemory(node, "cuda") if pin else node  # named, so that its thread takes this rank's GPU, not the first
    return Prefetcher(node, ahead) if ahead else node
