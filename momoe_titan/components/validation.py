"""Validation during training, on this package's data loader."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torchtitan.components.loss import IGNORE_INDEX, LossFunction
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import ValidationContext, Validator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools import utils

from momoe_titan.components.loss import LossInModel
from momoe_titan.components.metrics import MomoeMetricsProcessor
from momoe_titan.data.fixed_batches import FixedBatches
from momoe_titan.data.loader import build_validation_dataloader
from momoe_titan.data.tokenizer import TextTokenizer


class TextValidator(LossInModel, Validator):
    """TorchTitan's validator on the batches of `validation.dataset`, which are the same each time.

    Attributes:
        before_validation: called before each validation, to free memory.
    """

    before_validation: Callable[[], None]
    validation_dataloader: FixedBatches

    def __init__(
        self,
        *,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: TextTokenizer,
        parallel_dims: ParallelDims,
        loss_fn: LossFunction,
        validation_context: ValidationContext,
        maybe_enable_amp: AbstractContextManager[None],
        metrics_processor: MetricsProcessor,
        pp_schedule: _PipelineSchedule | None = None,
        pp_has_first_stage: bool | None = None,
        pp_has_last_stage: bool | None = None,
    ):
        # Not the base class's constructor: that builds TorchTitan's own loader, which reads the data once more.
        self.job_config = job_config
        self.tokenizer = tokenizer
        self.parallel_dims = parallel_dims
        self.loss_fn = loss_fn
        self.validation_context = validation_context
        self.maybe_enable_amp = maybe_enable_amp
        self.metrics_processor = metrics_processor
        self.pp_schedule = pp_schedule
        self.pp_has_first_stage = pp_has_first_stage
        self.pp_has_last_stage = pp_has_last_stage
        self.before_validation = lambda: None
        self.validation_dataloader = build_validation_dataloader(dp_world_size, dp_rank, tokenizer, job_config)

    @torch.no_grad()
    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """Log the mean loss over all tokens, and the experts' load where our metrics processor does.

        TorchTitan's takes the mean of the batches' means, in which a token of a short batch counts for more, and waits
        for all ranks in each batch.
        """
        self.before_validation()
        processor = self.metrics_processor
        ours = processor if isinstance(processor, MomoeMetricsProcessor) else None
        if ours is not None:
            ours.finish_log()
        for part in model_parts:
            part.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=utils.device_type)  # of this rank: loss, and tokens
        with ours.counting_validation() if ours else nullcontext(), self.maybe_enable_amp:
            for inputs, labels in self.validation_dataloader:
                tokens = int((labels != IGNORE_INDEX).sum())
                processor.ntokens_since_last_log += tokens
                # A rank may have nothing left but has to take part in the others' collectives.
                with ours.not_counting() if ours and not tokens else nullcontext():
                    sums += self._loss_and_tokens(inputs, labels, model_parts)
            processor.log_validation(loss=self._mean(sums), step=step)
        for part in model_parts:
            part.train()

    def _loss_and_tokens(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, model_parts: list[nn.Module]
    ) -> torch.Tensor:
        """Sum of the losses of a batch, 0 on pipeline stages that do not see it, and its tokens, on this rank."""
        input_dict = {name: tensor.to(utils.device_type) for name, tensor in input_dict.items()}
        inputs, labels, extra_inputs, extra_kwargs = self.post_dataloading_process(
            input_dict, labels.to(utils.device_type), model_parts
        )
        tokens = (labels != IGNORE_INDEX).sum()
        with self.validation_context():
            if self.pp_schedule is None:
                loss = self.loss_fn(model_parts[0](inputs, **extra_inputs, **extra_kwargs), labels)
            else:
                targets, losses = (labels, []) if self.pp_has_last_stage else (None, None)
                first = ((inputs,), extra_inputs) if self.pp_has_first_stage else ((), {})
                self.pp_schedule.eval(*first[0], **first[1], **extra_kwargs, target=targets, losses=losses)
                loss = torch.stack(losses).sum() if losses else torch.zeros(())
        return torch.stack([loss.detach().to(tokens.device).double(), tokens.double()])

    def _mean(self, sums: torch.Tensor) -> float:
        """The mean loss over the tokens of all ranks, on every pipeline stage."""
        loss, tokens = sums
        mesh = self.parallel_dims.get_optional_mesh("loss") if self.parallel_dims.dp_cp_enabled else None
        if mesh is not None:
            loss, tokens = (dist_utils.dist_sum(each, mesh) for each in sums)
        if self.pp_schedule is not None:  # all stages count the tokens, and only the last has losses
            of_stages = torch.full_like(sums[0], float(loss))
            loss = dist_utils.dist_sum(of_stages, self.parallel_dims.get_mesh("pp"))
        return float(loss) / float(tokens)

    def should_validate(self, step: int) -> bool:
        """Also after the last step, whatever validation.freq is."""
        return super().should_validate(step) or step == self.job_config.training.steps


def build_validator(**kwargs: Any) -> Validator:
    """TrainSpec.build_validator_fn of `momoe_llama`: TorchTitan's validator on our loader.

    Raises:
        DataError: see `build_validation_dataloader`.
    """
    return TextValidator(**kwargs)
