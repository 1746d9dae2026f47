"""Decoding: the forward for up to 16 tokens without gradients, limited by reading the experts' weights once.

Three launches (up, down, sum), and no sorting: a row keeps the number of its slot, ``t * K + k``. Programs find the
rows of their expert among all slots by themselves, own a stripe of its columns and stream it through shared memory.
Plain Triton.

One token of SwiGLU experts so small that all programs run at once takes two launches. The first does both up and
down: a program owns some hidden columns, and multiplies its part of act by its rows of w2 as soon as it has it, so
that no program waits for all of act. The second sums the parts of y.

On Hopper a launch overlaps the end of the one before it (programmatic dependent launch). The first launch waits
for all earlier work, so that this work is done when the others start. The others find their expert before they wait,
and with few slots load its first weights. Before their wait they read only ids, scores and weights, which none of
these kernels writes, and write only the counts, which none of them reads.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tl_cuda

from momoe_titan.kernels import gpu
from momoe_titan.kernels.activations import gated
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.launch import cdiv, launch, next_power_of_2
from momoe_titan.kernels.portable.blocks import dot, load_block
from momoe_titan.kernels.portable.up_proj import z_options
from momoe_titan.kernels.routing import _load_ids

MAX_TOKENS = 16  # above this, the kernels for many tokens come as close to the memory bandwidth, or closer
_MAX_SLOTS = 1024
_BLOCK_M = 16  # rows of a tile: all tokens that an expert can have


@dataclass(frozen=True)
class Stripe:
    """The columns of an expert that a program owns, and how it reads them; split: programs that share a sum."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1

    def options(self, dtype: torch.dtype) -> dict:
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "UPCAST": gpu.interpreting() and dtype == torch.bfloat16,
        }


# (up projection, down projection). On one H100 the fastest of those tried, at every shape and number of tokens.
_HOPPER = Stripe(128, 64, 8, 4), Stripe(128, 64, 4, 5, split=2)
_ANY = Stripe(64, 64, 4, 4), Stripe(64, 64, 4, 6)  # 99 KiB of shared memory suffice
_FUSED = Stripe(64, 64, 4, 6)  # the launch that computes both projections
_SUMMED_COLS, _SUMMED_PARTS = 32, 128  # the sum after it: columns of a program, and parts added per step


def stripes(device: torch.device) -> tuple[Stripe, Stripe]:
    """Stripes of the up projection and of the down projection."""
    if gpu.interpreting() or gpu.device_properties(device)[0] == (9, 0):
        return _HOPPER
    return _ANY


def supported(dtype: torch.dtype, num_tokens: int, num_chosen: int) -> bool:
    """Whether there are few enough tokens; float32 keeps to the kernels that are exact to its last digits."""
    return 0 < num_tokens <= MAX_TOKENS and num_tokens * num_chosen <= _MAX_SLOTS and dtype != torch.float32


@triton.jit
def _ids_and_expert(ids_ptr, group, num_slots, by_slot, E: tl.constexpr, SLOTS: tl.constexpr, CACHE: tl.constexpr):
    """Ids of all slots, and the expert of a group of rows: that of slot `group`, -1 if none, or expert `group`."""
    ids = _load_ids(ids_ptr, tl.arange(0, SLOTS), num_slots, E, CACHE)
    expert = group
    if by_slot:
        expert = _load_ids(ids_ptr, group, num_slots, E, CACHE)  # in flight with the ids, before any sum over them
    return ids, expert


@triton.jit
def _rows_of_group(ids, expert, group, by_slot, SLOTS: tl.constexpr):
    """How many rows the group has: all of its expert, or none if it goes by slots and one before names the expert."""
    mine = (ids == expert) & (expert >= 0)
    count = tl.sum(mine.to(tl.int32))
    if by_slot:
        before = mine & (tl.arange(0, SLOTS) < group)
        count = tl.where(tl.sum(before.to(tl.int32)) > 0, 0, count)
    return count


