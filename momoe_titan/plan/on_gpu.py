"""Makes CPU tensors take the code paths of a GPU, so that a trace sees a GPU's allocations."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torchtitan.models.moe import kernels as stock_kernels

from momoe_titan.kernels.gpu import Load, PlannedGpu, plan_for
from momoe_titan.model.parallel.dispatch import Sizes, fair_share


class _FusedRMSNorm(torch.autograd.Function):
    """Allocates and saves what aten::_fused_rms_norm does, which exists for GPUs only."""

    @staticmethod
    def forward(ctx, x, weight):
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dout):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if q.dtype not in (torch.bfloat16, torch.float16):
        out = torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
        )
        return out[0]
    # cuDNN comes first in TorchTitan's order; FlashAttention saves as much
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, attn_mask, True, dropout_p, is_causal, False, scale=scale
    )
    return out[0]


def _rms_norm(x, normalized_shape, weight=None, eps=None):
    if weight is None or weight.dtype != x.dtype or isinstance(x, DTensor):
        return torch.rms_norm(x, normalized_shape, weight, eps)
    return _FusedRMSNorm.apply(x, weight)


class _GpuFunctions(TorchFunctionMode):
    """Functions that choose another kernel on a GPU, which has other outputs or saves other tensors."""

    functions = {F.scaled_dot_product_attention: _attention, F.rms_norm: _rms_norm}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.functions.get(func, func)(*args, **(kwargs or {}))


class _GpuFunctionsInModules:
    """Has `_GpuFunctions` on while a module runs.

    Not all the time: a mode is off while a function that it sees runs, and `Tensor.backward`, in which activation
    checkpointing runs modules again, is one.
    """

    def __enter__(self):
        self._mode, self._depth, self._hooks = _GpuFunctions(), 0, contextlib.ExitStack()
        hooks = nn.modules.module
        self._hooks.callback(hooks.register_module_forward_pre_hook(self._enter_module).remove)
        self._hooks.callback(hooks.register_module_forward_hook(self._leave_module, always_call=True).remove)

    def __exit__(self, *args):
        self._hooks.close()

    def _enter_module(self, module, args):
        if self._depth == 0:
            self._mode.__enter__()
        self._depth += 1

    def _leave_module(self, module, args, out):
        self._depth -= 1
        if self._depth == 0:
            self._mode.__exit__(None, None, None)


def _fill_indices(counts, start, write_offsets, experts_per_rank, num_ranks, max_len, *args, **kwargs):
    return torch.empty(max_len, dtype=torch.int32, device=counts.device)


@contextlib.contextmanager
def as_on_gpu(gpu: PlannedGpu) -> Iterator[None]:
    """While open, code on fake CPU tensors allocates as it would on this GPU.

    Attention, RMSNorm, our kernels and those of TorchTitan's MoE are neither run nor launched.
    """
    # TorchTitan 0.2.2 launches this Triton kernel from a plain function, which no hook sees.
    fill_indices = mock.patch.object(stock_kernels, "fill_indices_wrapper", _fill_indices)
    with plan_for(gpu), _GpuFunctionsInModules(), fill_indices:
        yield


class EvenSizes:
    """A `SizesExchange` in which every rank gets its fair share: nobody knows what fake tokens choose.

    Args:
        num_experts: E.
        num_ranks: P.
        load: how many times the fair share this rank receives.
    """

    def __init__(self, num_experts: int, num_ranks: int, load: Load):
        self.num_experts, self.num_ranks, self.load = num_experts, num_ranks, load

    def __call__(self, sent_P2: torch.Tensor, num_tokens: int, num_chosen: int) -> tuple[Sizes, Sizes]:
        tokens, slots = fair_share(num_tokens, num_chosen, self.num_experts, self.num_ranks)
        sent, received = [tokens, slots], [self.load.tokens * tokens, self.load.rows * slots]
        return [sent] * self.num_ranks, [received] * self.num_ranks
