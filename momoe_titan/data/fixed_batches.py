"""Batches of validation: the same each time, and the same in all on any number of ranks."""

import contextlib
import copy
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX

Batch = tuple[dict[str, torch.Tensor], torch.Tensor]


class FixedBatches:
    """Shares the batches of a loader out to ranks: batch i goes to rank i % ranks.

    Every rank reads all batches, so that all know how many there are, without asking each other. Each iterator begins
    at the beginning, and all ranks get equally many batches of one size: what is missing is filled with sequences that
    were there before, whose labels are ignored.

    Args:
        loader: that one rank alone would read.
        rank, ranks: of data parallelism.
        batch_size: sequences of a batch.
        batches: how many to take of the loader; None for all.
    """

    def __init__(self, loader: BaseDataLoader, rank: int, ranks: int, batch_size: int, batches: int | None) -> None:
        self.loader, self.rank, self.ranks = loader, rank, ranks
        self.batch_size, self.batches = batch_size, batches
        self._beginning: dict[str, Any] = copy.deepcopy(loader.state_dict())

    def __iter__(self) -> Iterator[Batch]:
        self.loader.load_state_dict(copy.deepcopy(self._beginning))
        number, batch = 0, None
        with contextlib.closing(_generator(self.loader)) as batches:
            for batch in batches:
                if number % self.ranks == self.rank:
                    yield _filled(*batch, self.batch_size)
                number += 1
                if number == self.batches:
                    break
        # Ranks without a batch in the last round.
        if batch is not None and 0 < number % self.ranks <= self.rank:
            inputs, labels = _filled(*batch, self.batch_size)
            yield inputs, torch.full_like(labels, IGNORE_INDEX)


def _generator(loader: BaseDataLoader) -> Generator[Batch, None, None]:
    yield from loader


def _filled(inputs: dict[str, torch.Tensor], labels: torch.Tensor, size: int) -> Batch:
    """A batch of `size` sequences: its own, and then some of them again, with ignored labels."""
    if len(labels) == size:
        return dict(inputs), labels
    rows = torch.arange(size) % len(labels)
    filled = labels[rows]
    filled[len(labels) :] = IGNORE_INDEX
    return {name: tensor[rows] for name, tensor in inputs.items()}, filled
