"""Accumulating tokens per expert over the microbatches of one optimizer step.

Loss-free balancing (arXiv 2408.15664) needs each token counted once per step. A forward that
is recomputed for activation checkpointing runs inside the backward and must not count again;
evaluation must not count at all.
"""

import math

import torch
from torch import nn

_entropy_wanted = False


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


def want_entropy(wanted: bool) -> None:
    """Whether routers record their entropy from now on, in this process (at first they do not)."""
    global _entropy_wanted
    _entropy_wanted = wanted


def records_entropy(module: nn.Module) -> bool:
    """True when `accumulate_entropy` is to be called. Always while torch.compile traces, so that the
    graph holds the op, which asks again when it runs: switching recompiles nothing."""
    return feeds_balancing(module) and (torch.compiler.is_compiling() or _entropy_wanted)


@torch.library.custom_op("momoe_titan::accumulate_entropy", mutates_args=("total_2",))
def accumulate_entropy(total_2: torch.Tensor, scores_TE: torch.Tensor) -> None:
    """Add the tokens' entropies and the number of tokens to total_2, where wanted and not inside a
    backward.

    The entropy of a token is that of its scores, divided by their sum, in units of ln E: 1 where
    all experts score alike, 0 where one has everything.
    """
    if not _entropy_wanted or inside_backward():
        return
    tokens, num_experts = scores_TE.shape
    tiny = torch.finfo(scores_TE.dtype).tiny
    p_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True).clamp(min=tiny)
    total_2[0] += torch.special.entr(p_TE).sum() / math.log(max(2, num_experts))
    total_2[1] += tokens


@accumulate_entropy.register_fake
def _(total_2: torch.Tensor, scores_TE: torch.Tensor) -> None:
    return None
