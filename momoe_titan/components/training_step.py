"""A training step of TorchTitan's trainer that reads every gradient twice, for its norm and for the update."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from momoe_titan.components.adamw import AdamW, scale_gradients
from momoe_titan.components.compute_weights import ComputeWeights
from momoe_titan.components.metrics import StepNumbers
from momoe_titan.components.non_finite import NonFiniteGuard
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.config.section import AUTOCAST, Momoe
from momoe_titan.model.experts import MomoeExperts

Batch = tuple[dict[str, Tensor], Tensor]
CLIP_EPS = 1e-6  # of torch.nn.utils.clip_grads_with_norm_


def reason_for_autocast(config: JobConfig, dims: ParallelDims) -> str | None:
    """Why a job without FSDP mixes precision by autocast, or None where it computes with narrow weights."""
    for applies, reason in (
        (getattr(config, "momoe", Momoe()).mixed_precision == AUTOCAST, 'momoe.mixed_precision = "autocast"'),
        (dims.dp_replicate_enabled, "DistributedDataParallel reduces the gradients of the weights it was given"),
        (config.optimizer.early_step_in_backward, "optimizer.early_step_in_backward steps inside the backward"),
    ):
        if applies:
            return reason
    return None


class TrainingStep:
    """Mixin for TorchTitan's trainer: the step, and the precision that it computes in.

    The order is TorchTitan's: gradients of all microbatches, clipping, optimizer, schedule, metrics. What differs is
    that one norm serves clipping, the guard against NaN gradients and the log, and that clipping by itself writes no
    gradient: our AdamW scales each gradient while it reads it. For other optimizers the gradients are scaled in place.

    Attributes:
        weights: the copies that the modules compute with, from `set_up_precision` on; under FSDP those of experts that
            it leaves out. None where there is none: under autocast, and where `training.mixed_precision_param` is
            `training.dtype`.
    """

    job_config: JobConfig
    parallel_dims: ParallelDims
    model_parts: list[nn.Module]
    device: torch.device
    optimizers: Any
    lr_schedulers: Any
    checkpointer: Any
    metrics_processor: Any
    gradient_accumulation_steps: int
    ntokens_seen: int
    step: int
    maybe_enable_amp: contextlib.AbstractContextManager[Any]
    weights: ComputeWeights | None = None

    def set_up_precision(self) -> None:
        """Decide how what FSDP has no part in computes in `training.mixed_precision_param`, and say so.

        To be called on every rank, when model, optimizers and validator are built.
        """
        config, dims = self.job_config, self.parallel_dims
        if config.model.name != MODEL_NAME:
            return
        wanted, own = config.training.mixed_precision_param, config.training.dtype
        if dims.fsdp_enabled:
            modules = [module for part in self.model_parts for module in part.modules()]
            left_out = [m for m in modules if isinstance(m, MomoeExperts) and m.compute_dtype is not None]
            if left_out and wanted != own:
                self._compute_with(self._narrow_weights(left_out, TORCH_DTYPE_MAP[wanted]))
            return
        if (reason := reason_for_autocast(config, dims)) is not None:
            if wanted != own and (dims.tp_enabled or dims.pp_enabled):
                logger.warning(
                    f"Precision: {own} throughout, not {wanted}: with tensor or pipeline parallelism TorchTitan has no "
                    f"autocast, which this job would need ({reason})"
                )
            elif wanted != own:
                logger.info(f"Precision: autocast to {wanted}, {own} weights and residuals ({reason})")
            return
        weights = None
        if wanted != own:
            weights = self._narrow_weights(self.model_parts, TORCH_DTYPE_MAP[wanted])
            logger.info(f"Precision: {wanted} weights and residuals as under FSDP, {own} master weights and moments")
        self._compute_with(weights)

    def _compute_with(self, weights: ComputeWeights | None) -> None:
        self.weights, self.maybe_enable_amp = weights, weights or contextlib.nullcontext()
        if (validator := getattr(self, "validator", None)) is not None:
            validator.maybe_enable_amp = self.maybe_enable_amp

    def _narrow_weights(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> ComputeWeights:
        ours = [optimizer for optimizer in self.optimizers if isinstance(optimizer, AdamW)]
        once = self.gradient_accumulation_steps == 1 and not self.parallel_dims.pp_enabled
        narrow = once and len(ours) == len(self.optimizers)  # torch's optimizers want gradients in the weights' dtype
        weights = ComputeWeights(modules, dtype, sums_in_parameters_dtype=not narrow)
        for optimizer in ours:
            optimizer.copies = weights.copies
        return weights

    def train_step(self, data_iterator: Iterator[Batch]) -> None:
        """Train one step, and log it where that is due."""
        if self.job_config.model.name != MODEL_NAME:
            return super().train_step(data_iterator)  # pyright: ignore[reportAttributeAccessIssue] - a mixin
        self.optimizers.zero_grad()
        lr = self.lr_schedulers.schedulers[0].get_last_lr()[0]
        microbatches = [next(data_iterator) for _ in range(self.gradient_accumulation_steps)]
        local_valid_tokens = torch.stack([(labels != IGNORE_INDEX).sum() for _, labels in microbatches]).sum()
        local_valid_tokens = local_valid_tokens.to(self.device)
        global_valid_tokens = local_valid_tokens.clone()
        if self.parallel_dims.dp_enabled:  # TorchTitan's function would have the host wait for the device
            torch.distributed.all_reduce(global_valid_tokens, group=self.parallel_dims.get_mesh("batch").get_group())
        global_valid_tokens = global_valid_tokens.float()

        with self.weights or contextlib.nullcontext():
            losses = [self._microbatch(*batch, global_valid_tokens) for batch in microbatches]
        grad_norm = self._clip()
        self.checkpointer.maybe_wait_for_staging()
        self.optimizers.step()
        if self.weights is not None:
            self.weights.written = all(getattr(optimizer, "wrote_copies", False) for optimizer in self.optimizers)
        self.lr_schedulers.step()

        loss = torch.stack(losses).sum()
        self.metrics_processor.finish_log()  # of the step before, while the device works on this one
        if self.metrics_processor.should_log(self.step):
            self._log(loss, global_valid_tokens, local_valid_tokens, grad_norm, lr)

    def _microbatch(self, inputs: dict[str, Tensor], labels: Tensor, global_valid_tokens: Tensor) -> Tensor:
        """Send a microbatch to the device, and make its gradients or add them. Gives its loss."""
        inputs = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        trainer: Any = self
        loss = trainer.forward_backward_step(
            input_dict=inputs, labels=labels.to(self.device), global_valid_tokens=global_valid_tokens
        )
        return loss.detach()

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """Have the optimizers clip the gradients in their next step. Gives the norm before clipping, float32 of no
        dimension."""
        guard: NonFiniteGuard = self.optimizers.non_finite_guard
        parameters = [p for part in self.model_parts for p in part.parameters()]
        guard.norm = norm = guard.compute_norm(parameters, self.device)
        scale = (self.job_config.training.max_norm / (norm + CLIP_EPS)).clamp(max=1.0)
        ours = [optimizer for optimizer in self.optimizers if isinstance(optimizer, AdamW)]
        for optimizer in ours:
            optimizer.clip_coefficient = scale
        if len(ours) < len(self.optimizers):
            scale_gradients(parameters, scale)
        return norm

    def _log(self, loss: Tensor, global_tokens: Tensor, local_tokens: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Hand the losses over all ranks to the metrics processor; as TorchTitan's, without waiting for the device."""
        if isinstance(loss, DTensor):  # of whole logits under tensor parallelism
            loss = loss.full_tensor()
        seen = torch.full((), self.ntokens_seen, dtype=torch.float64, device=loss.device)
        mean = worst = loss
        if self.parallel_dims.dp_cp_enabled:
            group = self.parallel_dims.get_mesh("loss").get_group()
            sums = torch.stack([loss.double(), seen])
            worst = loss * global_tokens / local_tokens
            torch.distributed.all_reduce(sums, group=group)
            torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX, group=group)
            mean, seen = sums
        self.metrics_processor.start_log(self.step, StepNumbers(mean, worst, grad_norm, seen), lr)
