"""Adds in float32 what ranks have sent in a narrower dtype: reads every element once, and writes every sum once."""

# Inside @triton.jit functions Triton evaluates constants and tuples itself; its stubs do not say so.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels.launch import cdiv, launch, on_its_device, only_plans
from momoe_titan.kernels.multi_tensor import plan_traffic, runs_here

_BLOCK = 4096  # sums of a program of 8 warps: 2 x 16 bytes of bfloat16 a thread and part


@triton.jit
def _sum_parts_kernel(
    out_ptr, parts_ptr, own_ptr, num_sums, PARTS: tl.constexpr, OWN: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (cdiv(num_sums, BLOCK),). out = the sum over the parts, in their order; part OWN is in own."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    ptrs = parts_ptr + offs
    own_ptrs = own_ptr + offs
    # Two branches: a mask would keep Triton from wide accesses.
    if first + BLOCK <= num_sums:
        acc = tl.load(own_ptrs if OWN == 0 else ptrs).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            ptrs += num_sums  # a product of both may be beyond 32 bits
            acc += tl.load(own_ptrs if part == OWN else ptrs).to(tl.float32)
        tl.store(out_ptr + offs, acc)
    else:
        mask = offs < num_sums
        acc = tl.load(own_ptrs if OWN == 0 else ptrs, mask=mask, other=0.0).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            ptrs += num_sums
            acc += tl.load(own_ptrs if part == OWN else ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offs, acc, mask=mask)


@on_its_device
def sum_parts(out_N: Tensor, parts_PN: Tensor, own: tuple[int, Tensor] | None = None) -> None:
    """out_N = parts_PN.sum(0) in float32, summed in order.

    Args:
        out_N: float32, contiguous.
        parts_PN: of any floating-point dtype, contiguous.
        own: the index of a part, and (N,) of the same dtype, contiguous, that is read in its place.
    """
    num_parts, num_sums = parts_PN.shape
    index, own_N = (-1, parts_PN[0]) if own is None else own
    if not runs_here(out_N):
        if own is not None:
            parts_PN[index].copy_(own_N)
        torch.sum(parts_PN, dim=0, dtype=torch.float32, out=out_N)
        return
    if only_plans():
        plan_traffic([parts_PN], [out_N])
        return
    grid = (cdiv(num_sums, _BLOCK),)
    constants = {"PARTS": num_parts, "OWN": index, "BLOCK": _BLOCK}
    launch(_sum_parts_kernel, grid, out_N, parts_PN, own_N, num_sums, **constants, num_warps=8)
