"""What happens to an optimizer step whose gradient is not finite."""

import torch
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import OptimizersContainer


class NonFiniteGuard:
    """Optimizer step pre-hook: a step is not taken where any rank has a NaN or an infinity in its
    gradient.

    TorchTitan clips by the norm and steps in any case, after which every weight is NaN. Here
    weights and moments stay as they are, on all ranks alike, and the schedule goes on. Decided on
    the device, which nobody waits for: PyTorch's fused optimizers read the answer from `found_inf`,
    as they do for a gradient scaler. Other implementations know no such thing and step as in
    TorchTitan. Costs one more reading of the gradient, and with several ranks an all-reduce of one
    number.

    Attributes:
        skipped_steps: since the start; after the first step a tensor without dimensions on the
            device.
    """

    def __init__(self):
        self.skipped_steps: torch.Tensor | int = 0

    @torch.no_grad()
    def __call__(self, optimizers: OptimizersContainer, *hook_args) -> None:
        grads = [p.grad for part in optimizers.model_parts for p in part.parameters()]
        grads = [g.to_local() if isinstance(g, DTensor) else g for g in grads if g is not None]
        device = next(optimizers.model_parts[0].parameters()).device
        # without a gradient (it was used in the backward) there is nothing to find
        norms = torch._foreach_norm(grads) if grads else [torch.zeros((), device=device)]
        found_inf = (~torch.stack(norms).sum().isfinite()).float()
        # Not with one rank: NCCL allocates at its first collective, where a first step may have filled the GPU.
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(found_inf, op=torch.distributed.ReduceOp.MAX)
        optimizers.found_inf = found_inf  # for the other hooks
        if all(g["fused"] for optimizer in optimizers for g in optimizer.param_groups):
            for optimizer in optimizers:
                optimizer.found_inf = found_inf
            self.skipped_steps = self.skipped_steps + found_inf.long()
