"""The router's kernels for the GPU: logits in float32, the K best experts of each token, and the gradients of both.

Other devices take the plain torch code in `momoe_titan/moe/router.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels import gpu
from momoe_titan.kernels.launch import cdiv, launch, next_power_of_2, on_its_device

_BLOCK = 2048  # logits that one program of 4 warps holds
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
SOFTMAX_OF_CHOSEN = tl.constexpr(2)
_SCORE_FUNCS = {"softmax": SOFTMAX, "sigmoid": SIGMOID, "softmax_of_chosen": SOFTMAX_OF_CHOSEN}

_lib = torch.library.Library("momoe_titan", "FRAGMENT")
_lib.define(
    "route(Tensor logits, Tensor? bias, int top_k, str score_func, bool normalize, float scale)"
    " -> (Tensor scores, Tensor ids)"
)
_lib.define(
    "route_backward(Tensor dscores, Tensor logits, Tensor ids, str score_func, bool normalize, float scale)"
    " -> Tensor dlogits"
)
_lib.define("bfloat16_parts(Tensor t, bool by_rows) -> Tensor")


def runs_here(t: Tensor) -> bool:
    """Whether the kernels of this file can run on t, or on a tensor like it."""
    return gpu.has_gpu(t.device) and not gpu.interpreting()


@triton.jit
def _softmax(logits, live):
    """Softmax along a row over the logits whose mask `live` is true; a NaN makes its whole row NaN."""
    lowest = tl.where(live, logits, float("-inf"))
    shifted = lowest - tl.max(lowest, axis=1)[:, None]
    exps = tl.where(live, tl.exp(shifted), 0.0)
    return exps / tl.sum(exps, axis=1)[:, None]


@triton.jit
def _load_logits(logits_ptr, stride, tokens, num_tokens, cols, E: tl.constexpr):
    ptrs = logits_ptr + tokens.to(tl.int64)[:, None] * stride + cols[None, :]
    return tl.load(ptrs, mask=(tokens < num_tokens)[:, None] & (cols < E)[None, :], other=0.0)


@triton.jit
def _clamp(logits):
    """Infinities become the largest finite numbers; NaN stays."""
    finite = tl.minimum(tl.maximum(logits, -_LARGEST), _LARGEST)
    return tl.where(logits == logits, finite, logits)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr,
    stride,
    bias_ptr,
    scores_ptr,
    ids_ptr,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    FUNC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIASED: tl.constexpr,
    E_POW2: tl.constexpr,
    K_POW2: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T),). A program owns BLOCK_T tokens and all their logits.

    K rounds of max over 64-bit keys. High 32 bits: the value as an ordered integer. Low 32 bits:
    E_POW2 - 1 - id, so that the lowest id wins a tie. scores (T, K) float32, ids (T, K) int64.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, E_POW2)
    ks = tl.arange(0, K_POW2)
    live = (cols < E)[None, :]
    logits = _clamp(_load_logits(logits_ptr, stride, tokens, num_tokens, cols, E))
    if FUNC == SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        scores = _softmax(logits, live)
    choice = scores
    if BIASED:
        choice += tl.load(bias_ptr + cols, mask=cols < E, other=0.0)[None, :]
    # Reinterpreted as int32, negative floats sort in reverse: flip their lower 31 bits to restore the order.
    bits = (choice + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    if FUNC == SOFTMAX_OF_CHOSEN:
        order = tl.where(choice == choice, order, -0x7F800001)  # NaN as -inf
        scores = logits
    else:
        order = tl.where(choice == choice, order, 0x7FFFFFFF)  # NaN first
    taken: tl.constexpr = -(2**63)
    key = tl.where(live, (order.to(tl.int64) << 32) + (E_POW2 - 1 - cols)[None, :], taken)
    ids = tl.full((BLOCK_T, K_POW2), E_POW2, tl.int32)
    chosen = tl.zeros((BLOCK_T, K_POW2), tl.float32)
    for k in range(K):
        best = tl.max(key, axis=1)
        found = key == best[:, None]
        expert = E_POW2 - 1 - (best & 0xFFFFFFFF).to(tl.int32)
        score = tl.sum(tl.where(found, scores, 0.0), axis=1)
        here = (ks == k)[None, :]
        ids = tl.where(here, expert[:, None], ids)
        chosen = tl.where(here, score[:, None], chosen)
        key = tl.where(found, taken, key)
    place = ks[None, :] + tl.zeros((BLOCK_T, K_POW2), tl.int32)
    if FUNC == SOFTMAX_OF_CHOSEN:
        chosen = _softmax(chosen, (ks < K)[None, :])
        place = tl.sum((ids[:, :, None] > ids[:, None, :]).to(tl.int32), axis=2)  # by rising id
    if NORMALIZE:
        chosen = chosen / (tl.sum(chosen, axis=1) + 1e-20)[:, None]
    out = tokens.to(tl.int64)[:, None] * K + place
    mask = (tokens < num_tokens)[:, None] & (ks < K)[None, :]
    tl.store(scores_ptr + out, chosen * scale, mask=mask)
    tl.store(ids_ptr + out, ids.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_backward_kernel(
    dscores_ptr,
    logits_ptr,
    stride,
    ids_ptr,
    dlogits_ptr,
    num_tokens,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    FUNC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (cdiv(T, BLOCK_T),). dlogits (T, E) float32, contiguous, of the scores that _route_kernel gives."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tokens < num_tokens
    cols = tl.arange(0, E_POW2)
    live = (cols < E)[None, :]
    raw = _load_logits(logits_ptr, stride, tokens, num_tokens, cols, E)
    logits = _clamp(raw)
    grad = tl.zeros((BLOCK_T, E_POW2), tl.float32)
    is_chosen = tl.zeros((BLOCK_T, E_POW2), tl.int32)
    for k in range(K):
        where = tokens.to(tl.int64) * K + k
        expert = tl.load(ids_ptr + where, mask=rows, other=0).to(tl.int32)
        given = tl.load(dscores_ptr + where, mask=rows, other=0.0).to(tl.float32)
        found = cols[None, :] == expert[:, None]
        grad = tl.where(found, given[:, None], grad)
        is_chosen = tl.where(found, 1, is_chosen)
    chosen = is_chosen != 0
    grad *= scale
    if FUNC == SIGMOID:
        scores = tl.sigmoid(logits)
    elif FUNC == SOFTMAX:
        scores = _softmax(logits, live)
    else:
        scores = _softmax(logits, chosen)
    if NORMALIZE:
        total = tl.sum(tl.where(chosen, scores, 0.0), axis=1) + 1e-20
        dot = tl.sum(tl.where(chosen, grad * scores, 0.0), axis=1)
        grad = tl.where(chosen, (grad - (dot / total)[:, None]) / total[:, None], 0.0)
    if FUNC == SIGMOID:
        dlogits = tl.where(chosen, grad * scores * (1.0 - scores), 0.0)
    else:
        dot = tl.sum(tl.where(chosen, grad * scores, 0.0), axis=1)
        dlogits = scores * (grad - dot[:, None])
    dlogits = tl.where(tl.abs(raw) <= _LARGEST, dlogits, 0.0)  # the clamp's; false for NaN
    out = tokens.to(tl.int64)[:, None] * E + cols[None, :]
    tl.store(dlogits_ptr + out, dlogits, mask=rows[:, None] & live)


def _options(num_experts: int, top_k: int) -> dict[str, int]:
    e_pow2 = max(2, next_power_of_2(num_experts))
    block_t = max(1, _BLOCK // max(e_pow2, next_power_of_2(top_k) ** 2))
    return {"E": num_experts, "K": top_k, "E_POW2": e_pow2, "BLOCK_T": block_t, "num_warps": 4}


def _route(logits_TE, bias_E, top_k, score_func, normalize, scale):
    num_tokens, num_experts = logits_TE.shape
    scores_TK = logits_TE.new_empty(num_tokens, top_k)
    ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    options = _options(num_experts, top_k)
    launch(
        _route_kernel,
        (cdiv(num_tokens, options["BLOCK_T"]),),
        logits_TE,
        logits_TE.stride(0),
        bias_E if bias_E is not None else logits_TE,
        scores_TK,
        ids_TK,
        num_tokens,
        scale,
        FUNC=_SCORE_FUNCS[score_func].value,
        NORMALIZE=normalize,
        BIASED=bias_E is not None,
        K_POW2=next_power_of_2(top_k),
        **options,
    )
    return scores_TK, ids_TK


def _route_backward(dscores_TK, logits_TE, ids_TK, score_func, normalize, scale):
    num_tokens, num_experts = logits_TE.shape
    dlogits_TE = logits_TE.new_empty(num_tokens, num_experts)
    options = _options(num_experts, ids_TK.shape[1])
    launch(
        _route_backward_kernel,
        (cdiv(num_tokens, options["BLOCK_T"]),),
        dscores_TK.contiguous(),
        logits_TE,
        logits_TE.stride(0),
        ids_TK,
        dlogits_TE,
        num_tokens,
        scale,
        FUNC=_SCORE_FUNCS[score_func].value,
        NORMALIZE=normalize,
        **options,
    )
    return dlogits_TE


_lib.impl("route", on_its_device(_route), "CompositeExplicitAutograd")
_lib.impl("route_backward", on_its_device(_route_backward), "CompositeExplicitAutograd")


@torch.library.register_fake("momoe_titan::route", lib=_lib)
def _route_fake(logits_TE, bias_E, top_k, score_func, normalize, scale):
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape), logits_TE.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("momoe_titan::route_backward", lib=_lib)
def _route_backward_fake(dscores_TK, logits_TE, ids_TK, score_func, normalize, scale):
    return logits_TE.new_empty(logits_TE.shape)


def _setup_context(ctx, inputs, output):
    logits_TE, _, _, *ctx.how = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits_TE, output[1])


def _autograd_backward(ctx, dscores_TK, _):
    dlogits_TE = torch.ops.momoe_titan.route_backward(dscores_TK, *ctx.saved_tensors, *ctx.how)
    return dlogits_TE, None, None, None, None, None


torch.library.register_autograd("momoe_titan::route", _autograd_backward, setup_context=_setup_context, lib=_lib)


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    score_func: str,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Chooses K experts per token; differentiable in the logits.

    Experts are chosen by score plus bias; among equals the lowest id wins. Infinite logits count as
    the largest finite ones.

    Args:
        logits_TE: float32, contiguous rows.
        bias_E: float32, or None; it steers the choice and is not part of the scores.
        top_k: K, at most E.
        score_func: "softmax" or "sigmoid" of the logits, in falling order of score plus bias, NaN
            first; or "softmax_of_chosen": chosen by their softmax over all, NaN last, scored by
            their softmax among each other, in rising order of the ids.
        normalize: divide by a token's sum of chosen scores (plus 1e-20).
        scale: the scores are multiplied by it at the end.

    Returns:
        scores_TK float32 and ids_TK int64.
    """
    return torch.ops.momoe_titan.route(logits_TE, bias_E, top_k, score_func, normalize, float(scale))


