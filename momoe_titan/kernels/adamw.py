"""AdamW for many tensors at once: one launch reads each gradient once and writes weights, moments and a narrower copy.

The gradient is scaled while it is read, by a number on the device, and is not written. A flag on the device leaves
everything as it was. The update is that of Decoupled Weight Decay Regularization (arXiv 1711.05101, algorithm 2), with
the learning rate as the schedule's factor.
"""

# Inside @triton.jit functions Triton evaluates constants and tuples itself; its stubs do not say so.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels.launch import cdiv, launch, only_plans
from momoe_titan.kernels.multi_tensor import (
    BLOCK,
    CHUNK,
    NUM_WARPS,
    TL_DTYPES,
    Chunks,
    Table,
    address,
    chunk_of,
    is_aligned,
    plan_traffic,
)

_STEPS = 128  # step numbers that one program counts up

# Rows of the table of addresses.
_PARAMETER, _AVERAGE, _SQUARES, _STEP, _COPY = (tl.constexpr(i) for i in range(5))


class Updated(NamedTuple):
    """A parameter and what its update reads and writes, all of one layout in memory and on one GPU.

    Attributes:
        parameter: float32, bfloat16 or float16.
        gradient: any of these dtypes.
        exp_avg, exp_avg_sq: the moments, dtype of the parameter.
        step: float32 of no dimension, how many steps were taken.
        copy: the parameter in a narrower dtype, to be written with it, or None.
    """

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    copy: Tensor | None


