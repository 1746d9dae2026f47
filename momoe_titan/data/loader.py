"""Builds the data loaders of `training.dataset` and `validation.dataset`; checkpoints include their position."""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.tools.logging import logger

from momoe_titan.config.section import DataSource, Momoe
from momoe_titan.data.errors import DataError
from momoe_titan.data.fixed_batches import FixedBatches
from momoe_titan.data.order import Order
from momoe_titan.data.packing import PACKERS
from momoe_titan.data.pipeline import Place, build_pipeline
from momoe_titan.data.position import (
    divide,
    is_position,
    pack_position,
    unpack_position,
    warn_restart,
    why_other_data,
)
from momoe_titan.data.registration import open_source
from momoe_titan.data.streamed import StreamedDataloader, build_streamed
from momoe_titan.data.tokenizer import TextTokenizer

AHEAD = 4  # batches, where prefetch_factor is not set
MOST_THREADS = 4  # where num_workers is not set; one tokenizes for about two GPUs of a small model


@dataclass(frozen=True)
class Shape:
    """What a loader's batches look like, and how they are made.

    Attributes:
        section: "training" or "validation": the section of the configuration that messages name.
        batch_size, seq_len: sequences of a batch, tokens of a sequence.
        packing: a key of `PACKERS`.
        with_positions: see `Batches`.
        threads, ahead, pin: see `build_pipeline`.
        passes_once: the data ends after one pass.
        starts_over: each iterator begins at the beginning, as validation does; otherwise where the last one was.
    """

    section: str
    batch_size: int
    seq_len: int
    packing: str = "concatenate"
    with_positions: bool = False
    threads: int = 1
    ahead: int = AHEAD
    pin: bool = False
    passes_once: bool = False
    starts_over: bool = False