@triton.jit(do_not_specialize=["num_rows"])
def _parts_kernel(
    in_ptr,
    row_stride,
    col_stride,
    out_ptr,
    num_rows,
    COLS: tl.constexpr,
    BY_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Grid (cdiv(rows, BLOCK_R), cdiv(COLS, BLOCK_C)). See bfloat16_parts."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < num_rows)[:, None] & (cols < COLS)[None, :]
    rest = tl.load(in_ptr + rows[:, None] * row_stride + cols[None, :] * col_stride, mask=mask, other=0.0)
    out = out_ptr + rows[:, None] * (COLS if BY_ROWS else 4 * COLS) + cols[None, :]
    step = num_rows.to(tl.int64) * COLS if BY_ROWS else COLS
    high = rest.to(tl.bfloat16)
    rest -= high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    rest -= middle.to(tl.float32)
    tl.store(out, high, mask=mask)
    tl.store(out + step, middle, mask=mask)
    tl.store(out + 2 * step, high, mask=mask)
    tl.store(out + 3 * step, rest.to(tl.bfloat16), mask=mask)


def _bfloat16_parts(t, by_rows):
    rows, cols = t.shape
    out = t.new_empty((4 * rows, cols) if by_rows else (rows, 4 * cols), dtype=torch.bfloat16)
    block_c = min(next_power_of_2(cols), 256)
    block_r = _BLOCK // block_c
    launch(
        _parts_kernel,
        (cdiv(rows, block_r), cdiv(cols, block_c)),
        t,
        *t.stride(),
        out,
        rows,
        COLS=cols,
        BY_ROWS=by_rows,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


_lib.impl("bfloat16_parts", on_its_device(_bfloat16_parts), "CompositeExplicitAutograd")


@torch.library.register_fake("momoe_titan::bfloat16_parts", lib=_lib)
def _bfloat16_parts_fake(t, by_rows):
    rows, cols = t.shape
    return t.new_empty((4 * rows, cols) if by_rows else (rows, 4 * cols), dtype=torch.bfloat16)


def bfloat16_parts(t: Tensor, by_rows: bool) -> Tensor:
    """Splits a float32 matrix into bfloat16 parts whose sum it is exactly; products of parts are exact in float32.

    The result has four blocks, one below the other if by_rows, else side by side: high, middle, high, low. High is
    stored twice so that either triple is contiguous. Blocks 0 to 2 give the product of two split matrices without its
    smallest terms; blocks 1 to 3 add up to the exact matrix.
    """
    return torch.ops.momoe_titan.bfloat16_parts(t, by_rows)


class _TensorCoreProduct(torch.autograd.Function):
    """x @ w.T of a bfloat16 x, in float32, on bfloat16 tensor cores."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        num_experts = w_ED.shape[0]
        ctx.dtype = w_ED.dtype
        if w_ED.dtype == torch.bfloat16:
            ctx.save_for_backward(x_TD, w_ED)
            return torch.mm(x_TD, w_ED.t(), out_dtype=torch.float32)
        parts = bfloat16_parts(w_ED, True)
        ctx.save_for_backward(x_TD, parts)
        by_part = torch.mm(x_TD, parts[num_experts:].t(), out_dtype=torch.float32)  # middle, high, low
        return by_part.view(-1, 3, num_experts).sum(dim=1)

    @staticmethod
    def backward(ctx, dout_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, w = ctx.saved_tensors
        num_experts = dout_TE.shape[1]
        parts = bfloat16_parts(dout_TE.contiguous(), False)
        if ctx.dtype == torch.bfloat16:
            dx_TD = torch.mm(parts[:, : 2 * num_experts], torch.cat([w, w]))
        else:
            # high * high + middle * high + high * middle; the other terms are far below the rounding of dx to bfloat16
            high, middle = w[:num_experts], w[num_experts : 2 * num_experts]
            dx_TD = torch.mm(parts[:, : 3 * num_experts], torch.cat([high, high, middle]))
        dw = torch.mm(parts[:, num_experts:].t(), x_TD, out_dtype=torch.float32)
        return dx_TD, dw.view(3, num_experts, -1).sum(dim=0).to(ctx.dtype)


class _Float32Product(torch.autograd.Function):
    """x @ w.T in float32, keeping x and w for the backward in the dtype they came in: autograd
    would keep float32 copies, twice the memory of a bfloat16 x."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_ED)
        return x_TD.float() @ w_ED.float().t()

    @staticmethod
    def backward(ctx, dout_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, w_ED = ctx.saved_tensors
        with torch.autocast(x_TD.device.type, enabled=False):
            dx_TD = dout_TE @ w_ED.float()
            dw_ED = dout_TE.t() @ x_TD.float()
        return dx_TD.to(x_TD.dtype), dw_ED.to(w_ED.dtype)


def float32_product(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x @ w.T in float32, whatever the dtypes of x and w, also under autocast; (T, E) float32.

    Exact products, summed in float32; the gradient of x is rounded to its dtype. A bfloat16 x on a
    GPU is multiplied on tensor cores; where it is infinite, the result is NaN there.
    """
    # Tensors are plain while torch.compile traces too. The fake ones of a plan are not, and stand for plain ones.
    plain = type(x_TD) in (Tensor, torch.nn.Parameter) and type(w_ED) in (Tensor, torch.nn.Parameter)
    tensor_cores = (
        (plain or gpu.planned() is not None)
        and runs_here(x_TD)
        and x_TD.dtype == torch.bfloat16
        and w_ED.dtype in (torch.bfloat16, torch.float32)
    )
    with torch.autocast(x_TD.device.type, enabled=False):
        return (_TensorCoreProduct if tensor_cores else _Float32Product).apply(x_TD, w_ED)
