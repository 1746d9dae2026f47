"""Cross entropy as the mean over all tokens of a step, with the same gradient under every parallelism.

The model itself computes it where it gets the labels (`LossInModel`), so that no rank ever holds all logits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.config.section import Momoe
from momoe_titan.model.moe import BalancedMoE
from momoe_titan.model.stock_moe import StockMoE

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_loss(job_config: JobConfig, parallel_dims: ParallelDims, **kwargs) -> Loss:
    """The sum of the tokens' cross entropies, with a corrected gradient. Its value stays the same.

    It takes what the model returns: logits, from which TorchTitan's function computes the loss, or the loss itself.

    TorchTitan 0.2.2 divides the loss by the number of tokens of the step and sums the gradients of all ranks. Two cases
    go wrong, and the loss scales its gradient there:

    - DistributedDataParallel averages the gradients, which divides them by the number of ranks once more.
    - A pipeline schedule takes the gradient of the loss before the division. The number of tokens that it lacks is
      taken as that of a full batch: ignored labels count.
    """
    of_logits = build_cross_entropy_loss(job_config)

    def loss_fn(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return of_logits(pred, labels) if pred.dim() > 1 else pred.sum()

    factor = 1.0
    if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
        factor *= parallel_dims.dp_replicate
    if parallel_dims.pp_enabled:
        factor /= tokens_per_step(job_config, parallel_dims)
    return loss_fn if factor == 1.0 else scale_gradient(loss_fn, factor)


def loss_is_in_model(job_config: JobConfig) -> bool:
    """Whether the model of this job is to get the labels and to return the loss."""
    momoe = getattr(job_config, "momoe", Momoe())
    return job_config.model.name == MODEL_NAME and momoe.loss_chunk_mib > 0


class LossInModel:
    """Mixin for TorchTitan's trainer and its validator: gives the model the labels, where it computes the loss."""

    job_config: JobConfig

    def post_dataloading_process(self, *batch: Any) -> tuple[torch.Tensor, torch.Tensor, dict, dict]:
        """As the class behind this one; of the results, the last are keyword arguments of all pipeline stages."""
        inputs, labels, extra_inputs, extra_kwargs = super().post_dataloading_process(*batch)  # pyright: ignore[reportAttributeAccessIssue] - a mixin
        if loss_is_in_model(self.job_config):
            extra_kwargs["labels"] = labels
        return inputs, labels, extra_inputs, extra_kwargs


def tokens_per_step(job_config: JobConfig, parallel_dims: ParallelDims) -> int:
    """Tokens of one step, over all ranks and microbatches; ignored labels count."""
    training = job_config.training
    sequences = training.global_batch_size
    if sequences < 0:
        sequences = training.local_batch_size * parallel_dims.dp_replicate * parallel_dims.dp_shard
    return sequences * training.seq_len


def scale_router_losses(model: nn.Module, job_config: JobConfig, parallel_dims: ParallelDims) -> None:
    """Let the gradients of the routers' losses add up to that of a mean over the tokens of a step."""
    tokens = float(tokens_per_step(job_config, parallel_dims))
    if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
        tokens /= parallel_dims.dp_replicate  # DistributedDataParallel takes the mean over ranks
    for module in model.modules():
        if isinstance(module, BalancedMoE):
            # The routers of stock layers see the tokens of all tensor-parallel ranks on each of them.
            copies = parallel_dims.tp if isinstance(module, StockMoE) else 1
            module.router.tokens_per_step = tokens * copies


def scale_gradient(loss_fn: Loss, factor: float) -> Loss:
    """A loss with the value of `loss_fn` and `factor` times its gradient."""

    def scaled(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = loss_fn(pred, labels)
        if loss.requires_grad:
            loss.register_hook(lambda grad: grad * factor)
        return loss

    return scaled
