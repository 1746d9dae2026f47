"""Random cases of the op and of the layer, and their check against a dense computation in float64.

A case is a few numbers, which hypothesis draws and shrinks; the tensors follow from its seed. The tests run some
through Triton's interpreter (tests/kernels/test_fuzz.py), `python -m tests.trust.fuzz` many on a GPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from momoe_titan.kernels import momoe_mlp
from momoe_titan.moe.layers import MoMoE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCORES = ("float32", "float16", "bfloat16", "float64")
MASKS = ("full", "ragged", "skewed", "none", "twice", "sentinel")
X_IS = ("plain", "transposed", "columns of a wider", "every second row", "one row for all", "off its alignment")
DOUT_IS = ("plain", "transposed", "one number")
NAMES = ("x", "w1", "w2", "scores")


@dataclass(frozen=True)
class Kind:
    """How the experts' weights are stored, and what the experts compute."""

    activation: str = "swiglu"
    order: str = "up_gate"  # of w1's columns; "apart" for a tensor each
    transposed: bool = False  # stored as (E, out, in)
    biases: bool = False
    scores_on_input: bool = False


KINDS = {
    "plain": Kind(),
    "transformers": Kind(order="gate_up", transposed=True),
    "gpt-oss": Kind("clamped_swiglu", "interleaved_gate_up", biases=True),
    "torchtitan": Kind(order="apart", transposed=True),
    "llama 4": Kind(order="gate_up", scores_on_input=True),
    "relu2": Kind("relu2", transposed=True),
    "relu2 with biases on the input": Kind("relu2", biases=True, scores_on_input=True),
    "geglu": Kind("geglu", "interleaved_up_gate", transposed=True),
    "geglu_tanh": Kind("geglu_tanh", "apart", biases=True),
    "reglu": Kind("reglu", "gate_up", biases=True, scores_on_input=True),
}
ACTIVATIONS = {
    "swiglu": lambda up, gate: up * F.silu(gate),
    "reglu": lambda up, gate: up * F.relu(gate),
    "geglu": lambda up, gate: up * F.gelu(gate),
    "geglu_tanh": lambda up, gate: up * F.gelu(gate, approximate="tanh"),
    "clamped_swiglu": lambda up, gate: (
        (up.clamp(-7, 7) + 1) * gate.clamp(max=7) * (1.702 * gate.clamp(max=7)).sigmoid()
    ),
}


@dataclass(frozen=True)
class Case:
    """What one call of the op or the layer is given. The first three fields compile kernels anew, the others do not."""

    shape: tuple[int, int, int, int]  # D, F, E, K
    dtype: str
    kind: str  # of KINDS
    autocast: bool  # the inputs are float32 then, and dtype is autocast's
    num_tokens: int
    seed: int
    mask: str
    x_is: str
    dout_is: str
    strided_routing: bool  # ids and scores are columns of a wider matrix
    ids_int32: bool
    scores: str
    save_percent: float
    needs: tuple[bool, bool, bool, bool]  # which of NAMES get a gradient
    spare_rows: int | None  # num_rows beyond the used slots; None leaves num_rows to the op


def ragged(num_tokens: int, shape: tuple[int, int, int, int], dtype: str, kind: str, save_percent: float = 0) -> Case:
    """Tokens of 0 to K experts, tensors as they are made, all gradients."""
    return Case(
        **{"shape": shape, "dtype": dtype, "kind": kind, "autocast": False, "num_tokens": num_tokens, "seed": 0},
        **{"mask": "ragged", "x_is": "plain", "dout_is": "plain", "strided_routing": False, "ids_int32": False},
        **{"scores": "float32", "save_percent": save_percent, "needs": (True,) * 4, "spare_rows": None},
    )


