"""Skips optimizer steps whose gradient has a NaN or an infinity."""

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer


class NonFiniteGuard:
    """Optimizer step pre-hook that skips a step if any rank's gradient has a NaN or an infinity.

    TorchTitan clips by the norm and steps in any case, after which every weight is NaN. With this
    hook, weights and moments stay as they are on all ranks, and the learning-rate schedule goes on.
    The host does not wait for the device: PyTorch's fused optimizers read the decision from
    `found_inf` on the device, as they do for a gradient scaler. Other implementations of the
    optimizer do not read `found_inf` and step as in TorchTitan. The cost is one more reading of the
    gradient, and with several ranks an all-reduce of one number.

    Attributes:
        skipped_steps: how many steps were skipped since the start: 0 before the first step, then a
            0-dimensional tensor on the device.
    """

    def __init__(self):
        self.skipped_steps: torch.Tensor | int = 0

    @torch.no_grad()
    def __call__(self, optimizers: OptimizersContainer, *hook_args) -> None:
        grads = [p.grad for part in optimizers.model_parts for p in part.parameters()]
        grads = [g.to_local() if isinstance(g, DTensor) else g for g in grads if g is not None]
        device = next(optimizers.model_parts[0].parameters()).device
        foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage] - no public name
        # No gradient is left where the optimizer steps during the backward.
        norms = foreach_norm(grads) if grads else [torch.zeros((), device=device)]
        found_inf = (~torch.stack(norms).sum().isfinite()).float()
        # Not with one rank: NCCL's first collective allocates memory, which the first step may have filled.
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(found_inf, op=torch.distributed.ReduceOp.MAX)
        # For the hooks that follow. TorchTitan's class does not declare it.
        setattr(optimizers, "found_inf", found_inf)  # noqa: B010
        if all(g["fused"] for optimizer in optimizers for g in optimizer.param_groups):
            for optimizer in optimizers:
                optimizer.found_inf = found_inf
            self.skipped_steps = self.skipped_steps + found_inf.long()
