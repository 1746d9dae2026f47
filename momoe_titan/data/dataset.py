"""TorchTitan's text dataset, with a position that can be resumed on another number of ranks."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import get_worker_info
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset
from torchtitan.tools.logging import logger

from momoe_titan.data.errors import DataError
from momoe_titan.data.ranges import cut, part_of


class TextDataset(HuggingFaceTextDataset):
    """TorchTitan's text dataset, with a position that other numbers of ranks can take over.

    In a pass over the data, a rank reads a list of [start, stop) ranges of documents. A whole pass is one range: the
    part of the data that TorchTitan, too, gives to the rank. When another number of ranks resumes, the documents that
    the old ranks had not read in their pass are divided anew, so that each document is still read once. Streamed
    datasets have no such position; theirs is TorchTitan's.

    In a worker process of the loader, the dataset is the worker's part of what the rank reads. A worker that finds no
    document ends, and the others go on.

    Args:
        section: "training" or "validation": the section of the configuration that messages name.

    Raises:
        DataError: There are fewer documents than ranks. Streamed datasets other than 'local' are not read here;
            iterating them raises it, outside of worker processes, where whole passes hold no document for this rank.
    """

    _data: Any  # a Dataset, or an IterableDataset where it is streamed

    def __init__(
        self,
        dataset_name: str,
        dataset_path: str | None,
        tokenizer: BaseTokenizer,
        seq_len: int,
        dp_rank: int,
        dp_world_size: int,
        infinite: bool,
        section: str = "training",
    ) -> None:
        # As if there were one rank, which leaves a map-style dataset whole.
        super().__init__(dataset_name, dataset_path, tokenizer, seq_len, 0, 1, infinite)
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        self.section, self.described = section, f"{section}.dataset {dataset_name!r}"
        self.place = f" ({section}.dataset_path {dataset_path!r})" if dataset_path else ""
        # In a worker process: its number, and how many the rank has.
        self._worker: tuple[int, int] | None = None
        self._has_ended = False
        self.is_streamed = not isinstance(self._data, Dataset)
        if not self.is_streamed:
            documents = len(self._data)
        elif self.dataset_name == "local":
            documents = sum(1 for _ in islice(self._data, dp_world_size))
        else:  # elsewhere, perhaps
            documents = dp_world_size
        if documents < dp_world_size:
            raise DataError(
                f"{self.described} has fewer documents than the "
                f"{dp_world_size} data-parallel ranks that share it: {documents}{self.place}"
            )
        if self.is_streamed:
            self._whole = self._data
            self._data = split_dataset_by_node(self._data, dp_rank, dp_world_size)
        else:
            self._ranges = self._own_part([(0, len(self._data))])

    def _own_part(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The part of the documents of all ranks that this rank, or this worker, reads."""
        ranges = part_of(ranges, self.dp_rank, self.dp_world_size)
        return part_of(ranges, *self._worker) if self._worker else ranges

    def _enter_worker(self) -> None:
        """At the first call in a worker process, keep only the worker's part of what the rank has left."""
        info = get_worker_info()
        if info is None or self._worker:
            return
        self._worker = info.id, info.num_workers
        if self.is_streamed:
            self._data = self._worker_stream()
        else:
            self._ranges = part_of(cut(self._ranges, self._sample_idx), info.id, info.num_workers)
            self._sample_idx = 0
        if info.id > 0:  # tokens that were read but not yet handed out
            self._token_buffer = []

    def _worker_stream(self) -> IterableDataset:
        """The worker's part of a streamed dataset: whole files of the rank if there are enough of them for all workers,
        otherwise some documents of every file."""
        assert self._worker is not None
        worker, workers = self._worker
        data, files = self._whole, self._whole.num_shards
        if files % self.dp_world_size == 0:  # the ranks share the files
            data = data.shard(self.dp_world_size, self.dp_rank, contiguous=False)
            if data.num_shards >= workers:
                return data.shard(workers, worker, contiguous=False)
            return split_dataset_by_node(data, worker, workers)
        if files >= workers:
            data = data.shard(workers, worker, contiguous=False)
            return split_dataset_by_node(data, self.dp_rank, self.dp_world_size)
        return split_dataset_by_node(data, self.dp_rank * workers + worker, self.dp_world_size * workers)

    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        if not self.is_streamed:
            for start, stop in cut(self._ranges, self._sample_idx):
                yield from self._data.select(range(start, stop))
        elif self._worker is None:
            yield from self._data
        else:
            # What iter(self._data) does outside of a worker process. In a worker process it would split the files once
            # more, and leave workers without any.
            for _, sample in self._data._prepare_ex_iterable_for_iteration():
                yield sample

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self._enter_worker()
        if self._has_ended:  # the next validation, which reads the same data again
            self._start_pass()
            self._token_buffer, self._has_ended = [], False
        empty_passes = 0
        # The first pass may be the rest of one that a checkpoint has interrupted, and hold nothing.
        while empty_passes < 2:
            n_tokens = 0
            for sample in self._get_data_iter():
                text = self._text_processor(sample)
                tokens = self._tokenizer.encode(text, add_bos=True, add_eos=True)
                n_tokens += len(tokens)
                self._token_buffer.extend(tokens)
                self._sample_idx += 1
                while len(self._token_buffer) > self.seq_len:
                    x = torch.tensor(self._token_buffer[: self.seq_len + 1])
                    self._token_buffer = self._token_buffer[self.seq_len + 1 :]
                    yield {"input": x[:-1]}, x[1:]
            if not self.infinite:
                self._has_ended = True
                return
            empty_passes = 0 if n_tokens else empty_passes + 1
            if n_tokens:
                logger.warning(f"Dataset {self.dataset_name} is being re-looped")
            self._start_pass()
            if self.is_streamed:  # the next pass reads the files in another order
                self._data.set_epoch(self._data.epoch + 1)
        if self._worker is None:
            raise self.no_documents()
        logger.warning(
            f"{self.described} has no document for worker {self._worker[0]} of the "
            f"{self._worker[1]} ({self.section}.dataloader.num_workers) of data-parallel "
            f"rank {self.dp_rank}, which ends"
        )

    def _start_pass(self) -> None:
        self._sample_idx = 0
        if not self.is_streamed:
            self._ranges = self._own_part([(0, len(self._data))])

    def no_documents(self) -> DataError:
        """The error for a rank that has nothing to read."""
        return DataError(
            f"{self.described} has no document, or none with a token, for data-parallel "
            f"rank {self.dp_rank} of {self.dp_world_size}, which share the documents, or the "
            f"files where their number is a multiple of {self.dp_world_size} and they are "
            f"streamed (momoe.data_streaming){self.place}"
        )

    def state_dict(self) -> dict[str, Any]:
        self._enter_worker()
        state = super().state_dict()
        # A copy, because a worker process sends it later, when the list has grown.
        state["token_buffer"] = list(self._token_buffer)
        if not self.is_streamed:
            state.update(ranges=self._ranges, documents=len(self._data))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._enter_worker()
        if not self.knows([state_dict]):
            return
        token_buffer = list(state_dict["token_buffer"])
        if not self.is_streamed:
            self._ranges, self._sample_idx = state_dict["ranges"], state_dict["sample_idx"]
            self._token_buffer = token_buffer
            return
        self._data.load_state_dict(state_dict["data"])
        try:
            if state_dict["data"]:  # the state of another pass than the dataset's has no effect
                self._data.set_epoch(state_dict["data"]["epoch"])
            # The first thing that iterating does. From here on state_dict returns the loaded state.
            self._data._prepare_ex_iterable_for_iteration()
            self._token_buffer = token_buffer
        except (IndexError, KeyError, TypeError):
            self._data.load_state_dict(None)
            self._data.set_epoch(0)
            warn_restart(f"the files of {self.described} are not those that it was written with")

    def reshard(self, states: list[dict[str, Any] | None]) -> None:
        """Go on where the ranks of a checkpoint were, of which there was another number.

        Args:
            states: the states of all ranks, in order; None for one that is not known.
        """
        if not self.knows(states, len(states)):
            return
        known = [state for state in states if state is not None]  # all of them
        left = [r for s in known for r in cut(s["ranges"], s["sample_idx"])]
        self._ranges, self._sample_idx = self._own_part(left), 0
        # Tokens of documents that were read, but not yet returned in a sequence.
        mine = known[self.dp_rank :: self.dp_world_size]
        self._token_buffer = [token for s in mine for token in s["token_buffer"]]
        logger.info(
            f"The data of {len(states)} data-parallel ranks is shared out to "
            f"{self.dp_world_size}: this one has {sum(b - a for a, b in self._ranges)} "
            "documents left of the pass"
        )

    def knows(self, states: list[dict[str, Any] | None], ranks: int | None = None) -> bool:
        """Whether this dataset can take over positions; warns where it cannot.

        Args:
            states: the states of a checkpoint's ranks, or of one rank's worker processes; None for one that is not
                known.
            ranks: the checkpoint's number of ranks, if the data is to be divided anew.
        """
        was_streamed = [bool(state) and "data" in state for state in states]
        was_not = [bool(state) and "ranges" in state for state in states]
        if (all(was_not) and self.is_streamed) or (all(was_streamed) and not self.is_streamed):
            then, now = ("not streamed", "streamed")[:: 1 if self.is_streamed else -1]
            reason = f"it was written when the data was {then}, now {self.described} is {now} (momoe.data_streaming)"
        elif ranks is not None and not all(was_not):
            reason = (
                f"it was written by {ranks} data-parallel ranks, now there are "
                f"{self.dp_world_size}, and the position in a streamed dataset, or one "
                "that worker processes read, cannot be shared out anew"
            )
        elif not all(was_streamed if self.is_streamed else was_not):
            reason = "it is not one of this loader's"
        elif not self.is_streamed and states[0] and (then := states[0]["documents"]) != len(self._data):
            reason = f"{self.dataset_name!r} had {then} documents, now it has {len(self._data)}"
        else:
            return True
        warn_restart(reason)
        return False


def warn_restart(reason: str) -> None:
    """Warn that a checkpoint's position in the data has no effect, and why."""
    logger.warning(
        f"The checkpoint's position in the data is not used: {reason}. THE DATA STARTS AGAIN FROM ITS BEGINNING."
    )
