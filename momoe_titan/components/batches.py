"""Sends batches to the device without waiting, and counts as waiting for data only what the device lost by it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchtitan.config import JobConfig

from momoe_titan.config.flavor import MODEL_NAME

Batch = tuple[dict[str, Tensor], Tensor]


class BatchesToDevice:
    """A part of the trainer, put before TorchTitan's."""

    job_config: JobConfig
    device: torch.device
    metrics_processor: Any

    def batch_generator(self, data_iterable: Iterable[Batch]) -> Iterator[Batch]:
        """TorchTitan's batches, for our model on their way to the device.

        The host runs ahead of a GPU, and may wait for a batch while the GPU still has work. Such a wait costs nothing.
        """
        trainer: Any = super()
        batches = trainer.batch_generator(data_iterable)
        if self.job_config.model.name != MODEL_NAME:  # TorchTitan's step counts labels on the host
            yield from batches
            return
        while True:
            before = None
            if self.device.type == "cuda":
                before = torch.cuda.Event()
                before.record()
            inputs, labels = next(batches)  # raises DataloaderExhaustedError at the end, not StopIteration
            if before is not None and not before.query():
                self.metrics_processor.data_loading_times[-1] = 0.0
            yield (
                {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()},
                labels.to(self.device, non_blocking=True),
            )