def cases(
    shapes: Sequence[tuple[int, int, int, int]], dtypes: Sequence[str], kinds: Sequence[str], max_tokens: int
) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        shape=st.sampled_from(shapes),
        dtype=st.sampled_from(dtypes),
        kind=st.sampled_from(kinds),
        autocast=st.sampled_from([False, False, True]),
        num_tokens=st.integers(0, max_tokens),
        seed=st.integers(0, 2**31),
        mask=st.sampled_from(MASKS),
        x_is=st.sampled_from(X_IS),
        dout_is=st.sampled_from(DOUT_IS),
        strided_routing=st.booleans(),
        ids_int32=st.booleans(),
        scores=st.sampled_from(SCORES),
        save_percent=st.sampled_from([0, 100]) | st.floats(0, 100),
        needs=st.tuples(*[st.booleans()] * 4).filter(any),
        spare_rows=st.none() | st.integers(0, 5),
    )


def _ids(case: Case, g: torch.Generator, device) -> torch.Tensor:
    _, _, E, K = case.shape
    T = case.num_tokens
    order = torch.rand(T, E, generator=g, device=device)
    if case.mask == "skewed":  # all tokens on the same experts, the others get none
        order = order[:1].expand(T, E)
    ids = order.topk(K, -1)[1]
    if case.mask == "twice" and K > 1 and not KINDS[case.kind].scores_on_input:  # dense adds up an expert's scores
        ids[::2, 1] = ids[::2, 0]
    unused = torch.rand(T, K, generator=g, device=device)
    if case.mask == "ragged":
        ids = ids.masked_fill(unused < 0.4, -1)
    elif case.mask == "sentinel":
        ids = ids.masked_fill(unused < 0.2, E)
    elif case.mask == "none":
        ids = torch.full_like(ids, -1)
    return ids


