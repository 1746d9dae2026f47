"""Forward and backward of a pipeline's batch without a wait for the device, so that a CUDA graph can hold them."""

from typing import Any

import torch
from torch import Tensor
from torchtitan.distributed import ParallelDims


class PipelineStep:
    """Mixin for TorchTitan's trainer: what its `forward_backward_step` does with a pipeline.

    TorchTitan's copies the -1 that stands for an unknown loss from the host in each step, which no graph can hold.
    """

    parallel_dims: ParallelDims
    device: torch.device
    pp_schedule: Any
    pp_has_first_stage: bool
    pp_has_last_stage: bool

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor
    ) -> Tensor:
        """Run the schedule. Gives the loss of the batch, or -1 where another rank has the last stage."""
        trainer: Any = super()
        batch = {"input_dict": input_dict, "labels": labels}
        if not self.parallel_dims.pp_enabled:
            return trainer.forward_backward_step(**batch, global_valid_tokens=global_valid_tokens)
        trainer = self
        inputs, labels, extra_inputs, extra_kwargs = trainer.post_dataloading_process(*batch.values())
        losses: list[Tensor] = []
        of_last = {"target": labels, "losses": losses} if self.pp_has_last_stage else {}
        of_first = ((inputs,), extra_inputs) if self.pp_has_first_stage else ((), {})
        with trainer.train_context():
            self.pp_schedule.step(*of_first[0], **of_first[1], **extra_kwargs, **of_last, return_outputs=False)
        if not losses:
            return torch.full((), -1.0, device=self.device)
        return (torch.stack(losses).sum() / global_valid_tokens).to(self.device)
