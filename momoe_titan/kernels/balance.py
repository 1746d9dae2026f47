"""The device's side of quantile balancing once per optimizer step, for all layers of a model at once.

A step is seven launches whatever the number of layers: their buffers are reached by a table of
addresses. With one torch op per layer, launching would take longer than all that is computed.

Every function takes plain torch where the tensors are not on a GPU; the comparison is in
`tests/kernels/test_balance.py`.
"""

# Inside @triton.jit functions Triton evaluates constants and pointers itself; its stubs do not say so.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels.launch import cdiv, launch, next_power_of_2, only_plans
from momoe_titan.kernels.multi_tensor import TL_DTYPES, Table, plan_traffic
from momoe_titan.kernels.quantile import bin_edges
from momoe_titan.kernels.router import SIGMOID, SOFTMAX, _clamp, _softmax, runs_here

_BLOCK = 1024  # numbers that one program of `_collect_kernel` moves
_ROWS = 8  # of a gate, that one program of `_mean_logits_kernel` multiplies
_BLOCK_D = 256


@triton.jit
def _collect_kernel(ptrs_ptr, flat_ptr, n, first, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tensors, cdiv(n, BLOCK)). Moves n numbers of each tensor into flat, as float64, and leaves zeros."""
    source = tl.load(ptrs_ptr + first + tl.program_id(0)).to(tl.pointer_type(DTYPE))
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    values = tl.load(source + offs, mask=mask)
    tl.store(flat_ptr + tl.program_id(0).to(tl.int64) * n + offs, values.to(tl.float64), mask=mask)
    tl.store(source + offs, tl.zeros((BLOCK,), DTYPE), mask=mask)


@triton.jit
def _quantiles_kernel(
    histogram_ptr, edges_ptr, out_ptr, K: tl.constexpr, E: tl.constexpr, BINS: tl.constexpr, BINS_POW2: tl.constexpr
):
    """Grid (layers * E,). out float64: the K/E quantile of one histogram's margins, NaN if it is empty."""
    row = tl.program_id(0)
    cols = tl.arange(0, BINS_POW2)
    live = cols < BINS
    counts = tl.load(histogram_ptr + row.to(tl.int64) * BINS + cols, mask=live, other=0.0)
    cumulative = tl.cumsum(counts, axis=0)
    total = tl.sum(counts, axis=0)  # whole numbers: the same in any order
    wanted = total * K / E
    place = tl.sum((live & (cumulative < wanted)).to(tl.int32), axis=0)
    place = tl.minimum(place, BINS - 1)
    count = tl.sum(tl.where(cols == place, counts, 0.0), axis=0)
    below = tl.sum(tl.where(cols < place, counts, 0.0), axis=0)
    lower = tl.load(edges_ptr + place)
    upper = tl.load(edges_ptr + place + 1)
    quantile = lower + (wanted - below) / tl.maximum(count, 1.0) * (upper - lower)
    tl.store(out_ptr + row, tl.where(total > 0, quantile, float("nan")))


@triton.jit
def _move(ptrs_ptr, change, factor, found_ptr, cols, E: tl.constexpr, SKIPS: tl.constexpr):
    """Add factor * change (float64) to the bias of layer program_id(0) and centre it; nothing if one is not finite."""
    mask = cols < E
    bias_ptr = tl.load(ptrs_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float64)
    new = tl.where(mask, bias + factor * change, 0.0)
    new -= tl.sum(new, axis=0) / E
    moves = tl.sum(tl.where(mask & ~(tl.abs(change) < float("inf")), 1, 0), axis=0) == 0
    if SKIPS:
        moves = moves & (tl.load(found_ptr) != 1)
    moved = tl.where(moves, E, 0)  # a number, because the interpreter of Triton 3.9 takes no scalar into a mask
    tl.store(bias_ptr + cols, new.to(tl.float32), mask=cols < moved)