def _laid_out(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values in another layout; "one row for all" has the first row's."""
    rows, cols = t.shape
    if how == "transposed":
        return t.t().contiguous().t()
    if how == "columns of a wider":
        return torch.cat([t, t, t], 1)[:, cols : 2 * cols]
    if how == "every second row":
        return torch.stack([t, t], 1).reshape(2 * rows, cols)[::2]
    if how == "one row for all":
        return t[:1].expand(rows, cols)
    if how == "off its alignment":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(rows, cols)
    return t


def _near_zero(case: Case, leaves: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """(T, K): slots with a gate so near to zero that rounding opens or closes it, where reglu's derivative jumps."""
    kind = KINDS[case.kind]
    used = (ids >= 0) & (ids < case.shape[2])
    chosen = ids.long().where(used, 0)
    (x, w1, _), options = arguments(case, {name: t.double() for name, t in leaves.items()})
    assert isinstance(w1, torch.Tensor)
    z_TKZ = torch.matmul(x, w1).transpose(0, 1).gather(1, chosen[..., None].expand(*chosen.shape, w1.shape[2]))
    if kind.scores_on_input:
        z_TKZ = z_TKZ * leaves["scores"].double()[..., None]
    if kind.biases:
        z_TKZ = z_TKZ + options["bias1"][chosen]
    _, gate = _halves(z_TKZ, kind.order)
    return (gate.abs() < 2 * torch.finfo(DTYPES[case.dtype]).eps).any(-1) & used


@dataclass
class Inputs:
    leaves: dict[str, torch.Tensor]  # as they are stored: x, w1, w2, scores, and those of gate, bias1, bias2 there are
    ids: torch.Tensor
    dout: torch.Tensor


def make_inputs(case: Case, device) -> Inputs:
    """Values of unit scale, so that every expert's output is of order one."""
    D, F_, E, K = case.shape
    T = case.num_tokens
    dtype, kind = DTYPES[case.dtype], KINDS[case.kind]
    g = torch.Generator(device).manual_seed(case.seed)

    def randn(*size):
        return torch.randn(size, generator=g, device=device).to(dtype)

    def weight(rows, cols):
        return randn(E, cols, rows) * rows**-0.5 if kind.transposed else randn(E, rows, cols) * rows**-0.5

    x, dout = randn(T, D), randn(T, D)
    width = F_ if kind.order == "apart" or kind.activation == "relu2" else 2 * F_
    leaves = {"w1": weight(D, width), "w2": weight(F_, D)}
    if kind.order == "apart":
        leaves["gate"] = weight(D, F_)
    if kind.biases:
        leaves["bias1"] = randn(E, F_ if kind.activation == "relu2" else 2 * F_) * 0.3
        leaves["bias2"] = randn(E, D) * 0.3
    scores = torch.rand(T, K, generator=g, device=device).to(getattr(torch, case.scores))
    ids = _ids(case, g, device).to(torch.int32 if case.ids_int32 else torch.int64)
    if case.strided_routing:
        ids, scores = (torch.cat([t, t], 1)[:, ::2] if K % 2 else torch.cat([t, t], 1)[:, K:] for t in (ids, scores))
    if case.autocast:
        x, leaves = x.float(), {name: t.float() for name, t in leaves.items()}
    dout = dout[:1, :1].expand(T, D) if case.dout_is == "one number" else _laid_out(dout, case.dout_is)
    leaves = {"x": _laid_out(x, case.x_is), "scores": scores, **leaves}
    if kind.activation == "reglu":
        ids = torch.where(_near_zero(case, leaves, ids), -1, ids)
    return Inputs(leaves, ids, dout)


def arguments(case: Case, leaves: dict[str, torch.Tensor]) -> tuple[list, dict]:
    """x, w1, w2 and the options of `momoe_mlp`; weights as views (E, in, out) of what is stored."""
    kind = KINDS[case.kind]

    def view(name):
        return leaves[name].mT if kind.transposed else leaves[name]

    w1 = (view("w1"), view("gate")) if kind.order == "apart" else view("w1")
    options = {"activation": kind.activation, "scores_on_input": kind.scores_on_input}
    if kind.order != "apart":
        options["order"] = kind.order
    for name in ("bias1", "bias2"):
        if name in leaves:
            options[name] = leaves[name]
    if "bias1" in leaves and kind.order == "apart":
        options["bias1"] = leaves["bias1"].chunk(2, 1)
    return [leaves["x"], w1, view("w2")], options


def _halves(z, order):
    if order.startswith("interleaved"):
        first, second = z[..., ::2], z[..., 1::2]
    else:
        first, second = z.chunk(2, -1)
    return (second, first) if order.endswith("gate_up") else (first, second)


class _InOrder(torch.autograd.Function):
    """A matrix product that adds one product after the other, as kernels do in float32, and so its gradients."""

    @staticmethod
    def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        total = a.new_zeros(*batch, a.shape[-2], b.shape[-1])
        for k in range(a.shape[-1]):
            total.addcmul_(a[..., k : k + 1], b[..., k : k + 1, :])
        return total

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return _InOrder._product(a, b)

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        needs_a, needs_b = ctx.needs_input_grad
        da = _InOrder._product(grad, b.mT).sum_to_size(a.shape) if needs_a else None
        db = _InOrder._product(a.mT, grad).sum_to_size(b.shape) if needs_b else None
        return da, db


def in_order(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.matmul` of tensors in two or more dimensions, with sums in the order of the numbers."""
    return _InOrder.apply(a, b)


def dense(
    case: Case,
    leaves: dict[str, torch.Tensor],
    ids: torch.Tensor,
    dtype: torch.dtype,
    matmul: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.matmul,
) -> torch.Tensor:
    """Every expert on every token, in `dtype`; what the ids do not name is multiplied by zero.

    Args:
        matmul: how the products are computed.
    """
    kind = KINDS[case.kind]
    (x, w1, w2), _ = arguments(case, {name: t if name == "scores" else t.to(dtype) for name, t in leaves.items()})
    bias1, bias2 = (leaves[name].to(dtype)[:, None] if name in leaves else 0 for name in ("bias1", "bias2"))
    E = w2.shape[0]
    used = ((ids >= 0) & (ids < E))[..., None]
    chosen = (F.one_hot(ids.long().clamp(0, E - 1), E) * used).to(torch.promote_types(dtype, torch.float32))
    weight_ET1 = (chosen * leaves["scores"].to(chosen.dtype)[..., None]).sum(1).t()[..., None]
    z = matmul(x, torch.cat(w1, 2) if isinstance(w1, tuple) else w1)  # (E, T, Z)
    if kind.scores_on_input:
        z = z * weight_ET1.to(dtype)
        weight_ET1 = chosen.sum(1).t()[..., None]
    z = z + bias1
    act = F.relu(z).square() if kind.activation == "relu2" else ACTIVATIONS[kind.activation](*_halves(z, kind.order))
    y_ETD = matmul(act, w2) + bias2
    return (y_ETD.to(chosen.dtype) * weight_ET1).sum(0).to(dtype)


def results(case: Case, inputs: Inputs, fn) -> dict[str, torch.Tensor]:
    """The output and the gradients that the case asks for; a gate and biases go with the weight beside them."""
    needs = dict(zip(NAMES, case.needs, strict=True))
    needs |= {"gate": needs["w1"], "bias1": needs["w1"], "bias2": needs["w2"]}
    leaves = {name: t.detach().requires_grad_(needs[name]) for name, t in inputs.leaves.items()}
    out = fn(leaves, inputs.ids)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), inputs.dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def ways_in_dtype(case: Case) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Matrix products whose rounding is right: torch's, which may add up parts of a sum, and in float32 sums in order.

    The error of a float32 sum in order grows with the root of its length: of 600 numbers it is 5.5 times the dtype's
    rounding, where cuBLAS has less than 2.2.
    """
    return [torch.matmul, in_order] if case.dtype == "float32" else [torch.matmul]


def _unlike(case: Case, name: str, result: torch.Tensor) -> int:
    """How many numbers of a result differ in their rounding: not those of rows or columns that are all the same."""
    D, ffn, num_experts, _ = case.shape
    one_row, one_number = case.x_is == "one row for all", case.dout_is == "one number"
    if name == "w2" and one_row:
        return num_experts * (1 if one_number else ffn)
    if one_row and name in ("out", "x", "scores"):
        return result.numel() // max(1, case.num_tokens)
    if (one_row and name in ("w1", "gate")) or (one_number and name in ("w2", "bias2")):
        return result.numel() // D
    return result.numel()


def excess(case: Case, got: dict, want: dict, in_dtype: list[dict], slack: float = 1.0) -> dict[str, torch.Tensor]:
    """Each result's error over what is allowed: at most one where all is well.

    Allowed is twice the error of the dense computation in the case's dtype, the largest of `in_dtype`. Where few
    numbers make that small by chance there is a floor, in units of the dtype's rounding and of what the result is of
    unit inputs. Both are multiplied by `slack`, for an interpreter that rounds bfloat16 toward zero.
    """
    D = case.shape[0]
    dtype = DTYPES[case.dtype]
    eps = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 1)  # sums of float32 differ in order
    found = {}
    for name, w in want.items():
        unit = D**0.5 if name == "scores" else 1.0  # a score's gradient is a product of D numbers
        if case.dout_is == "one number":
            unit *= 2.0  # one factor for all may be large
        scale = torch.maximum(w.norm(), torch.as_tensor(unit * w.numel() ** 0.5)).clamp(min=1e-30)
        mine, *others = ((r[name].double() - w).norm() / scale for r in (got, *in_dtype))
        floor = eps * (0.25 + 4 / max(1, _unlike(case, name, w)) ** 0.5)
        if name == "scores":  # rounded to the dtype of the scores in the end
            floor += torch.finfo(getattr(torch, case.scores)).eps
        largest = torch.stack(others).max()
        found[name] = mine / ((2 * largest).clamp(min=floor) * slack)
    return found


def check(case: Case, device="cpu", backend: str = "triton", slack: float = 1.0) -> dict[str, torch.Tensor]:
    """Run a case; the excess of each result, see `excess`. NaN in a result gives NaN.

    Raises:
        AssertionError: counts, shapes, dtypes, or gradients of what is not chosen.
    """
    inputs = make_inputs(case, device)
    dtype = DTYPES[case.dtype]
    E = case.shape[2]
    used = (inputs.ids >= 0) & (inputs.ids < E)
    num_rows = None if case.spare_rows is None else min(int(used.sum()) + case.spare_rows, inputs.ids.numel())
    counts = []

    def op(leaves, ids):
        tensors, options = arguments(case, leaves)
        with torch.autocast(torch.device(device).type, dtype, enabled=case.autocast and dtype != torch.float32):
            options |= {"num_rows": num_rows, "backend": backend}
            out, counts_E = momoe_mlp(*tensors, ids, leaves["scores"], case.save_percent, **options)
        counts.append(counts_E)
        return out

    got = results(case, inputs, op)
    want = results(case, inputs, lambda leaves, ids: dense(case, leaves, ids, torch.float64))
    in_dtype = [
        results(case, inputs, lambda leaves, ids, way=way: dense(case, leaves, ids, dtype, matmul=way))
        for way in ways_in_dtype(case)
    ]
    assert torch.equal(counts[0], torch.bincount(inputs.ids[used].long(), minlength=E)), "counts"
    for name, result in got.items():
        like = inputs.leaves["x" if name == "out" else name]
        assert result.shape == like.shape, (name, result.shape)
        assert result.dtype == (dtype if name == "out" else like.dtype), (name, result.dtype)
    # what no token chose has exactly no gradient
    empty = counts[0] == 0
    exact = [got[name][empty].abs().sum() for name in ("w1", "w2", "gate", "bias1", "bias2") if name in got]
    if "scores" in got:
        exact.append(got["scores"][~used].abs().sum())
    assert not exact or not torch.stack([e.double() for e in exact]).any(), "a gradient of what no token chose"
    return excess(case, got, want, in_dtype, slack)


def check_layer(case: Case, device="cpu", backend: str = "auto", slack: float = 1.0) -> dict[str, torch.Tensor]:
    """The same for `MoMoE` with a mask: any number of experts for each token. Kind "plain" only."""
    D, F_, E, _ = case.shape
    dtype = DTYPES[case.dtype]
    inputs = make_inputs(case, device)
    g = torch.Generator(device).manual_seed(case.seed + 1)
    mask_NM = torch.rand(E, case.num_tokens, generator=g, device=device) < {"none": 0.0, "full": 1.0}.get(
        case.mask, 0.5
    )
    s_NM = torch.rand(E, case.num_tokens, generator=g, device=device).to(getattr(torch, case.scores))
    leaves = inputs.leaves
    layer = MoMoE(D, F_, E, 1, case.save_percent, leaves["w1"].clone(), leaves["w2"].clone(), backend=backend)

    def of_layer(leaves, mask_NM):
        weights = {"Wl1_ND2H": leaves["w1"], "Wl2_NHD": leaves["w2"]}
        with torch.autocast(torch.device(device).type, dtype, enabled=case.autocast and dtype != torch.float32):
            out, counts = torch.func.functional_call(layer, weights, (leaves["x"], mask_NM, leaves["scores"]))
        assert torch.equal(counts, mask_NM.sum(1))
        return out

    def of_dense(dtype, matmul=torch.matmul):
        def fn(leaves, mask_NM):
            ids = torch.arange(E, device=device).expand(case.num_tokens, E).masked_fill(~mask_NM.t(), -1)
            return dense(case, {**leaves, "scores": leaves["scores"].t()}, ids, dtype, matmul=matmul)

        return fn

    inputs = Inputs({**leaves, "scores": s_NM}, mask_NM, inputs.dout)
    fns = of_layer, of_dense(torch.float64), *(of_dense(dtype, way) for way in ways_in_dtype(case))
    got, want, *in_dtype = (results(case, inputs, fn) for fn in fns)
    return excess(case, got, want, in_dtype, slack)
