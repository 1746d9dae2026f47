"""Activation checkpointing that does not run the experts' forward again.

TorchTitan's modes decide which blocks the backward recomputes. Inside a recomputed block, one of our
MoE layers saves what its backward needs of routing and experts, so that the recomputation runs
neither: `save_percent` alone decides how much of the experts is computed twice. In units of 2*R*D*F,
full checkpointing at save_percent 0 costs 9 + 2; a second forward of the experts would make it
9 + 3 + 2. Forward and backward use the same saved routing, which therefore cannot differ.

Saved per token of a recomputed block, in bytes, for 2-byte activations:

    x, the block's input                          2 D
    the chosen experts, int64                     8 K     for the gradient of the router's logits
    their scores, float32                         4 K     on a GPU; recomputed elsewhere
    the routing, 3 int32 per row                 12 K     and some hundred bytes per layer
    the saved z, by save_percent p                4 F K p/100

Everything else is recomputed: the attention, h = x + attention(x) and norm(h), the router's logits
(one product with D x E) and the shared experts. A checkpoint that ended before the MoE layer would
save h and norm(h), 2 D bytes each. No backward needs the experts' output. Checkpointing by a list of
saved ops would save it all the same, 2 D bytes, because it is one of the outputs of the experts' op.

Under expert parallelism the sizes of the exchange are saved too, so that the backward does not wait
for the device to learn them. Tokens are sent a second time, except in mode "selective" with "op".

How:
- Eager, by two dispatch modes. In the forward, `_Save` stores what the listed ops return. In the
  recomputation, `_Replay` returns the stored outputs instead of running these ops, and empty tensors
  for outputs that no backward reads. A dispatch mode costs Python around every op, so the modes are
  entered in the MoE layer alone, except in mode "selective" with "op", which has modes around the
  whole block anyway.
- Compiled, by marking the outputs of the listed ops as saved. The partitioner drops those that no
  backward reads.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts, noop_context_fn
from torchtitan.config import JobConfig
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama4.infra.parallelize import _op_sac_save_list as LLAMA4_SAVED_OPS

from momoe_titan.config.compile import compiles_model
from momoe_titan.model.experts import SavingExperts
from momoe_titan.model.model import blocks_of

ops = torch.ops.momoe_titan
# The ops that a recomputation does not run, and for each of their outputs, whether a backward reads it.
SAVED_OUTPUTS: dict[torch._ops.OpOverload, tuple[bool, ...]] = {
    ops.route.default: (True, True),  # scores and chosen experts, on a GPU
    ops.choose_experts.default: (True,),  # elsewhere
    ops.moe_forward.default: (False, False, True, True),  # out, counts, z, routing
    ops.exchange_counts.default: (True,),
}
# The ops whose outputs mode "selective" with "op" saves besides.
_RECEIVED = {ops.send_rows.default, ops.gather_tokens.default, ops.gather_choice.default}
SELECTIVE_OPS = frozenset(LLAMA4_SAVED_OPS) | _RECEIVED

Contexts = tuple[AbstractContextManager, AbstractContextManager]


class _Save(TorchDispatchMode):
    """Runs all ops, and appends what the listed ones return to `saved`."""

    supports_higher_order_operators = True  # what a compiled region is to a mode: it passes like any other op

    def __init__(self, saved: list):
        super().__init__()
        self.saved = saved

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # compiled regions inside, such as flex attention, stay compiled

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (is_read := SAVED_OUTPUTS.get(func)) is not None:
            outputs = result if isinstance(result, tuple) else (result,)
            saved = [t.detach() if read else _empty_like_later(t) for t, read in zip(outputs, is_read, strict=True)]
            self.saved.append((func, saved))
        return result


class _Replay(_Save):
    """Returns what `_Save` saved, in the same order, and runs all other ops.

    A second backward of the same forward, which some pipeline schedules have, starts at the first
    saved op again.
    """

    def __enter__(self) -> "_Replay":
        self.rest = iter(self.saved)
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in SAVED_OUTPUTS:
            return func(*args, **(kwargs or {}))
        saved_func, saved = next(self.rest)
        assert saved_func is func, f"the forward ran {saved_func} where the recomputation runs {func}"
        outputs = [t if isinstance(t, torch.Tensor) else t() for t in saved]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _empty_like_later(t: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Makes an empty tensor like t, strides included, so that the same ops follow. Does not keep t alive."""
    return functools.partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device=t.device)