@triton.jit(do_not_specialize=["num_tensors"])
def _count_steps_kernel(
    table_ptr,
    rates_ptr,
    skip_ptr,
    num_tensors,
    lr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (cdiv(N, BLOCK_N),). Counts the step of each tensor, unless it is skipped, and writes what depends on it:
    rates (N, 2) float32 = lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), computed in float64."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < num_tensors
    ptrs = tl.load(table_ptr + _STEP * num_tensors + n, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(ptrs, mask=mask, other=1.0)
    step = tl.where(tl.load(skip_ptr) != 0, step, step + 1.0)
    tl.store(ptrs, step, mask=mask)
    steps = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(steps * LOG_BETA1)
    correction2 = 1.0 - tl.exp(steps * LOG_BETA2)
    tl.store(rates_ptr + 2 * n, (lr / correction1).to(tl.float32), mask=mask)
    tl.store(rates_ptr + 2 * n + 1, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)


@triton.jit
def _update(
    p_ptr, m_ptr, v_ptr, g_ptr, c_ptr, mask, rate, root, scale, decay, eps,
    ONE_MINUS_BETA1: tl.constexpr, ONE_MINUS_BETA2: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Updates a block, in float32. What is added to a value is computed first, so that it is rounded at its own size,
    and the value once."""
    g = tl.load(g_ptr, mask=mask).to(tl.float32) * scale
    p = tl.load(p_ptr, mask=mask).to(tl.float32)
    m = tl.load(m_ptr, mask=mask).to(tl.float32)
    v = tl.load(v_ptr, mask=mask).to(tl.float32)
    m += ONE_MINUS_BETA1 * (g - m)
    v += ONE_MINUS_BETA2 * (g * g - v)
    p -= decay * p + rate * m / (tl.sqrt(v) * root + eps)
    tl.store(p_ptr, p.to(p_ptr.dtype.element_ty), mask=mask)
    tl.store(m_ptr, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr, v.to(v_ptr.dtype.element_ty), mask=mask)
    if COPIES:
        tl.store(c_ptr, p.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tensors"])
def _adamw_kernel(
    table_ptr,
    gradients_ptr,
    owners_ptr,
    extents_ptr,
    rates_ptr,
    scale_ptr,
    skip_ptr,
    num_tensors,
    decay,
    eps,
    ONE_MINUS_BETA1: tl.constexpr,
    ONE_MINUS_BETA2: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    COPIES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (chunks,). P, G, C are the dtypes of parameters and moments, of gradients, and of copies if there are any.

    scale and skip are float32 of no dimension; with skip other than 0 nothing is written. decay is lr times weight
    decay. A program owns one chunk of one tensor.
    """
    if tl.load(skip_ptr) == 0:
        owner, start, size = chunk_of(owners_ptr, extents_ptr, num_tensors, CHUNK)
        p_ptr = address(table_ptr, _PARAMETER * num_tensors + owner, P, ALIGNED) + start
        m_ptr = address(table_ptr, _AVERAGE * num_tensors + owner, P, ALIGNED) + start
        v_ptr = address(table_ptr, _SQUARES * num_tensors + owner, P, ALIGNED) + start
        c_ptr = address(table_ptr, _COPY * num_tensors + owner, C, ALIGNED) + start
        g_ptr = address(gradients_ptr, owner, G, ALIGNED) + start
        rate, root = tl.load(rates_ptr + 2 * owner), tl.load(rates_ptr + 2 * owner + 1)
        scale = tl.load(scale_ptr)
        offs = tl.arange(0, BLOCK)
        # Two loops: a mask would keep Triton from wide accesses.
        if size == CHUNK:
            for i in range(0, CHUNK, BLOCK):
                at = i + offs
                _update(
                    p_ptr + at, m_ptr + at, v_ptr + at, g_ptr + at, c_ptr + at, None, rate, root, scale, decay, eps,
                    ONE_MINUS_BETA1, ONE_MINUS_BETA2, COPIES,
                )  # fmt: skip
        else:
            for i in range(0, size, BLOCK):
                at = i + offs
                _update(
                    p_ptr + at, m_ptr + at, v_ptr + at, g_ptr + at, c_ptr + at, at < size, rate, root, scale, decay,
                    eps, ONE_MINUS_BETA1, ONE_MINUS_BETA2, COPIES,
                )  # fmt: skip


class Rates(NamedTuple):
    """The settings of a step, as torch.optim.AdamW names them."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class _Kind(NamedTuple):
    """What tensors have in common that one launch updates."""

    parameter: torch.dtype
    gradient: torch.dtype
    copy: torch.dtype | None
    aligned: bool


class _Launch:
    """The tables of one launch."""

    def __init__(self):
        self.table, self.gradients, self.chunks = Table(), Table(), Chunks()


class Adamw:
    """Takes AdamW steps, and keeps the tables of its launches from step to step.

    Tensors with the same dtypes share one launch. A table is sent to the device only where the address of a tensor has
    changed, and the host never waits. Rates, but for the betas, may change at every step without a kernel being
    compiled.
    """

    def __init__(self):
        self._launches: dict[_Kind, _Launch] = {}

    def step(self, tensors: Sequence[Updated], rates: Rates, scale: Tensor, skip: Tensor) -> None:
        """Take one step, in place.

        Args:
            tensors: all on one GPU.
            rates: of this step.
            scale: float32 of no dimension on the GPU, by which every gradient is multiplied.
            skip: the same: 0, or any other number to leave everything as it is, the step numbers too.
        """
        if only_plans():
            state = [t for u in tensors for t in (u.parameter, u.exp_avg, u.exp_avg_sq)]
            plan_traffic(state + [u.gradient for u in tensors], state + [u.copy for u in tensors if u.copy is not None])
            return
        groups: dict[_Kind, list[tuple[Updated, list[int]]]] = {}
        for u in tensors:
            copy = u.parameter if u.copy is None else u.copy
            ptrs = [t.data_ptr() for t in (u.parameter, u.exp_avg, u.exp_avg_sq, copy, u.gradient)]
            aligned = all(map(is_aligned, ptrs))
            ptrs.insert(3, u.step.data_ptr())
            kind = _Kind(u.parameter.dtype, u.gradient.dtype, None if u.copy is None else u.copy.dtype, aligned)
            groups.setdefault(kind, []).append((u, ptrs))
        for kind, members in groups.items():
            self._step(kind, members, rates, scale, skip)

    def _step(
        self, kind: _Kind, members: list[tuple[Updated, list[int]]], rates: Rates, scale: Tensor, skip: Tensor
    ) -> None:
        tables = self._launches.setdefault(kind, _Launch())
        device, n = scale.device, len(members)
        tables.chunks.divide([u.parameter.numel() for u, _ in members], device)
        *rows, gradients = zip(*(ptrs for _, ptrs in members), strict=True)
        table = tables.table.on(device, [ptr for row in rows for ptr in row])
        rates_N2 = torch.empty(n, 2, dtype=torch.float32, device=device)
        beta1, beta2 = rates.betas
        launch(
            _count_steps_kernel,
            (cdiv(n, _STEPS),),
            table,
            rates_N2,
            skip,
            n,
            float(rates.lr),
            LOG_BETA1=math.log(beta1) if beta1 else -math.inf,
            LOG_BETA2=math.log(beta2) if beta2 else -math.inf,
            BLOCK_N=_STEPS,
        )
        launch(
            _adamw_kernel,
            (tables.chunks.count,),
            table,
            tables.gradients.on(device, list(gradients)),
            tables.chunks.owners_C,
            tables.chunks.extents_2N,
            rates_N2,
            scale,
            skip,
            n,
            float(rates.lr * rates.weight_decay),
            float(rates.eps),
            ONE_MINUS_BETA1=1 - beta1,
            ONE_MINUS_BETA2=1 - beta2,
            P=TL_DTYPES[kind.parameter],
            G=TL_DTYPES[kind.gradient],
            C=TL_DTYPES[kind.copy or kind.parameter],
            COPIES=kind.copy is not None,
            ALIGNED=kind.aligned,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
