"""TorchTitan's own loader, for its datasets on the Hugging Face hub (`c4`, ...), which have no number of documents."""

from dataclasses import asdict
from typing import Any

from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.config.job_config import Training, Validation
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataset

from momoe_titan.data.position import is_position, warn_restart
from momoe_titan.data.tokenizer import TextTokenizer
from momoe_titan.data.worker_signals import ignore_signals


class StreamedDataloader(ParallelAwareDataloader):
    """TorchTitan's loader, which starts again where it cannot go on: on another number of ranks."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where this rank was."""
        if is_position(state_dict.get(self._rank_id, b"")):
            warn_restart("it is one in data that is not streamed")
        else:
            super().load_state_dict(state_dict)

    def load_ranks(self, states: list[bytes]) -> None:
        """Called in place of `load_state_dict` where a checkpoint is of another number of ranks."""
        warn_restart(
            f"it was written by {len(states)} data-parallel ranks, now there are {self.dp_world_size}, and the "
            "position in a streamed dataset cannot be shared out anew"
        )


def build_streamed(
    config: Training | Validation, tokenizer: TextTokenizer, dp_rank: int, dp_world_size: int, infinite: bool
) -> StreamedDataloader:
    """The loader of a dataset that TorchTitan reads.

    Args:
        config: the section of the job that names it.
    """
    dataset = HuggingFaceTextDataset(
        config.dataset, config.dataset_path, tokenizer, config.seq_len, dp_rank, dp_world_size, infinite
    )
    options = asdict(config.dataloader) | {"worker_init_fn": ignore_signals}
    return StreamedDataloader(dataset, dp_rank, dp_world_size, batch_size=config.local_batch_size, **options)
