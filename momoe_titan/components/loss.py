"""Cross entropy whose gradient is the same on every mesh: that of the mean over all tokens of a step."""

from collections.abc import Callable

import torch
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims

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
        training = job_config.training
        sequences = training.global_batch_size
        if sequences < 0:
            sequences = training.local_batch_size * parallel_dims.dp_replicate
            sequences *= parallel_dims.dp_shard
        factor /= sequences * training.seq_len
    return loss_fn if factor == 1.0 else scale_gradient(loss_fn, factor)


def scale_gradient(loss_fn: Loss, factor: float) -> Loss:
    """A loss with the value of `loss_fn` and `factor` times its gradient."""

    def scaled(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = loss_fn(pred, labels)
        if loss.requires_grad:
            loss.register_hook(lambda grad: grad * factor)
        return loss

    return scaled