@triton.jit
def _ask_for(ptr, stride, row, col, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Prefetches a block of a matrix of 16-bit elements into L2, by lines of 128 bytes.

    Of what is outside the matrix its edge is fetched instead.
    """
    r = tl.minimum(row + tl.arange(0, BLOCK_ROWS), rows - 1)
    c = tl.minimum(col + 64 * tl.arange(0, BLOCK_COLS // 64), cols - 1)
    ptrs = (ptr + r[:, None] * stride + c[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _slots_of_rows(ids_ptr, expert, first, num_slots, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """Slots of the expert's rows first to first + BLOCK_M; num_slots where there is no such row."""
    CHUNK: tl.constexpr = 64  # pyright: ignore[reportAssignmentType] - jit
    rows = first + tl.arange(0, BLOCK_M)
    found = tl.zeros((BLOCK_M,), tl.int32)
    seen = tl.zeros((), tl.int32)
    for start in range(0, num_slots, CHUNK):
        slots = start + tl.arange(0, CHUNK)
        mine = (_load_ids(ids_ptr, slots, num_slots, E, "") == expert).to(tl.int32)
        rank = seen + tl.cumsum(mine, 0) - mine
        is_row = (mine != 0)[None, :] & (rank[None, :] == rows[:, None])
        found += tl.sum(tl.where(is_row, slots[None, :] - num_slots, 0), axis=1)
        seen += tl.sum(mine)
    return found + num_slots


@triton.jit
def _fused_kernel(
    x_ptr,
    w1_ptr,
    w2_ptr,
    y_ptr,
    ids_ptr,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    UP: tl.constexpr,
    GATE: tl.constexpr,
    W1_E: tl.constexpr,
    W1_D: tl.constexpr,
    W1_F: tl.constexpr,
    W1_Z: tl.constexpr,
    W2_E: tl.constexpr,
    W2_F: tl.constexpr,
    W2_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid (K * cdiv(F, BLOCK_N),). A program owns a slot of the one token, and BLOCK_N hidden columns.

    y (K, cdiv(F, BLOCK_N), D) float32 = act[slot, columns] @ w2[ids[slot]][columns]
    Strides: W1_Z from one column of w1 to the next, W1_F from one of up to the next.
    """
    PARTS: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    UP_STEPS: tl.constexpr = (D + BLOCK_K - 1) // BLOCK_K
    TILE: tl.constexpr = 2 * BLOCK_N  # columns of w1, up and gate, and of w2 a step
    EVEN_N: tl.constexpr = F % BLOCK_N == 0
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    if OVERLAPS:
        tl_cuda.gdc_wait()
    expert = _load_ids(ids_ptr, tl.program_id(0) // PARTS, K, E, "")
    if OVERLAPS:
        tl_cuda.gdc_launch_dependents()
    first_col = tl.program_id(0) % PARTS * BLOCK_N
    if expert >= 0:
        w2_ptr += expert.to(tl.int64) * W2_E + first_col * W2_F
        is_token = tl.arange(0, BLOCK_M) == 0
        k = tl.arange(0, BLOCK_K)
        cols = tl.arange(0, TILE)
        hidden = first_col + cols % BLOCK_N
        x_ptrs = x_ptr + tl.zeros((BLOCK_M,), tl.int32)[:, None] + k[None, :]
        w_cols = hidden * W1_F + (UP + cols // BLOCK_N * (GATE - UP)) * W1_Z
        w_ptrs = w1_ptr + expert.to(tl.int64) * W1_E + k[:, None] * W1_D + w_cols[None, :]
        acc = tl.zeros((BLOCK_M, TILE), tl.float32)
        for step in range(0, UP_STEPS):
            k0 = step * BLOCK_K
            x = load_block(x_ptrs + k0, is_token, k0 + k < D, False, EVEN_K)
            w = load_block(w_ptrs, k0 + k < D, hidden < F, EVEN_K, EVEN_N)
            acc = dot(x, w, acc, "tf32", UPCAST)
            w_ptrs += BLOCK_K * W1_D
            if OVERLAPS and W2_D == 1:
                if step == UP_STEPS - 4:  # the first of w2, so that the memory has no pause
                    rows = tl.minimum(F - first_col, BLOCK_N)
                    _ask_for(w2_ptr, W2_F, 0, 0, rows, D, BLOCK_N, TILE)
                    _ask_for(w2_ptr, W2_F, 0, TILE, rows, D, BLOCK_N, TILE)
        up, gate = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N)), (0, 2, 1)))
        act = (up * gate * tl.sigmoid(gate)).to(x_ptr.dtype.element_ty)
        rows = tl.arange(0, BLOCK_N)
        w_ptrs = w2_ptr + rows[:, None] * W2_F + cols[None, :] * W2_D
        y_ptrs = y_ptr + tl.program_id(0) * D + tl.zeros((BLOCK_M,), tl.int32)[:, None] + cols[None, :]
        for d0 in range(0, D, TILE):
            w = load_block(w_ptrs + d0 * W2_D, first_col + rows < F, d0 + cols < D, EVEN_N, D % TILE == 0)
            y = dot(act, w, tl.zeros((BLOCK_M, TILE), tl.float32), "tf32", UPCAST)
            tl.store(y_ptrs + d0, y, mask=is_token[:, None] & (d0 + cols < D)[None, :])


@triton.jit(do_not_specialize=["num_slots", "by_slot"])
def _up_kernel(
    x_ptr,
    w1_ptr,
    gate_ptr,
    bias_ptr,
    scores_ptr,
    act_ptr,
    ids_ptr,
    num_slots,
    by_slot,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    Z: tl.constexpr,
    UP: tl.constexpr,
    GATE: tl.constexpr,
    STEP: tl.constexpr,
    W_E: tl.constexpr,
    W_D: tl.constexpr,
    W_F: tl.constexpr,
    TWO: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    SCORED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid (groups * cdiv(F, BLOCK_N),). act (T * K, F) at slot s = activation(z), z = x[s // K] @ w1[ids[s]].

    z is times score[s] if SCORED, plus bias[ids[s]] if BIASED. The weights are those of portable/up_proj.py.
    """
    NUM_N: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    EVEN_K: tl.constexpr = D % BLOCK_K == 0
    EVEN_N: tl.constexpr = F % BLOCK_N == 0
    if OVERLAPS:
        tl_cuda.gdc_wait()
    group = tl.program_id(0) // NUM_N
    first_col = tl.program_id(0) % NUM_N * BLOCK_N
    ids, expert = _ids_and_expert(ids_ptr, group, num_slots, by_slot, E, SLOTS, "")  # pyright: ignore[reportGeneralTypeIssues] - jit
    w_ptr = w1_ptr + expert.to(tl.int64) * W_E
    if OVERLAPS and W_F == 1 and GATED and not TWO:
        if (by_slot != 0) & (expert >= 0):
            _ask_for(w_ptr, W_D, 0, UP + first_col, D, 2 * F, BLOCK_K, BLOCK_N)
            _ask_for(w_ptr, W_D, 0, GATE + first_col, D, 2 * F, BLOCK_K, BLOCK_N)
    GATE_OFFSET: tl.constexpr = (GATE - UP) * (W_F // STEP)
    if TWO:
        gate_ptr += expert.to(tl.int64) * W_E
    else:
        w_ptr += UP * (W_F // STEP)
    count = _rows_of_group(ids, expert, group, by_slot, SLOTS)
    cols = first_col + tl.arange(0, BLOCK_N)
    col_mask = cols < F
    k = tl.arange(0, BLOCK_K)
    for first in range(0, count, BLOCK_M):  # once, unless tokens name an expert twice
        slots = _slots_of_rows(ids_ptr, expert, first, num_slots, E, BLOCK_M)
        live = slots < num_slots
        token = tl.where(live, slots // K, 0).to(tl.int64)
        x_ptrs = x_ptr + token[:, None] * D + k[None, :]
        w_ptrs = w_ptr + k[:, None] * W_D + cols[None, :] * W_F
        if TWO:
            gate_ptrs = gate_ptr + k[:, None] * W_D + cols[None, :] * W_F
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, D, BLOCK_K):
            x = load_block(x_ptrs, live, k0 + k < D, True, EVEN_K)
            w_up = load_block(w_ptrs, k0 + k < D, col_mask, EVEN_K, EVEN_N)
            if GATED:
                if TWO:
                    w_gate = load_block(gate_ptrs, k0 + k < D, col_mask, EVEN_K, EVEN_N)
                    gate_ptrs += BLOCK_K * W_D
                else:
                    w_gate = load_block(w_ptrs + GATE_OFFSET, k0 + k < D, col_mask, EVEN_K, EVEN_N)
            up = dot(x, w_up, up, "tf32", UPCAST)
            if GATED:
                gate = dot(x, w_gate, gate, "tf32", UPCAST)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * W_D
        if OVERLAPS:  # not before the weights are here: the next launch's would compete with them
            tl_cuda.gdc_launch_dependents()
        if SCORED:
            score = tl.load(scores_ptr + slots, mask=live, other=0.0).to(tl.float32)[:, None]
            up *= score
            gate *= score
        if BIASED:
            bias_ptrs = bias_ptr + expert.to(tl.int64) * Z + cols * STEP
            up += tl.load(bias_ptrs + UP, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            gate += tl.load(bias_ptrs + GATE, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        act = gated(up, gate, ACTIVATION)
        act_ptrs = act_ptr + slots.to(tl.int64)[:, None] * F + cols[None, :]
        tl.store(act_ptrs, act.to(act_ptr.dtype.element_ty), mask=live[:, None] & col_mask[None, :])


@triton.jit(do_not_specialize=["num_slots", "by_slot"])
def _down_kernel(
    act_ptr,
    w2_ptr,
    y_ptr,
    ids_ptr,
    num_slots,
    by_slot,
    D: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    SPLIT: tl.constexpr,
    W_E: tl.constexpr,
    W_F: tl.constexpr,
    W_D: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid (groups * cdiv(D, BLOCK_N) * SPLIT,). A program owns BLOCK_N columns and a part of F, for a group's rows.

    y (SPLIT, T * K, D) float32 at slot s: the part's sum of act[s] @ w2[ids[s]]
    """
    NUM_N: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    PART: tl.constexpr = ((F + BLOCK_K - 1) // BLOCK_K + SPLIT - 1) // SPLIT * BLOCK_K
    EVEN_K: tl.constexpr = F % (PART * SPLIT) == 0
    EVEN_N: tl.constexpr = D % BLOCK_N == 0
    group = tl.program_id(0) // (NUM_N * SPLIT)
    split = tl.program_id(0) // NUM_N % SPLIT
    first_col = tl.program_id(0) % NUM_N * BLOCK_N
    # Before the wait from the L2: the SM's own cache may be older than the ids.
    ids, expert = _ids_and_expert(ids_ptr, group, num_slots, by_slot, E, SLOTS, ".cg")  # pyright: ignore[reportGeneralTypeIssues] - jit
    w_ptr = w2_ptr + expert.to(tl.int64) * W_E
    if OVERLAPS:
        tl_cuda.gdc_launch_dependents()
    if OVERLAPS and W_D == 1:
        if (by_slot != 0) & (expert >= 0):
            _ask_for(w_ptr, W_F, split * PART, first_col, F, D, BLOCK_K, BLOCK_N)
    count = _rows_of_group(ids, expert, group, by_slot, SLOTS)
    cols = first_col + tl.arange(0, BLOCK_N)
    col_mask = cols < D
    k = split * PART + tl.arange(0, BLOCK_K)
    if OVERLAPS:
        tl_cuda.gdc_wait()
    for first in range(0, count, BLOCK_M):
        slots = _slots_of_rows(ids_ptr, expert, first, num_slots, E, BLOCK_M)
        live = slots < num_slots
        rows = slots.to(tl.int64)
        a_ptrs = act_ptr + tl.where(live, rows, 0)[:, None] * F + k[None, :]
        w_ptrs = w_ptr + k[:, None] * W_F + cols[None, :] * W_D
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, PART, BLOCK_K):
            a = load_block(a_ptrs, live, k0 + k < F, False, EVEN_K)
            w = load_block(w_ptrs, k0 + k < F, col_mask, EVEN_K, EVEN_N)
            acc = dot(a, w, acc, "tf32", UPCAST)
            a_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * W_F
        y_ptrs = y_ptr + (split.to(tl.int64) * num_slots + rows)[:, None] * D + cols[None, :]
        tl.store(y_ptrs, acc, mask=live[:, None] & col_mask[None, :])


@triton.jit
def _store_counts(ids_ptr, counts_ptr, num_slots, E: tl.constexpr, SLOTS: tl.constexpr, E_POW2: tl.constexpr):
    ids = _load_ids(ids_ptr, tl.arange(0, SLOTS), num_slots, E, ".cg")
    experts = tl.arange(0, E_POW2)
    counts = tl.histogram(ids, E_POW2, mask=ids >= 0)
    tl.store(counts_ptr + experts, counts.to(tl.int64), mask=experts < E)


@triton.jit
def _sum_parts_kernel(
    y_ptr,
    ids_ptr,
    scores_ptr,
    out_ptr,
    counts_ptr,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    E_POW2: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid (cdiv(D, BLOCK),). One token: out = sum over used slots and parts of score * y, in a fixed order.

    counts (E) int64: how many slots chose each expert.
    """
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        _store_counts(ids_ptr, counts_ptr, K, E, SLOTS, E_POW2)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.static_range(0, K * PARTS, ROWS):
        row = first + tl.arange(0, ROWS)
        # Before the wait from the L2: the SM's own cache may be older than the ids and the scores.
        used = _load_ids(ids_ptr, row // PARTS, K, E, ".cg") >= 0
        score = tl.load(scores_ptr + row // PARTS, mask=used, other=0.0, cache_modifier=".cg").to(tl.float32)
        if OVERLAPS and first == 0:
            tl_cuda.gdc_wait()
        mask = used[:, None] & (cols < D)[None, :]
        acc += score[:, None] * tl.load(
            y_ptr + row[:, None] * D + cols[None, :], mask=mask, other=0.0, cache_modifier=".cg"
        )
    tl.store(out_ptr + cols, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit(do_not_specialize=["num_slots"])
def _sum_kernel(
    y_ptr,
    ids_ptr,
    scores_ptr,
    bias_ptr,
    out_ptr,
    counts_ptr,
    num_slots,
    D: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    SLOTS: tl.constexpr,
    E_POW2: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid (T, cdiv(D, BLOCK)). out[t] = sum over its used slots of score * y, parts and slots in order.

    bias (E, D) of a slot's expert is added to its y if BIASED; scores are left out if not WEIGHTED.
    counts (E) int64: how many slots chose each expert.
    """
    token = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if (token == 0) & (tl.program_id(1) == 0):
        _store_counts(ids_ptr, counts_ptr, num_slots, E, SLOTS, E_POW2)
    if OVERLAPS:
        tl_cuda.gdc_wait()
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        slot = token * K + k
        expert = tl.load(ids_ptr + slot)
        used = (expert >= 0) & (expert < E)
        if WEIGHTED:
            score = tl.load(scores_ptr + slot).to(tl.float32)
        else:
            score = 1.0
        row = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLIT):
            ptrs = y_ptr + (split * num_slots + slot).to(tl.int64) * D + cols
            row += tl.load(ptrs, mask=(cols < D) & (cols < tl.where(used, D, 0)), other=0.0)
        if BIASED:
            ptrs = bias_ptr + tl.where(used, expert, 0).to(tl.int64) * D + cols
            row += tl.load(ptrs, mask=(cols < D) & (cols < tl.where(used, D, 0)), other=0.0).to(tl.float32)
        acc += tl.where(used, score, 0.0) * row
    tl.store(out_ptr + token.to(tl.int64) * D + cols, acc.to(out_ptr.dtype.element_ty), mask=cols < D)


def fuses(device: torch.device, num_tokens: int, num_chosen: int, experts: Experts) -> bool:
    """Whether up and down are one launch: for one token and SwiGLU alone, if all programs run at once on Hopper, or in
    the interpreter.

    With more programs than that there are more parts of y to read, and the memory pauses between two rounds.
    """
    if num_tokens != 1 or experts.gate is not None or not experts.is_swiglu:
        return False
    if gpu.interpreting():
        return True
    is_hopper = gpu.device_properties(device)[0] == (9, 0)
    return is_hopper and num_chosen * cdiv(experts.ffn, _FUSED.block_n) <= gpu.num_processors(device)


def forward(
    x_TD: torch.Tensor, experts: Experts, ids_TK: torch.Tensor, scores_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out_TD and the tokens per expert, int64 (E); see `momoe_mlp`. x, ids and scores contiguous, `supported`."""
    num_tokens, num_chosen = ids_TK.shape
    num_experts, _, d_model = experts.w2.shape
    overlaps = not gpu.interpreting() and gpu.device_properties(x_TD.device)[0] == (9, 0)
    # Constants of all kernels; those of the sums over slots.
    shape = {"D": d_model, "E": num_experts, "OVERLAPS": overlaps, "launch_pdl": overlaps}
    slots = max(64, next_power_of_2(MAX_TOKENS * num_chosen))
    summed = {"K": num_chosen, "SLOTS": slots, "E_POW2": max(2, next_power_of_2(num_experts))}
    out_TD = torch.empty_like(x_TD)
    counts_E = ids_TK.new_empty(num_experts, dtype=torch.int64)
    if fuses(x_TD.device, num_tokens, num_chosen, experts):
        y = _up_and_down_in_one(x_TD, experts, ids_TK, shape)
        _sum_parts(y, ids_TK, scores_TK, out_TD, counts_E, shape | summed)
    else:
        y = _up_then_down(x_TD, experts, ids_TK, scores_TK, slots, shape)
        _sum_slots(y, ids_TK, scores_TK, experts, out_TD, counts_E, shape | summed)
    return out_TD, counts_E


def _strides(name: str, w: torch.Tensor, dims: str, step: int = 1) -> dict[str, int]:
    """Constants with the strides of weights: `name` and a letter for each of their dimensions, the last times step."""
    strides = [*w.stride()[:2], w.stride(2) * step]
    return {f"{name}_{dim}": stride for dim, stride in zip(dims, strides, strict=True)}


def _up_and_down_in_one(x_TD, experts: Experts, ids_TK, shape: dict) -> torch.Tensor:
    """(K * parts of F, D) float32 for one token; the weighted sum over its rows is the token's output."""
    ffn, num_chosen = experts.ffn, ids_TK.shape[1]
    num_rows = num_chosen * cdiv(ffn, _FUSED.block_n)
    y = x_TD.new_empty(num_rows, x_TD.shape[1], dtype=torch.float32)
    up, gate, step = experts.columns
    launch(
        _fused_kernel,
        (num_rows,),
        x_TD,
        experts.w1,
        experts.w2,
        y,
        ids_TK,
        F=ffn,
        K=num_chosen,
        UP=up,
        GATE=gate,
        **_strides("W1", experts.w1, "EDF", step),
        W1_Z=experts.w1.stride(2),
        **_strides("W2", experts.w2, "EFD"),
        BLOCK_M=_BLOCK_M,
        **shape,
        **_FUSED.options(x_TD.dtype),
    )
    return y


def _sum_parts(y, ids_TK, scores_TK, out_TD, counts_E, constants: dict) -> None:
    """The output of one token from the rows of `_up_and_down_in_one`."""
    num_rows, d_model = y.shape
    launch(
        _sum_parts_kernel,
        (cdiv(d_model, _SUMMED_COLS),),
        y,
        ids_TK,
        scores_TK,
        out_TD,
        counts_E,
        PARTS=num_rows // ids_TK.shape[1],
        ROWS=min(_SUMMED_PARTS, next_power_of_2(num_rows)),
        BLOCK=_SUMMED_COLS,
        num_warps=4,
        **constants,
    )


def _up_then_down(x_TD, experts: Experts, ids_TK, scores_TK, slots: int, shape: dict) -> torch.Tensor:
    """(parts of F, T * K, D) float32: the expert's output for each slot, in parts to be added."""
    num_experts, ffn, d_model = experts.w2.shape
    num_slots = ids_TK.numel()
    by_slot = int(num_slots < num_experts)
    groups = min(num_slots, num_experts)
    up, down = stripes(x_TD.device)
    act = x_TD.new_empty(num_slots, ffn)
    y = x_TD.new_empty(down.split, num_slots, d_model, dtype=torch.float32)
    w1, of_z = experts.w1, z_options(experts)
    launch(
        _up_kernel,
        (groups * cdiv(ffn, up.block_n),),
        x_TD,
        w1,
        w1 if experts.gate is None else experts.gate,
        w1 if experts.bias1 is None else experts.bias1,
        scores_TK,
        act,
        ids_TK,
        num_slots,
        by_slot,
        K=ids_TK.shape[1],
        **of_z,
        **_strides("W", w1, "EDF", of_z["STEP"]),
        TWO=experts.gate is not None,
        SLOTS=slots,
        BLOCK_M=_BLOCK_M,
        **shape,
        **up.options(x_TD.dtype),
    )
    launch(
        _down_kernel,
        (groups * cdiv(d_model, down.block_n) * down.split,),
        act,
        experts.w2,
        y,
        ids_TK,
        num_slots,
        by_slot,
        F=ffn,
        SPLIT=down.split,
        **_strides("W", experts.w2, "EFD"),
        SLOTS=slots,
        BLOCK_M=_BLOCK_M,
        **shape,
        **down.options(x_TD.dtype),
    )
    return y


def _sum_slots(y, ids_TK, scores_TK, experts: Experts, out_TD, counts_E, constants: dict) -> None:
    """The output of each token from the rows of `_up_then_down`."""
    launch(
        _sum_kernel,
        (ids_TK.shape[0], cdiv(y.shape[2], 128)),
        y,
        ids_TK,
        scores_TK,
        y if experts.bias2 is None else experts.bias2,
        out_TD,
        counts_E,
        ids_TK.numel(),
        SPLIT=y.shape[0],
        WEIGHTED=not experts.scores_on_input,
        BIASED=experts.bias2 is not None,
        BLOCK=128,
        num_warps=2,
        **constants,
    )