class _Both:
    """Enters two contexts as one, and can be entered again."""

    def __init__(self, outer: AbstractContextManager, inner: AbstractContextManager):
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *exc) -> None:
        self.inner.__exit__(*exc)
        self.outer.__exit__(*exc)


_block = threading.local()  # .mode: what the MoE layer of the block that runs in this thread enters, or None


class _InMoE:
    """A context for a block, in which the block's MoE layer runs within `mode`, and nothing else does."""

    def __init__(self, mode: _Save):
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
    """A context_fn of `torch.utils.checkpoint`: contexts of the forward and of the recomputation.

    Where `inner_fn` has contexts of its own, ours go around them. Ours then see an op only after the
    inner ones have let it pass, so that a list of saved ops inside must not name those of
    SAVED_OUTPUTS.
    """
    saved = []
    if inner_fn is noop_context_fn:
        return _InMoE(_Save(saved)), _InMoE(_Replay(saved))
    forward, recompute = inner_fn()
    return _Both(_Save(saved), forward), _Both(_Replay(saved), recompute)


def _save_listed(other: CheckpointPolicy, ctx, func, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if func in SAVED_OUTPUTS else other


# At module level, so that torch.compile sees the same object in every layer and one graph serves all.
_recompute_others = functools.partial(
    create_selective_checkpoint_contexts,
    functools.partial(_save_listed, CheckpointPolicy.PREFER_RECOMPUTE),
)
_leave_others = functools.partial(
    create_selective_checkpoint_contexts,
    functools.partial(_save_listed, CheckpointPolicy.PREFER_SAVE),
)


def _is_ours(moe: nn.Module) -> bool:
    return isinstance(getattr(moe, "experts", None), SavingExperts)


def apply_activation_checkpointing(model: nn.Module, job_config: JobConfig, blocks_compiled: bool) -> None:
    """Wrap the model's blocks as `[activation_checkpoint]` says; to be called before torch.compile and FSDP.

    Blocks with TorchTitan's own MoE layer get what TorchTitan does, and nothing of ours.

    Args:
        blocks_compiled: whether each block, with its wrapper, will be compiled as a whole.
    """
    config = job_config.activation_checkpoint
    if config.mode == "none":
        return
    layers = model.get_submodule("layers")
    names = [name for name, _ in layers.named_children()]
    blocks = zip(names, blocks_of(model), strict=True)
    ours = {name: block.moe for name, block in blocks if block.moe_enabled and _is_ours(block.moe)}
    if ours:
        # At a budget of 0 the partitioner would not even save what is marked. Next to nothing does.
        config = dataclasses.replace(config, memory_budget=max(config.memory_budget, 1e-9))
    apply_ac(
        model,
        config,
        model_compile_enabled=compiles_model(job_config),
        op_sac_save_list=set(SELECTIVE_OPS) | (SAVED_OUTPUTS.keys() if ours and blocks_compiled else set()),
        base_folder=job_config.job.dump_folder,
    )
    by_op = config.mode == "selective" and config.selective_ac_option == "op"
    for name, moe in ours.items():
        block = layers.get_submodule(name)
        if config.mode == "memory_budget" and blocks_compiled:
            # Recomputes nothing: it marks ops for the partitioner.
            layers.register_module(name, checkpoint_wrapper(block, context_fn=_leave_others))
        elif isinstance(block, CheckpointWrapper) and not (blocks_compiled and by_op):
            options = dict(block.checkpoint_fn.keywords)
            inner_fn = options.pop("context_fn", noop_context_fn)
            options.pop("use_reentrant")  # False, which is what checkpoint_wrapper sets
            context_fn = _recompute_others
            if not blocks_compiled:
                context_fn = functools.partial(_eager_contexts, inner_fn)
                moe.register_forward_pre_hook(_enter_moe)
                # always_call: a recomputation that stops early leaves the layer by an exception
                moe.register_forward_hook(_leave_moe, always_call=True)
            wrapped = block.get_submodule("_checkpoint_wrapped_module")
            layers.register_module(name, checkpoint_wrapper(wrapped, context_fn=context_fn, **options))
