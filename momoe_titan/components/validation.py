"""Validation during training, on this package's data loader."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torchtitan.components.loss import LossFunction
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.components.validate import ValidationContext, Validator
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from momoe_titan.components.loss import LossInModel
from momoe_titan.components.metrics import MomoeMetricsProcessor
from momoe_titan.data.loader import build_validation_dataloader


class TextValidator(LossInModel, Validator):
    """TorchTitan's validator on the loader of `validation.dataset`.

    Attributes:
        before_validation: called before each validation, to free memory.
    """

    before_validation: Callable[[], None]

    def __init__(
        self,
        *,
        job_config: JobConfig,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
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
        self.validation_dataloader = build_validation_dataloader(
            dp_world_size, dp_rank, tokenizer, job_config, infinite=job_config.validation.steps != -1
        )

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        """As TorchTitan's, with the experts' load over all of its tokens where our metrics processor logs it."""
        self.before_validation()
        processor = self.metrics_processor
        counting = processor.counting_validation() if isinstance(processor, MomoeMetricsProcessor) else nullcontext()
        with counting, self.maybe_enable_amp:  # TorchTitan enters it without pipeline stages only
            super().validate(model_parts, step)

    def should_validate(self, step: int) -> bool:
        """Also after the last step, whatever validation.freq is."""
        return super().should_validate(step) or step == self.job_config.training.steps


def build_validator(**kwargs: Any) -> Validator:
    """TrainSpec.build_validator_fn of `momoe_llama`: TorchTitan's validator on our loader.

    Raises:
        DataError: see `build_validation_dataloader`.
    """
    return TextValidator(**kwargs)
