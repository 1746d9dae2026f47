"""Cross entropy of a linear layer's outputs, which never holds all of them.

The logits are computed for a chunk of tokens at a time. A kernel turns the chunk into its losses and, in place, into
the gradient of the logits, from which two products make the gradients of the layer's input and weight. What stays for
the backward are these two gradients.

Letters: T tokens, D width of the input, V classes (of this rank), C tokens of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels import gpu
from momoe_titan.kernels.launch import cdiv, launch, on_its_device

IGNORED = -100  # the label of a token without a loss, as in torch
_IGNORED = tl.constexpr(IGNORED)
_BLOCK, _WARPS = 8192, 8  # measured on an H200 for 32,768 and 151,936 classes
_FIRST_PART = 1 << 20  # elements whose multiplication in place takes a copy
_EVEN_ROWS = 128  # the matrix products work on tiles of so many tokens


@dataclass(frozen=True)
class Shard:
    """Which of the classes this rank has, where ranks share them.

    Attributes:
        first: the first of them.
        num_classes: of all ranks together.
        gather: (2, C) of each rank -> (ranks, 2, C) on every rank.
    """

    first: int
    num_classes: int
    gather: Callable[[Tensor], Tensor]


# The place of a chunk and the number of tokens must not compile anything.
@triton.jit(do_not_specialize=["labels_ptr", "stats_ptr", "stats_stride"])
def _cross_entropy_kernel(
    logits_ptr,
    stride,
    labels_ptr,
    stats_ptr,
    stats_stride,
    first,
    num_cols,
    num_classes,
    FINDS: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (C). A program owns one row of logits (C, V).

    FINDS: stats (2, C) float32 = logsumexp of the row, logit of its label (0 where another rank has the label's column,
    NaN where no rank has). WRITES: the row becomes its gradient, softmax - one-hot label, by the logsumexp in stats.
    The gradient of an ignored token is 0, that of a token whose label does not exist NaN.
    """
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * stride
    label = tl.load(labels_ptr + row)
    ignored = label == _IGNORED
    exists = ignored | ((label >= 0) & (label < num_classes))
    column = (label - first).to(tl.int32)
    if FINDS:
        # Before the loop: its reductions keep any warp from overwriting what another one still has to read.
        here = (column >= 0) & (column < num_cols)
        logit = tl.load(logits_ptr + column, mask=here, other=0.0).to(tl.float32)
        logit = tl.where(exists, logit, float("nan"))
        top = float("-inf")
        total = 0.0
        for start in range(0, num_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + cols, mask=cols < num_cols, other=float("-inf")).to(tl.float32)
            above = tl.maximum(top, tl.max(x, axis=0))
            base = tl.where(above == float("-inf"), 0.0, above)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=0)
            top = above
        base = tl.where(top == float("-inf"), 0.0, top)
        logsumexp = base + tl.log(total)
        tl.store(stats_ptr + row, logsumexp)
        tl.store(stats_ptr + stats_stride + row, logit)
    else:
        logsumexp = tl.load(stats_ptr + row)
    if WRITES:
        factor = tl.where(exists, 1.0, float("nan"))
        for start in range(0, num_cols, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            live = cols < num_cols
            x = tl.load(logits_ptr + cols, mask=live, other=0.0).to(tl.float32)
            gradient = (tl.exp(x - logsumexp) - tl.where(cols == column, 1.0, 0.0)) * factor
            gradient = tl.where(ignored, 0.0, gradient)
            tl.store(logits_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=live)


@on_its_device
def _run_kernel(logits_CV: Tensor, labels_C: Tensor, stats_2C: Tensor, shard: Shard | None, finds: bool, writes: bool):
    num_rows, num_cols = logits_CV.shape
    launch(
        _cross_entropy_kernel,
        (num_rows,),
        logits_CV,
        logits_CV.stride(0),
        labels_C,
        stats_2C,
        stats_2C.stride(0),
        0 if shard is None else shard.first,
        num_cols,
        num_cols if shard is None else shard.num_classes,
        FINDS=finds,
        WRITES=writes,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )


def _run_reference(
    logits_CV: Tensor, labels_C: Tensor, stats_2C: Tensor, shard: Shard | None, finds: bool, writes: bool
) -> None:
    """What the kernel does, by torch, with a copy of the logits in float32."""
    num_cols = logits_CV.shape[1]
    first, num_classes = (0, num_cols) if shard is None else (shard.first, shard.num_classes)
    exists_C = (labels_C == IGNORED) | ((labels_C >= 0) & (labels_C < num_classes))
    column_C = labels_C - first
    here_C = (column_C >= 0) & (column_C < num_cols)
    x_CV = logits_CV.float()
    if finds:
        stats_2C[0] = x_CV.logsumexp(dim=1)
        logit_C = x_CV.gather(1, column_C.where(here_C, 0)[:, None])[:, 0] if num_cols else x_CV.new_zeros(len(x_CV))
        stats_2C[1] = logit_C.where(here_C, 0.0).where(exists_C, float("nan"))
    if writes:
        gradient_CV = (x_CV - stats_2C[0, :, None]).exp_()
        if num_cols:
            gradient_CV.scatter_add_(1, column_C.where(here_C, 0)[:, None], -here_C[:, None].float())
        gradient_CV.masked_fill_(~exists_C[:, None], float("nan"))
        logits_CV.copy_(gradient_CV.masked_fill_((labels_C == IGNORED)[:, None], 0.0))


def _entropy_of_chunk(logits_CV: Tensor, labels_C: Tensor, stats_2C: Tensor, shard: Shard | None, writes: bool) -> None:
    """Fill stats as the kernel does, over all ranks' classes, and turn the logits into their gradient if `writes`."""
    run = _run_kernel if gpu.has_gpu(logits_CV.device) and not gpu.interpreting() else _run_reference
    if shard is None:
        run(logits_CV, labels_C, stats_2C, None, True, writes)
        return
    run(logits_CV, labels_C, stats_2C, shard, True, False)
    all_R2C = shard.gather(stats_2C.contiguous())
    stats_2C[0] = all_R2C[:, 0].logsumexp(dim=0)
    stats_2C[1] = all_R2C[:, 1].sum(dim=0)
    if writes:
        run(logits_CV, labels_C, stats_2C, shard, False, True)


def rows_of_chunk(num_tokens: int, row_bytes: int, chunk_bytes: int) -> int:
    """Tokens of a chunk: as many as `chunk_bytes` hold, or fewer if that makes the chunks equal; 1 at least."""
    most = max(chunk_bytes // max(row_bytes, 1), 1)
    even = _EVEN_ROWS if most >= _EVEN_ROWS else 1
    most -= most % even
    rows = cdiv(num_tokens, max(cdiv(num_tokens, most), 1))
    return max(even * cdiv(rows, even), 1)


def _add_product(sum_VD: Tensor, a_CV: Tensor, b_CD: Tensor, is_first: bool) -> None:
    """sum += a^T b in float32, or sum = a^T b for the first one."""
    beta = 0.0 if is_first else 1.0
    if gpu.planned() is not None and a_CV.dtype != torch.float32:
        # On fake tensors torch 2.11 has no product with another dtype of the result: any of this work and memory.
        torch.mm(a_CV.t(), b_CD, out=sum_VD.view(a_CV.dtype)[:, : sum_VD.shape[1]])
    elif gpu.has_gpu(sum_VD.device) and a_CV.dtype != torch.float32:
        torch.addmm(sum_VD, a_CV.t(), b_CD, out_dtype=torch.float32, beta=beta, out=sum_VD)  # pyright: ignore[reportCallIssue] - the stubs lack out_dtype with out
    else:
        torch.addmm(sum_VD, a_CV.float().t(), b_CD.float(), beta=beta, out=sum_VD)


def _by_chunks(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, chunk_bytes: int, shard: Shard | None, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum of the losses, and its gradients by x and by the weight (float32) where they are wanted."""
    num_tokens, num_cols = x_TD.shape[0], weight_VD.shape[0]
    rows = rows_of_chunk(num_tokens, num_cols * x_TD.element_size(), chunk_bytes)
    stats_2T = x_TD.new_empty(2, num_tokens, dtype=torch.float32)
    dx_TD = torch.empty_like(x_TD) if wanted[0] else None
    dweight_VD = None
    if wanted[1]:
        new = torch.empty_like if num_tokens else torch.zeros_like
        dweight_VD = new(weight_VD, dtype=torch.float32)
    buffer_CV = x_TD.new_empty(min(rows, num_tokens), num_cols)
    for start in range(0, num_tokens, rows):
        chunk = slice(start, start + rows)
        x_CD = x_TD[chunk]
        logits_CV = buffer_CV[: x_CD.shape[0]]
        torch.mm(x_CD, weight_VD.t(), out=logits_CV)
        _entropy_of_chunk(logits_CV, labels_T[chunk], stats_2T[:, chunk], shard, any(wanted))
        if dx_TD is not None:
            torch.mm(logits_CV, weight_VD, out=dx_TD[chunk])
        if dweight_VD is not None:
            _add_product(dweight_VD, logits_CV, x_CD, is_first=start == 0)
    loss = (stats_2T[0] - stats_2T[1]).masked_fill_(labels_T == IGNORED, 0.0).sum()
    return loss, dx_TD, dweight_VD


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward, and multiplies them in the backward."""

    @staticmethod
    def forward(ctx, x_TD, weight_VD, labels_T, dtype, chunk_bytes, shard):
        wanted = ctx.needs_input_grad[:2]
        ctx.dtypes = x_TD.dtype, weight_VD.dtype
        x_TD, weight_VD = x_TD.to(dtype), weight_VD.to(dtype)
        loss, *ctx.gradients = _by_chunks(x_TD, weight_VD, labels_T, chunk_bytes, shard, wanted)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        if ctx.gradients is None:
            raise RuntimeError(
                "the backward of linear_cross_entropy ran for the second time; retain_graph=True keeps its gradients"
            )
        gradients, in_place = ctx.gradients, not torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue] - not in stubs
        if in_place:
            ctx.gradients = None  # so that autograd may keep them as they are
        multiply = _multiply_in_place if in_place else _multiply
        scaled = [None if g is None else multiply(g, dloss, d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return *scaled, None, None, None, None


def _multiply(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (t * factor).to(dtype)


def _multiply_in_place(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """t * factor in this dtype, in the memory of t if it is not too small: a copy would be at the step's peak."""
    if dtype.itemsize >= t.element_size() or not t.is_contiguous():
        return t.mul_(factor).to(dtype)
    wide, narrow = t.view(-1), t.view(dtype).view(-1)[: t.numel()]
    done, end = 0, min(_FIRST_PART, t.numel())
    while done < t.numel():
        # From the second part on, what is written has been read before: it ends below where the part begins.
        part = wide[done:end] if done else wide[:end].clone()
        torch.mul(part, factor, out=narrow[done:end])
        done, end = end, min(2 * end, t.numel())
    return narrow.view(t.shape)


def _compute(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, dtype: torch.dtype, chunk_bytes: int, shard: Shard | None
) -> Tensor:
    with torch.autocast(x_TD.device.type, enabled=False):
        if torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad):
            return _LinearCrossEntropy.apply(x_TD, weight_VD, labels_T, dtype, chunk_bytes, shard)
        x_TD, weight_VD = x_TD.to(dtype), weight_VD.to(dtype)
        return _by_chunks(x_TD, weight_VD, labels_T, chunk_bytes, shard, (False, False))[0]


# A compiled caller's graph breaks here: a loop over chunks would be traced for each number of tokens.
_uncompiled: Any = torch.compiler.disable(_compute)


def linear_cross_entropy(
    x_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    dtype: torch.dtype | None = None,
    chunk_bytes: int = 384 << 20,
    shard: Shard | None = None,
) -> Tensor:
    """The sum of the tokens' cross entropies between `x_TD @ weight_VD.T` and the labels, a 0-dimensional float32.

    As `F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")`, but with logits for a few tokens at a
    time. Gradients are computed in the forward, that of the weight summed in float32 over all chunks; the backward
    multiplies them by the gradient that comes in. Beyond inputs and gradients it takes `chunk_bytes` of memory.

    Args:
        x_TD, weight_VD: floating-point.
        labels_T: int64; -100 for tokens without a loss. One that is no class makes the loss NaN, its gradient too.
        dtype: of the products; None for that of the weight. Losses are computed in float32.
        chunk_bytes: how much memory the logits of a chunk may take; a chunk has at least one token.
        shard: where ranks share the classes, this rank's part. The result is the whole loss on every rank; of x's
            gradient each rank has a part of a sum, of the weight's its rows.
    """
    dtype = weight_VD.dtype if dtype is None else dtype
    return _uncompiled(x_TD, weight_VD, labels_T.contiguous(), dtype, chunk_bytes, shard)