class TextDataloader(BaseDataLoader):
    """Batches of packed documents, made ahead of need, with a position that any number of ranks can take over.

    All ranks read one order of documents, each every n-th of it. If a checkpoint's position means nothing in this data,
    the loader warns and begins at the beginning.

    Args:
        order: of all ranks.
        shape: of the batches.

    Raises:
        DataError: Iteration raises it where there is nothing to read, or it cannot be read any more.
    """

    def __init__(self, order: Order, tokenizer: TextTokenizer, shape: Shape, dp_rank: int, dp_world_size: int):
        self.order, self.tokenizer, self.shape = order, tokenizer, shape
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        self.name = ", ".join(source.name for source in order.sources)
        self._rank_id = f"dp_rank_{dp_rank}"
        self._place = self._start()

    def _start(self) -> Place:
        return Place([], self.dp_rank, self.dp_world_size)

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        shape = self.shape
        node = build_pipeline(
            self.order,
            self._start() if shape.starts_over else self._place,
            self.tokenizer,
            PACKERS[shape.packing](shape.seq_len + 1),
            shape.batch_size,
            threads=shape.threads,
            ahead=shape.ahead,
            pin=shape.pin,
            with_positions=shape.with_positions,
            end=sum(map(len, self.order.sources)) if shape.passes_once else None,
            says_passes=not shape.starts_over,
        )
        batch = None
        for item in node:
            if isinstance(item, DataError):
                raise item
            batch, self._place = item
            yield batch.inputs, batch.labels
        if batch is None:
            raise DataError(f"{self.name} holds not one sequence of {shape.section}.seq_len {shape.seq_len} tokens")

    def state_dict(self) -> dict[str, Any]:
        """The position behind the last batch, under this rank's key."""
        return {
            self._rank_id: pack_position(self.order.described(), self._place),
            "world_size": self.dp_world_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where this rank was."""
        if saved := state_dict.get(self._rank_id):
            self._load([saved])

    def load_ranks(self, states: Sequence[bytes]) -> None:
        """Go on where the ranks of a checkpoint were, of which there was another number.

        Args:
            states: what `state_dict` holds for each rank of the checkpoint.
        """
        if self._load(states):
            logger.info(
                f"The data of {len(states)} data-parallel ranks is shared out to {self.dp_world_size}: this one reads "
                f"{len(self._place.left)} documents that are left, then those from {self._place.next} on"
            )

    def _load(self, states: Sequence[bytes]) -> bool:
        """Take the place of the only state, or the share of this rank in all of them. Returns whether it could."""
        if not all(map(is_position, states)):
            warn_restart("it was written by an earlier version of this package, or for streamed data")
            return False
        saved = [unpack_position(state) for state in states]
        then = saved[0][0]
        if reason := why_other_data(then, self.order.described(), self.name):
            warn_restart(reason)
            return False
        self.order = self.order.with_seed(then["seed"])
        places = [place for _, place in saved]
        if len(places) == 1 and places[0].step == self.dp_world_size:
            (self._place,) = places
        else:
            self._place = divide(places, self.dp_rank, self.dp_world_size)
        return True


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: TextTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
) -> TextDataloader | StreamedDataloader:
    """The loader of `training.dataset`, or of the sources in `[[momoe.data]]`.

    Raises:
        DataError: The data is not known, missing or damaged.
    """
    options, training = _options(job_config), job_config.training
    if options.data_streaming:
        logger.warning(
            "momoe.data_streaming has no effect any more: files are read once, before the first step, and then from a "
            "memory-mapped cache"
        )
    mixed = [replace(each, text_field=each.text_field or options.data_text_field) for each in options.data]
    sources = {f"momoe.data[{i}].path": given for i, given in enumerate(mixed)} or {
        "training.dataset_path": DataSource(training.dataset_path or "", training.dataset, options.data_text_field)
    }
    build = _Build("training", training, options, tokenizer, dp_rank, dp_world_size, infinite)
    return build.loader(sources, abs(job_config.debug.seed or 0), options.data_shuffle)


def build_validation_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: TextTokenizer,
    job_config: JobConfig,
) -> FixedBatches:
    """The batches of each validation: the first `validation.steps` of `validation.dataset`, or all, of all ranks.

    Raises:
        DataError: As `build_dataloader`.
    """
    options, validation, training = _options(job_config), job_config.validation, job_config.training
    given = DataSource(validation.dataset_path or "", validation.dataset, options.data_text_field)
    trained_on = options.data or [DataSource(training.dataset_path or "", training.dataset)]
    if any(each.dataset == given.dataset and given.path in _paths(each) for each in trained_on):
        logger.warning(
            "validation reads data that is trained on: its loss does not say how the model does on text it has not seen"
        )
    batches = None if validation.steps == -1 else validation.steps
    build = _Build("validation", validation, options, tokenizer, 0, 1, infinite=batches is not None)
    loader = build.loader({"validation.dataset_path": given}, 0, shuffle=False)
    return FixedBatches(loader, dp_rank, dp_world_size, validation.local_batch_size, batches)


def _paths(source: DataSource) -> list[str]:
    return [source.path] if isinstance(source.path, str) else source.path


def _options(job_config: JobConfig) -> Momoe:
    return getattr(job_config, "momoe", None) or Momoe()


@dataclass
class _Build:
    section: str
    config: Training | Validation
    options: Momoe
    tokenizer: TextTokenizer
    dp_rank: int
    dp_world_size: int
    infinite: bool

    def loader(self, given: dict[str, DataSource], seed: int, shuffle: bool) -> TextDataloader | StreamedDataloader:
        """The loader of these datasets, by the field that names each."""
        sources = [open_source(each, self.tokenizer, field) for field, each in given.items()]
        if None in sources:  # config/checks refuses it beside others
            return build_streamed(self.config, self.tokenizer, self.dp_rank, self.dp_world_size, self.infinite)
        # Of the tokenizer's own threads: as many documents as there are threads here are tokenized at once.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        weights = [each.weight for each in given.values()]
        order = Order([source for source in sources if source is not None], weights, seed, shuffle)
        _check_all_ranks(order)
        return TextDataloader(order, self.tokenizer, self._shape(), self.dp_rank, self.dp_world_size)

    def _shape(self) -> Shape:
        config, asked, packing = self.config, self.config.dataloader, self.options.data_packing
        if self.section == "validation" and packing == "interleave":
            packing = "concatenate"  # the same text at any number of steps
        if asked.persistent_workers:
            logger.info(f"{self.section}.dataloader.persistent_workers has no effect: threads read the data")
        return Shape(
            section=self.section,
            batch_size=config.local_batch_size,
            seq_len=config.seq_len,
            packing=packing,
            with_positions=self.options.document_mask,
            threads=asked.num_workers or _own_threads(),
            ahead=asked.prefetch_factor or AHEAD,
            pin=asked.pin_memory and torch.cuda.is_available(),
            passes_once=not self.infinite,
            starts_over=self.section == "validation",
        )


def _check_all_ranks(order: Order) -> None:
    """Refuse data that is another one on other hosts: documents would be read twice, and others never.

    Raises:
        DataError: it is not that of the first rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    described = order.described()
    first = [described]
    dist.broadcast_object_list(first, src=0)
    for i, source in enumerate(order.sources):
        known = first[0]["documents"][i], first[0]["content"][i]
        here = described["documents"][i], described["content"][i]
        if here != known:
            raise DataError(
                f"{source.name} is not the same for all ranks: rank 0 reads {known[0]} documents (content {known[1]}), "
                f"rank {dist.get_rank()} on the host {socket.gethostname()} reads {here[0]} (content {here[1]})"
            )


def _own_threads() -> int:
    """Half of the cores that each process on this host has, but not more than are of use."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_THREADS, cores // 2))