@triton.jit
def _move_kernel(ptrs_ptr, change_ptr, factor, found_ptr, E: tl.constexpr, E_POW2: tl.constexpr, SKIPS: tl.constexpr):
    """Grid (layers,). `_move` by change (layers, E)."""
    cols = tl.arange(0, E_POW2)
    change = tl.load(change_ptr + tl.program_id(0) * E + cols, mask=cols < E, other=0.0)
    _move(ptrs_ptr, change.to(tl.float64), factor, found_ptr, cols, E, SKIPS)


@triton.jit
def _mean_logits_kernel(
    ptrs_ptr,
    sums_ptr,
    out_ptr,
    rows,
    D,
    DTYPE: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (layers, cdiv(rows, BLOCK_R)). out float32 (layers, rows): each row of a gate times the mean token.

    ptrs has the addresses of the gates' weights (rows, D), then those of their biases. sums float64
    (layers, D + 1): the sum of tokens, and how many they are.
    """
    layer = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    weight_ptr = tl.load(ptrs_ptr + layer).to(tl.pointer_type(DTYPE))
    sums_ptr += layer.to(tl.int64) * (D + 1)
    number = tl.maximum(tl.load(sums_ptr + D), 1.0)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mean = (tl.load(sums_ptr + cols, mask=cols < D, other=0.0) / number).to(tl.float32)
        mask = (row < rows)[:, None] & (cols < D)[None, :]
        weight = tl.load(weight_ptr + row.to(tl.int64)[:, None] * D + cols[None, :], mask=mask, other=0.0)
        acc += weight.to(tl.float32) * mean[None, :]
    logits = tl.sum(acc, axis=1)
    if BIASED:
        gate_bias_ptr = tl.load(ptrs_ptr + tl.num_programs(0) + layer).to(tl.pointer_type(DTYPE))
        logits += tl.load(gate_bias_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out_ptr + layer * rows + row, logits, mask=row < rows)


@triton.jit
def _follow_kernel(
    ptrs_ptr, before_ptr, after_ptr, found_ptr,
    E: tl.constexpr, E_POW2: tl.constexpr, FUNC: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Grid (layers,). Takes from the biases what the scores of these logits (layers, E) have gained."""
    cols = tl.arange(0, E_POW2)
    mask = cols < E
    before = _clamp(tl.load(before_ptr + tl.program_id(0) * E + cols, mask=mask, other=0.0))
    after = _clamp(tl.load(after_ptr + tl.program_id(0) * E + cols, mask=mask, other=0.0))
    if FUNC == SIGMOID:
        gained = tl.sigmoid(after) - tl.sigmoid(before)
    else:
        gained = tl.sum(_softmax(after[None, :], mask[None, :]) - _softmax(before[None, :], mask[None, :]), axis=0)
    _move(ptrs_ptr, gained.to(tl.float64), -1.0, found_ptr, cols, E, SKIPS)


class BalanceStep:
    """Quantile balancing of all layers of a model, from what their routers have counted to their new biases.

    Keeps the tables of addresses from step to step; they are sent again where a tensor has moved.
    """

    def __init__(self):
        self._totals, self._biases, self._gates = Table(), Table(), Table()
        self._edges: Tensor | None = None

    def collect(self, groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """What groups of tensors hold, which are zeroed.

        Args:
            groups: of tensors of one shape and dtype, contiguous: int64, int32 or float32.

        Returns:
            One float64 tensor of all numbers, exact for whole ones up to 2^53, and its parts: of each group its
            tensors stacked.
        """
        flat, parts = _room_for(groups)
        if not runs_here(flat):
            for part, group in zip(parts, groups, strict=True):
                torch.stack([tensor.double() for tensor in group], out=part)
                torch._foreach_zero_(list(group))  # pyright: ignore[reportPrivateImportUsage] - torch has no public name
            return flat, parts
        if only_plans():
            plan_traffic([t for group in groups for t in group], [flat, *(t for group in groups for t in group)])
            return flat, parts
        ptrs = self._totals.on(flat.device, [t.data_ptr() for group in groups for t in group])
        first = 0
        for part, group in zip(parts, groups, strict=True):
            n = group[0].numel()
            dtype = _COUNT_DTYPES[group[0].dtype]
            grid = len(group), cdiv(n, _BLOCK)
            launch(_collect_kernel, grid, ptrs, part, n, first, DTYPE=dtype, BLOCK=_BLOCK)
            first += len(group)
        return flat, parts

    def solve(
        self, biases: Sequence[Tensor], histogram_LEB: Tensor, top_k: int, average: float, found_inf: Tensor | None
    ) -> None:
        """Move the biases by `average` of what the histograms ask for, in place, to a mean of 0.

        Args:
            biases: float32 (E) of each layer.
            histogram_LEB: float64, see `kernels.quantile`. A layer whose histogram is empty keeps its bias.
            top_k: K.
            average: the share of the way.
            found_inf: 1 on the device where the step is skipped, or None; then no bias moves.
        """
        quantile_LE = self.quantiles(histogram_LEB, top_k)
        if not runs_here(histogram_LEB):
            _move_ref(biases, average * quantile_LE, found_inf)
            return
        if only_plans():
            plan_traffic([quantile_LE, *biases], list(biases))
            return
        num_experts = quantile_LE.shape[1]
        launch(
            _move_kernel,
            (len(biases),),
            self._biases.on(quantile_LE.device, [t.data_ptr() for t in biases]),
            quantile_LE,
            float(average),
            found_inf,
            E=num_experts,
            E_POW2=next_power_of_2(num_experts),
            SKIPS=found_inf is not None,
        )

    def quantiles(self, histogram_LEB: Tensor, top_k: int) -> Tensor:
        """(L, E) float64: the K/E quantile of each histogram's margins, NaN where it is empty."""
        if not runs_here(histogram_LEB):
            return quantiles_ref(histogram_LEB, top_k)
        num_layers, num_experts, bins = histogram_LEB.shape
        out_LE = histogram_LEB.new_empty(num_layers, num_experts)
        if only_plans():
            plan_traffic([histogram_LEB], [out_LE])
            return out_LE
        if self._edges is None or self._edges.device != out_LE.device:
            self._edges = bin_edges(out_LE.device)
        sizes = {"K": top_k, "E": num_experts, "BINS": bins, "BINS_POW2": next_power_of_2(bins)}
        launch(_quantiles_kernel, (num_layers * num_experts,), histogram_LEB, self._edges, out_LE, **sizes)
        return out_LE

    def mean_logits(self, weights: Sequence[Tensor], gate_biases: Sequence[Tensor], input_sum_LC: Tensor) -> Tensor:
        """(L, rows) float32: what the gates make of the mean token of each layer.

        In float32 whatever the matmul precision, because a step changes only the last bits of a weight.

        Args:
            weights: (rows, D) of each layer, contiguous.
            gate_biases: (rows) of each layer, or none.
            input_sum_LC: float64, C = D + 1: the sum of the tokens, and how many they are.
        """
        rows, dim = weights[0].shape
        if not runs_here(weights[0]):
            mean_LD = (input_sum_LC[:, :-1] / input_sum_LC[:, -1:].clamp(min=1)).float().to(weights[0].device)
            logits_Le = (torch.stack(list(weights)).float() * mean_LD[:, None, :]).sum(dim=-1)
            return logits_Le + torch.stack(list(gate_biases)) if gate_biases else logits_Le
        out_Le = torch.empty(len(weights), rows, device=weights[0].device)
        if only_plans():
            plan_traffic([*weights, input_sum_LC], [out_Le])
            return out_Le
        ptrs = self._gates.on(out_Le.device, [t.data_ptr() for t in (*weights, *gate_biases)])
        options = {"DTYPE": TL_DTYPES[weights[0].dtype], "BIASED": bool(gate_biases)}
        grid = len(weights), cdiv(rows, _ROWS)
        sizes = {"BLOCK_R": _ROWS, "BLOCK_D": _BLOCK_D}
        launch(_mean_logits_kernel, grid, ptrs, input_sum_LC, out_Le, rows, dim, **options, **sizes)
        return out_Le

    def follow(
        self,
        biases: Sequence[Tensor],
        before_LE: Tensor,
        after_LE: Tensor,
        score_func: str,
        found_inf: Tensor | None,
    ) -> None:
        """Take from the biases what the scores of these logits have gained, in place, to a mean of 0.

        Arguments as in `solve`. A layer with a NaN keeps its bias.
        """
        if not runs_here(after_LE):
            gained_LE = _scores_ref(after_LE, score_func) - _scores_ref(before_LE, score_func)
            _move_ref(biases, -gained_LE.double(), found_inf)
            return
        if only_plans():
            plan_traffic([before_LE, after_LE, *biases], list(biases))
            return
        num_experts = after_LE.shape[1]
        launch(
            _follow_kernel,
            (len(biases),),
            self._biases.on(after_LE.device, [t.data_ptr() for t in biases]),
            before_LE,
            after_LE,
            found_inf,
            E=num_experts,
            E_POW2=next_power_of_2(num_experts),
            FUNC=(SIGMOID if score_func == "sigmoid" else SOFTMAX).value,
            SKIPS=found_inf is not None,
        )


_COUNT_DTYPES = {torch.int64: tl.int64, torch.int32: tl.int32, torch.float32: tl.float32}


def _room_for(groups: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[Tensor]]:
    shapes = [(len(group), *group[0].shape) for group in groups]
    sizes = [len(group) * group[0].numel() for group in groups]
    flat = torch.empty(sum(sizes), dtype=torch.float64, device=groups[0][0].device)
    return flat, [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def quantiles_ref(histogram_LEB: Tensor, top_k: int) -> Tensor:
    """`BalanceStep.quantiles` in plain torch; the histogram may be of any dtype and any leading shape."""
    histogram_LEB = histogram_LEB.double()
    num_experts = histogram_LEB.shape[-2]
    cumulative_LEB = histogram_LEB.cumsum(dim=-1)
    total_LE1 = cumulative_LEB[..., -1:]
    wanted_LE1 = total_LE1 * top_k / num_experts
    index_LE1 = torch.searchsorted(cumulative_LEB, wanted_LE1).clamp(max=histogram_LEB.shape[-1] - 1)
    count_LE1 = histogram_LEB.gather(-1, index_LE1)
    below_LE1 = cumulative_LEB.gather(-1, index_LE1) - count_LE1
    edges = bin_edges(histogram_LEB.device)
    lower_LE1, upper_LE1 = edges[index_LE1], edges[index_LE1 + 1]
    quantile_LE1 = lower_LE1 + (wanted_LE1 - below_LE1) / count_LE1.clamp(min=1) * (upper_LE1 - lower_LE1)
    return quantile_LE1.where(total_LE1 > 0, float("nan")).squeeze(-1)


def centred_move(bias_LE: Tensor, change_LE: Tensor) -> Tensor:
    """The biases after this change (float64), centred to mean 0; as they were in a layer where it is not finite."""
    new_LE = bias_LE.double() + change_LE
    new_LE = (new_LE - new_LE.mean(dim=-1, keepdim=True)).float()
    return new_LE.where(change_LE.isfinite().all(dim=-1, keepdim=True), bias_LE)


def _move_ref(biases: Sequence[Tensor], change_LE: Tensor, found_inf: Tensor | None) -> None:
    bias_LE = torch.stack(list(biases))
    new_LE = centred_move(bias_LE, change_LE.to(bias_LE.device))
    if found_inf is not None:
        new_LE = new_LE.where(found_inf != 1, bias_LE)
    torch._foreach_copy_(list(biases), list(new_LE))  # pyright: ignore[reportPrivateImportUsage] - no public name


def _scores_ref(logits_LE: Tensor, score_func: str) -> Tensor:
    largest = torch.finfo(torch.float32).max
    logits_LE = logits_LE.clamp(-largest, largest)
    return logits_LE.sigmoid() if score_func == "sigmoid" else logits_LE.softmax(dim=1)
