"""Skips optimizer steps whose gradient has a NaN or an infinity."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torchtitan.components.optimizer import OptimizersContainer

from momoe_titan.components.gradient_norm import GradientNorm


class NonFiniteGuard:
    """Optimizer step pre-hook that skips a step if any rank's gradient has a NaN or an infinity.

    TorchTitan clips by the norm and steps in any case, after which every weight is NaN. With this
    hook, weights and moments stay as they are on all ranks, and the learning-rate schedule goes on.
    The host does not wait for the device: PyTorch's fused optimizers and ours read the decision from
    `found_inf` on the device, as they do for a gradient scaler. Other implementations of the
    optimizer do not read `found_inf` and step as in TorchTitan. The decision is made from the norm of
    the gradient, which is not finite if any of its values is not. With several ranks it costs an
    all-reduce of one number.

    Args:
        stages: the ranks of pipeline parallelism, or None.

    Attributes:
        compute_norm: of the gradient over all ranks.
        norm: that of the step to come, where it is known. The hook takes it, or computes the norm itself.
        skipped_steps: how many steps were skipped since the start: 0 before the first step, then a
            0-dimensional tensor on the device.
    """

    def __init__(self, stages: ProcessGroup | None = None):
        self.compute_norm = GradientNorm(stages)
        self.norm: Tensor | None = None
        self.skipped_steps: Tensor | int = 0

    @torch.no_grad()
    def __call__(self, optimizers: OptimizersContainer, *hook_args) -> None:
        norm, self.norm = self.norm, None
        if norm is None:
            # No gradient is left where the optimizer steps during the backward.
            parameters = [p for part in optimizers.model_parts for p in part.parameters()]
            norm = self.compute_norm(parameters, parameters[0].device)
        found_inf = (~norm.isfinite()).float()
        # Not with one rank: NCCL's first collective allocates memory, which the first step may have filled.
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(found_inf, op=torch.distributed.ReduceOp.MAX)
        # For the hooks that follow. TorchTitan's class does not declare it.
        setattr(optimizers, "found_inf", found_inf)  # noqa: B010
        if all(g["fused"] for optimizer in optimizers for g in optimizer.param_groups):
            for optimizer in optimizers:
                optimizer.found_inf = found_inf
            self.skipped_steps = self.skipped_steps + found_inf.long()
