"""Counts tokens per expert and the router's entropy over the microbatches of an optimizer step.

Load balancing needs each token counted once per step. A forward that activation checkpointing
recomputes runs inside the backward and must not count again, unless the first one had no gradients.
Evaluation must not count at all.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction

from momoe_titan.kernels.entropy import add_entropy
from momoe_titan.kernels.quantile import add_tokens, count_margins

MEAN_TOKENS = 1024  # tokens of a forward that enter the mean token, by which quantile balancing follows the gates
_entropy_wanted = False
_paused = False
_switches: dict[torch.device, torch.Tensor] = {}  # 1 while the entropy is wanted, else 0


def inside_backward() -> bool:
    """True while autograd runs a backward on this thread, hence in every recomputed forward."""
    return torch._C._current_graph_task_id() != -1


def is_first_forward() -> bool:
    """Whether the forward that runs on this thread is the first that checkpointing lets count.

    False in a recomputation, except in that of a checkpoint with use_reentrant=True: its first forward runs
    without gradients, like an evaluation, and is not counted.
    """
    if not inside_backward():
        return True
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.backward.__code__:
            return True
        if frame.f_code.co_name == "recompute_fn":  # of a checkpoint with use_reentrant=False, inside the other
            return False
        frame = frame.f_back
    return False


@contextlib.contextmanager
def recording_paused() -> Iterator[None]:
    """Within the block this process records nothing: for a forward on values that mean nothing."""
    global _paused
    before, _paused = _paused, True
    try:
        yield
    finally:
        _paused = before


def count_experts(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many tokens chose each expert, int64 (E). Deterministic, and does not wait for the device."""
    ids = ids_TK.reshape(-1)
    return ids.new_zeros(num_experts).scatter_add_(0, ids, torch.ones_like(ids))


def feeds_balancing(module: nn.Module) -> bool:
    """True when training counts a forward of `module`: in training mode with gradients on.

    A recomputed forward passes this test too; the ops below drop it where the first one was counted
    (see `is_first_forward`).
    """
    return module.training and torch.is_grad_enabled()


def record_counts(module: nn.Module, total_E: torch.Tensor, counts_E: torch.Tensor) -> None:
    """Add counts_E to total_E in place, if this forward of `module` is one that training counts.

    In evaluation mode they are added to the module's `evaluated_E` in its place, where it has one.
    """
    if feeds_balancing(module):
        accumulate_counts(total_E, counts_E)
    elif not module.training and (evaluated_E := getattr(module, "evaluated_E", None)) is not None:
        accumulate_counts(evaluated_E, counts_E)


# A custom op asks whether this is a recomputation when the op runs, not when torch.compile traces
# it: one compiled graph serves the forward and its recomputation.
@torch.library.custom_op("momoe_titan::accumulate_counts", mutates_args=("total_E",))
def accumulate_counts(total_E: torch.Tensor, counts_E: torch.Tensor) -> None:
    """Add counts_E (E,) to total_E (E,) in place, except in a recomputation or while paused."""
    if not _paused and is_first_forward():
        total_E.add_(counts_E)


@accumulate_counts.register_fake
def _(total_E: torch.Tensor, counts_E: torch.Tensor) -> None:
    return None


# Not part of the op `route`, because an op with a gradient may not change its inputs.
@torch.library.custom_op("momoe_titan::accumulate_margins", mutates_args=("histogram_EB", "input_sum_C"))
def accumulate_margins(
    histogram_EB: torch.Tensor,
    input_sum_C: torch.Tensor | None,
    x_TD: torch.Tensor | None,
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor,
    ids_TK: torch.Tensor,
    score_func: str,
    *,
    num_groups: int = 1,
    num_limited_groups: int = 1,
) -> None:
    """Count what quantile balancing needs of a forward, in place, except in a recomputation or while paused.

    Adds the tokens' margins to histogram_EB (see `kernels.quantile`). Where there is an input_sum_C,
    adds the sum of evenly spaced tokens to its first D entries and their number to its last. The mean
    of `MEAN_TOKENS` of them is close enough: reading all would take three times as long as counting.
    """
    if _paused or not is_first_forward():
        return
    groups = {"num_groups": num_groups, "num_limited_groups": num_limited_groups}
    count_margins(logits_TE, bias_E, ids_TK, histogram_EB, score_func, **groups)
    if input_sum_C is not None and x_TD is not None:
        add_tokens(x_TD[:: max(1, x_TD.shape[0] // MEAN_TOKENS)], input_sum_C)


@accumulate_margins.register_fake
def _(
    histogram_EB, input_sum_C, x_TD, logits_TE, bias_E, ids_TK, score_func, *, num_groups=1, num_limited_groups=1
) -> None:
    return None


def want_entropy(wanted: bool) -> None:
    """Switch the recording of the routers' entropy in this process; it starts switched off."""
    global _entropy_wanted
    if wanted != _entropy_wanted:
        _entropy_wanted = wanted
        for switch in _switches.values():
            switch.fill_(wanted)


def prepare_capture(device: torch.device) -> None:
    """Make what the ops below read in a CUDA graph, before one is captured on this device."""
    _switch(device)


def _switch(device: torch.device) -> torch.Tensor:
    """On the device: 1.0 while the entropy is wanted, else 0.0."""
    if device not in _switches:
        _switches[device] = torch.full((), float(_entropy_wanted), device=device)
    return _switches[device]


def records_entropy(module: nn.Module) -> bool:
    """True when `accumulate_entropy` is to be called.

    Always true while torch.compile traces a training forward, or a CUDA graph is captured: the graph
    then holds the op, which asks again when it runs, so that switching recompiles nothing.
    """
    if not feeds_balancing(module):
        return False
    return torch.compiler.is_compiling() or _entropy_wanted or _is_captured()


def _is_captured() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def recording_entropy(device: torch.device) -> torch.Tensor | None:
    """1.0 or 0.0 on the device, by which what the forward that runs now records is to be multiplied; None for nothing.

    Nothing is recorded in a recomputation, or while paused. A CUDA graph that is being captured records in any case and
    decides when it runs: whether the entropy is wanted differs from step to step.
    """
    if _paused or not is_first_forward():
        return None
    return _switch(device) if _entropy_wanted or _is_captured() else None


@torch.library.custom_op("momoe_titan::accumulate_entropy", mutates_args=("total_2",))
def accumulate_entropy(total_2: torch.Tensor, scores_TE: torch.Tensor) -> None:
    """Add the sum of the tokens' entropies and the number of tokens to total_2, in place; see `add_entropy`.

    Does nothing where the entropy is not wanted, in a recomputation, or while paused.
    """
    wanted = recording_entropy(total_2.device)
    if wanted is not None:
        add_entropy(total_2, scores_TE.contiguous(), wanted)


@accumulate_entropy.register_fake
def _(total_2: torch.Tensor, scores_TE: torch.Tensor) -> None:
    return None
