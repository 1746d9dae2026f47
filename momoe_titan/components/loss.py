"""Cross entropy as the mean over all tokens of a step, with the same gradient under every parallelism."""

from collections.abc import Callable

import torch
from torch import nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

from momoe_titan.model.moe import BalancedMoE
from momoe_titan.model.stock_moe import StockMoE

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_loss(job_config: JobConfig, parallel_dims: ParallelDims, **kwargs) -> Loss:
    """TorchTitan's cross entropy, a sum over tokens, with a corrected gradient. Its value stays the same.

    TorchTitan 0.2.2 divides the loss by the number of tokens of the step and sums the gradients of all ranks. Two cases
    go wrong, and the loss scales its gradient there:

    - DistributedDataParallel averages the gradients, which divides them by the number of ranks once more.
    - A pipeline schedule takes the gradient of the loss before the division. The number of tokens that it lacks is
      taken as that of a full batch: ignored labels count.
    """
    loss_fn = build_cross_entropy_loss(job_config)
    factor = 1.0
    if parallel_dims.dp_replicate_enabled and not parallel_dims.fsdp_enabled:
        factor *= parallel_dims.dp_replicate
    if parallel_dims.pp_enabled:
        factor /= tokens_per_step(job_config, parallel_dims)
    return loss_fn if factor == 1.0 else scale_gradient(loss_fn, factor)


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
