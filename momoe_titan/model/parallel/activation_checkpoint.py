"""Activation checkpointing in which an MoE layer is its own checkpoint.

TorchTitan's modes decide which blocks are recomputed in the backward. Inside a recomputed block an
MoE layer of ours keeps what its backward needs of routing and experts, and runs neither again:
`save_percent` alone says what is computed twice of the experts. In units of 2*R*D*F, full
checkpointing at save_percent 0 costs 9 + 2, where another forward would make it 9 + 3 + 2. The
routing of forward and backward is one and the same object: it cannot differ.

Kept per token of a recomputed block, in bytes, for 2-byte activations:

    x, the block's input                          2 D
    the chosen experts, int64                     8 K     for the gradient of the router's logits
    their scores, float32                         4 K     on a GPU; recomputed elsewhere
    the routing, 3 int32 per row                 12 K     and some hundred bytes per layer
    save_percent's share p of z                   4 F K p/100

and nothing else. h = x + attention(x) and norm(h), which feeds router, experts and shared experts,
are recomputed with the attention (another 2 D bytes each if the checkpoint ended before the MoE),
and so are the router's logits (one product with D x E) and the shared experts. The experts' output
is needed by no backward. Checkpointing by a list of saved ops would keep it, since it is one of the
outputs of the op (another 2 D).

Under expert parallelism the sizes of the exchange are kept too: the backward does not wait for the
device to learn them. Tokens are sent once more, except in mode "selective" with "op".

Eager, two dispatch modes do this: one writes down what the listed ops returned, the other reads it
back in place of running them and hands out empty tensors for outputs that no backward reads. A mode
costs Python around every op: they are entered in the MoE layer alone, unless mode "selective" with
"op" has modes of its own around the whole block.
Compiled, the listed ops' outputs are marked as to be saved, and the partitioner drops those that no
backward reads.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama4.infra.parallelize import (
    _op_sac_save_list as LLAMA4_SAVED_OPS,
)

from momoe_titan.config.compile import compiles_model
from momoe_titan.model.moe import MomoeMoE
from momoe_titan.model.parallel import dispatch  # noqa: F401 - registers ops named below

ops = torch.ops.momoe_titan
# The ops that a recomputed block does not run again, and which of their outputs a backward reads.
KEPT_OUTPUTS: dict[torch._ops.OpOverload, tuple[bool, ...]] = {
    ops.route.default: (True, True),  # scores and chosen experts, on a GPU
    ops.choose_experts.default: (True,),  # elsewhere
    ops.moe_forward.default: (False, False, True, True),  # out, counts, z, routing
    ops.exchange_counts.default: (True,),
}
# What mode "selective" with "op" keeps beside them.
SAVED_OPS = frozenset(LLAMA4_SAVED_OPS) | {ops.send_rows.default}

Contexts = tuple[AbstractContextManager, AbstractContextManager]


class _Keep(TorchDispatchMode):
    """Runs everything, and appends what the listed ops return to `kept`."""

    def __init__(self, kept: list):
        super().__init__()
        self.kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled regions inside, as flex attention, stay compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (is_read := KEPT_OUTPUTS.get(func)) is not None:
            outputs = result if isinstance(result, tuple) else (result,)
            kept = [t.detach() if read else _empty_like_later(t) for t, read in zip(outputs, is_read, strict=True)]
            self.kept.append((func, kept))
        return result


class _Replay(_Keep):
    """Hands out what `_Keep` kept, in its order, and runs everything else. Another backward of the
    same forward, as some pipeline schedules have, starts from the first again."""

    def __enter__(self) -> "_Replay":
        self.rest = iter(self.kept)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in KEPT_OUTPUTS:
            return func(*args, **(kwargs or {}))
        kept_func, kept = next(self.rest)
        assert kept_func is func, f"the forward ran {kept_func} where the recomputation runs {func}"
        outputs = tuple(t if isinstance(t, torch.Tensor) else t() for t in kept)
        return outputs if len(outputs) > 1 else outputs[0]


def _empty_like_later(t: torch.Tensor) -> Callable[[], torch.Tensor]:
    """With the strides of t, so that what follows runs the same ops."""
    return functools.partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device=t.device)


class _Both:
    """Two contexts as one that can be entered more than once."""

    def __init__(self, outer: AbstractContextManager, inner: AbstractContextManager):
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *exc) -> None:
        self.inner.__exit__(*exc)
        self.outer.__exit__(*exc)


_block = threading.local()  # .mode: what the block at work in this thread has its MoE layer enter, or None


class _InMoE:
    """A context of a block whose MoE layer, and nothing else, runs within `mode`."""

    def __init__(self, mode: _Keep):
        self.mode = mode

    def __enter__(self) -> None:
        self.outer = getattr(_block, "mode", None)
        _block.mode = self.mode

    def __exit__(self, *exc) -> None:
        _block.mode = self.outer


def _enter_moe(moe: nn.Module, args) -> None:
    if mode := getattr(_block, "mode", None):
        mode.__enter__()


def _leave_moe(moe: nn.Module, args, out) -> None:
    if mode := getattr(_block, "mode", None):
        mode.__exit__(None, None, None)


def _eager_contexts(inner_fn: Callable[[], Contexts]) -> Contexts:
    """What `torch.utils.checkpoint` asks a context_fn for: ours around those of `inner_fn`.

    Ours are the outer ones, which see an op after the inner ones have let it pass: a saved-op list
    inside must not name the ops of KEPT_OUTPUTS.
    """
    kept = []
    if inner_fn is noop_context_fn:
        return _InMoE(_Keep(kept)), _InMoE(_Replay(kept))
    forward, recompute = inner_fn()
    return _Both(_Keep(kept), forward), _Both(_Replay(kept), recompute)


def _save_listed(other: CheckpointPolicy, ctx, func, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if func in KEPT_OUTPUTS else other


# Module-level, so that torch.compile sees the same object in every layer: one graph serves all.
_recompute_others = functools.partial(
    create_selective_checkpoint_contexts,
    functools.partial(_save_listed, CheckpointPolicy.PREFER_RECOMPUTE),
)
_leave_others = functools.partial(
    create_selective_checkpoint_contexts,
    functools.partial(_save_listed, CheckpointPolicy.PREFER_SAVE),
)


def apply_activation_checkpointing(model: nn.Module, job_config: JobConfig, blocks_compiled: bool) -> None:
    """Wrap the model's blocks as `[activation_checkpoint]` says, before torch.compile and FSDP.

    Stock MoE layers get what TorchTitan does, and nothing of ours.

    Args:
        blocks_compiled: whether each block, with its wrapper, will be compiled as a whole.
    """
    config = job_config.activation_checkpoint
    if config.mode == "none":
        return
    layers = model.get_submodule("layers")
    ours = {n for n, b in layers.named_children() if b.moe_enabled and isinstance(b.moe, MomoeMoE)}
    if ours:
        # At 0 the partitioner would not even keep what is marked; next to nothing is as little.
        config = dataclasses.replace(config, memory_budget=max(config.memory_budget, 1e-9))
    apply_ac(
        model,
        config,
        model_compile_enabled=compiles_model(job_config),
        op_sac_save_list=set(SAVED_OPS) | (KEPT_OUTPUTS.keys() if ours and blocks_compiled else set()),
        base_folder=job_config.job.dump_folder,
    )
    by_op = config.mode == "selective" and config.selective_ac_option == "op"
    for name, block in layers.named_children():
        if name not in ours:
            continue
        if config.mode == "memory_budget" and blocks_compiled:
            # Nothing is recomputed by this: it marks ops for the partitioner.
            layers.register_module(name, checkpoint_wrapper(block, context_fn=_leave_others))
        elif isinstance(block, CheckpointWrapper) and not (blocks_compiled and by_op):
            checkpoint_fn = block.checkpoint_fn
            context_fn = _recompute_others
            if not blocks_compiled:
                inner_fn = checkpoint_fn.keywords.get("context_fn", noop_context_fn)
                context_fn = functools.partial(_eager_contexts, inner_fn)
                block.moe.register_forward_pre_hook(_enter_moe)
                # always: a recomputation that stops early leaves by an exception
                block.moe.register_forward_hook(_leave_moe, always_call=True)
            block.checkpoint_fn = functools.partial(checkpoint_fn, context_fn=context_fn)
