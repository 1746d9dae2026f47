"""Accumulating tokens per expert over the microbatches of one optimizer step.

Loss-free balancing (arXiv 2408.15664) needs each token counted once per step. A forward that
is recomputed for activation checkpointing runs inside the backward and must not count again;
evaluation must not count at all.
"""

import torch
from torch import nn


def inside_backward() -> bool:
    """True while autograd runs a backward on this thread, hence in every recomputed forward."""
    return torch._C._current_graph_task_id() != -1


# A custom op, so that the question "is this a recomputation?" is asked when the op runs and not
# when torch.compile traces it: one compiled graph serves the forward and its recomputation.
@torch.library.custom_op("momoe_titan::accumulate_counts", mutates_args=("total_E",))
def accumulate_counts(total_E: torch.Tensor, counts_E: torch.Tensor) -> None:
    """Add counts_E (E,) to total_E (E,) in place, except inside a backward."""
    if not inside_backward():
        total_E.add_(counts_E)


@accumulate_counts.register_fake
def _(total_E: torch.Tensor, counts_E: torch.Tensor) -> None:
    return None


def feeds_balancing(module: nn.Module) -> bool:
    """True when a forward of `module` is one that training counts: training mode, gradients on.

    A recomputed forward passes this test; `accumulate_counts` is what drops it. Checkpointing
    with use_reentrant=True runs its first forward without gradients, so nothing would be
    counted at all: use use_reentrant=False (TorchTitan does).
    """
    return module.training and torch.is_grad_enabled()
