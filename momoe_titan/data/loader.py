"""Builds the data loaders of `training.dataset` and `validation.dataset`; checkpoints include their position."""

import pickle
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation

from momoe_titan.data.dataset import TextDataset, warn_restart
from momoe_titan.data.errors import DataError
from momoe_titan.data.registration import register_datasets


class TextDataloader(ParallelAwareDataloader):
    """TorchTitan's loader for a `TextDataset`, which can also resume from a checkpoint of another number of ranks.

    If it cannot use a position, such as one of another number of worker processes, it warns and starts the data from
    its beginning.

    Raises:
        DataError: Iteration raises it where there is nothing for this rank to read.
    """

    dataset: TextDataset

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        batch = None
        for batch in super().__iter__():
            yield batch
        if self.dataset.infinite:  # it ended, because no worker process found a document
            raise self.dataset.no_documents()
        if batch is None:
            raise DataError(
                f"{self.dataset.described} holds not one sequence of "
                f"{self.dataset.section}.seq_len {self.dataset.seq_len} tokens{self.dataset.place}"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if saved := state_dict.get(self._rank_id):
            states = self._dataset_states([pickle.loads(saved)])
            if states is None or not self.dataset.knows(states):
                return
        super().load_state_dict(state_dict)

    def load_ranks(self, states: list[bytes]) -> None:
        """Go on where the ranks of a checkpoint were, of which there was another number.

        Args:
            states: what `state_dict` holds for each rank of the checkpoint.
        """
        of_ranks = self._dataset_states([pickle.loads(s) for s in states])
        if of_ranks is not None:
            # what worker processes had not read yet cannot be divided anew
            self.dataset.reshard(of_ranks if self.num_workers == 0 else [None] * len(states))

    def _dataset_states(self, states: list[dict[str, Any]]) -> list[dict[str, Any] | None] | None:
        """The states of the datasets in these states of loaders, one for each worker process if there are any.

        None, with a warning, if the number of worker processes is not that of this loader.
        """
        found = []
        for state in states:
            # A state has "_snapshot" if worker processes read the data, else "dataset_state".
            of_workers = state.get("_snapshot", {}).get("_worker_snapshots", {})
            if (then := len(of_workers)) != self.num_workers:
                warn_restart(
                    f"it was written with {self.dataset.section}.dataloader.num_workers = "
                    f"{then}, now it is {self.num_workers}"
                )
                return None
            found += [s.get("dataset_state") for s in of_workers.values() or [state]]
        return found


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
) -> TextDataloader:
    """The loader of `training.dataset`, with the `[momoe]` data options applied.

    The options apply to the validation loader too, which TorchTitan builds after this one.

    Raises:
        DataError: The dataset is not known, missing, damaged, or has fewer documents than there are ranks.
    """
    options = getattr(job_config, "momoe", None)
    if options is not None:
        register_datasets(options.data_text_field, options.data_streaming)
    return _build_loader("training", job_config.training, dp_world_size, dp_rank, tokenizer, infinite)


def build_validation_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = False,
) -> TextDataloader:
    """The loader of `validation.dataset`. If not `infinite`, each pass reads the same.

    Raises:
        DataError: As `build_dataloader`; or `validation.steps` is -1 and there are several ranks, of which one would
            run out of data while the others wait for it.
    """
    config = job_config.validation
    if config.steps == -1 and dp_world_size > 1:
        raise DataError(
            "validation.steps is -1 (all of validation.dataset), must be a number of batches "
            f"with {dp_world_size} data-parallel ranks: their parts of the data may not be "
            "equally long"
        )
    return _build_loader("validation", config, dp_world_size, dp_rank, tokenizer, infinite)


def _build_loader(
    section: str,
    config: Training | Validation,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    infinite: bool,
) -> TextDataloader:
    dataset = TextDataset(
        config.dataset,
        config.dataset_path,
        tokenizer,
        config.seq_len,
        dp_rank,
        dp_world_size,
        infinite,
        section,
    )
    return TextDataloader(
        dataset,
        dp_rank,
        dp_world_size,
        batch_size=config.local_batch_size,
        **asdict(config.dataloader),
    )
