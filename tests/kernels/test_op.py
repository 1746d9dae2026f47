"""The op against the float64 oracle, on the Triton kernels (GPU or interpreter) and on the torch backend."""

import dataclasses
import functools
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from momoe_titan.kernels import momoe_mlp, momoe_mlp_ref
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.gpu import interpreting
from momoe_titan.save_percent import num_saved_rows

# (T, D, F, E, K) and why it is here
SHAPES = {
    "tiles_cross_experts": (45, 32, 48, 3, 2),
    "odd_widths": (7, 97, 47, 3, 3),
    "one_token_of_an_expert": (1, 32, 32, 7, 1),
    "no_token": (0, 32, 16, 4, 2),
    "every_expert": (9, 48, 32, 4, 4),
    "width_600": (20, 600, 24, 3, 2),
}
NAMES = ("out", "dx", "dw1", "dw2", "dscores")


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def make_inputs(shape, dtype, device, seed=0, scores_dtype=torch.float32):
    """Unit-scale x, w1, w2, ids, scores, dout: every expert's output is of order 1."""
    T, D, F, E, K = shape
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size):
        return torch.randn(size, generator=g, device=device)

    x, dout = randn(T, D), randn(T, D)
    w1, w2 = randn(E, D, 2 * F) * D**-0.5, randn(E, F, D) * F**-0.5
    ids = torch.rand(T, E, generator=g, device=device).topk(K, -1)[1]
    scores = torch.rand(T, K, generator=g, device=device)
    return x.to(dtype), w1.to(dtype), w2.to(dtype), ids, scores.to(scores_dtype), dout.to(dtype)


def run(fn, x, w1, w2, ids, scores, dout, *args, **kwargs):
    """(out, dx, dw1, dw2, dscores), counts."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w1, w2, scores)]
    out, counts = fn(*leaves[:3], ids, leaves[3], *args, **kwargs)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout)), counts


def oracle(x, w1, w2, ids, scores, dout):
    return run(momoe_mlp_ref, x.double(), w1.double(), w2.double(), ids, scores.double(), dout.double())


def error(got, want):
    """Normalised error; NaN anywhere gives NaN, which passes no bound."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12)).item()


def assert_close(got, want, in_dtype):
    """Errors at most twice what torch makes in the same dtype; a floor where luck made that tiny."""
    for name, g, w, t in zip(NAMES, got, want, in_dtype, strict=True):
        dtype = in_dtype[0].dtype
        floor = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 0.25)  # sums of float32 differ in order
        allowed = max(2 * error(t, w), floor)
        assert error(g, w) <= allowed, (name, error(g, w), allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_gradients(name, dtype, backend, device):
    if interpreting() and backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds bfloat16 toward zero")
    inputs = make_inputs(SHAPES[name], dtype, device)
    got, counts = run(momoe_mlp, *inputs, 37, backend=backend)
    want, counts_want = oracle(*inputs)
    assert_close(got, want, run(momoe_mlp_ref, *inputs)[0])
    assert got[0].dtype == dtype and counts.tolist() == counts_want.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("save_percent", [1, 37, 99, 100])
def test_save_percent_never_changes_a_bit(save_percent, dtype, backend, device):
    # 90 rows over 3 experts in tiles of 16 (128 on a GPU): the border falls inside a tile and inside an expert
    inputs = make_inputs(SHAPES["tiles_cross_experts"], dtype, device)
    want, _ = run(momoe_mlp, *inputs, 0, backend=backend)
    got, _ = run(momoe_mlp, *inputs, save_percent, backend=backend)
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert torch.equal(g, w), name


def test_deterministic(device, backend):
    inputs = make_inputs(SHAPES["tiles_cross_experts"], torch.float16, device)
    first, second = (run(momoe_mlp, *inputs, 50, backend=backend)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_experts_get_zero_gradients(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs((33, 32, 32, 6, 2), torch.float32, device)
    ids = torch.tensor([4, 1], device=device).expand(33, 2)
    got, counts = run(momoe_mlp, x, w1, w2, ids, scores, dout, 50, backend=backend)
    assert counts.tolist() == [0, 33, 0, 0, 33, 0]
    for grad in got[2:4]:
        assert (grad[[0, 2, 3, 5]] == 0).all() and (grad[[1, 4]] != 0).any()
    assert_close(got, oracle(x, w1, w2, ids, scores, dout)[0], run(momoe_mlp_ref, x, w1, w2, ids, scores, dout)[0])


def test_unused_slots_add_nothing(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    ids[3, 1], ids[4], ids[5, 0] = -1, -1, 3
    got, counts = run(momoe_mlp, x, w1, w2, ids, scores, dout, 50, backend=backend)
    want, counts_want = oracle(x, w1, w2, ids, scores, dout)
    assert counts.tolist() == counts_want.tolist() and counts.sum() == ids.numel() - 4
    assert_close(got, want, run(momoe_mlp_ref, x, w1, w2, ids, scores, dout)[0])
    assert (got[0][4] == 0).all() and (got[4][[3, 4, 4, 5], [1, 0, 1, 0]] == 0).all()


@pytest.mark.parametrize("spare", [0, 7])
def test_room_for_used_slots_only(spare, device, backend):
    """R = used slots: the same from less memory (of Triton to the bit), also where no slot is used at all."""
    x, w1, w2, ids, scores, dout = make_inputs((45, 32, 48, 5, 4), torch.float32, device)
    for unused in (ids % 2 == 0, ids >= 0):
        ids[unused] = -1
        rows = int((ids >= 0).sum()) + spare
        kwargs = dict(backend=backend, check_ids=True)
        want, counts_want = run(momoe_mlp, x, w1, w2, ids, scores, dout, 0, backend=backend)
        got, counts = run(momoe_mlp, x, w1, w2, ids, scores, dout, 37, num_rows=rows, **kwargs)
        for name, g, w in zip(NAMES, got, want, strict=True):
            if backend == "torch":  # its products of fewer rows may differ in the last bit
                torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5, msg=name)
            else:
                assert torch.equal(g, w), name
        assert counts.tolist() == counts_want.tolist()
        _, _, z, _ = torch.ops.momoe_titan.moe_forward(x, w1, w2, ids, scores, rows, 50.0, False, backend)
        assert z.shape[0] == rows // 2
        with pytest.raises(ValueError, match="num_rows must be at least"):
            momoe_mlp(x, w1, w2, torch.zeros_like(ids), scores, num_rows=rows, **kwargs)


@pytest.mark.parametrize("save_percent", [0, 50, 100])
def test_usual_rows_bound_what_is_saved(save_percent, device, backend):
    """More rows than usual, or fewer: the same to the bit, with z for the share of the usual ones."""
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    want, _ = run(momoe_mlp, x, w1, w2, ids, scores, dout, 0, backend=backend)
    saved = []
    for usual in (ids.numel() // 2, 0, ids.numel()):
        got, _ = run(
            momoe_mlp,
            x,
            w1,
            w2,
            ids,
            scores,
            dout,
            save_percent,
            usual_rows=usual,
            backend=backend,
            on_saved=saved.append,
        )
        for name, g, w in zip(NAMES, got, want, strict=True):
            assert torch.equal(g, w), (name, usual)
    shares = [usual * save_percent // 100 for usual in (ids.numel() // 2, ids.numel())]
    assert [z.shape[0] for z in saved] == (shares if save_percent else [])
    with pytest.raises(ValueError, match="usual_rows must be from 0 to num_rows = 3, got 4"):
        momoe_mlp(x, w1, w2, torch.full_like(ids, -1), scores, num_rows=3, usual_rows=4, backend=backend)


def test_an_expert_named_twice_counts_twice(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs((20, 32, 32, 4, 2), torch.float32, device)
    ids[7] = 2
    got, _ = run(momoe_mlp, x, w1, w2, ids, scores, dout, 50, backend=backend)
    assert_close(got, oracle(x, w1, w2, ids, scores, dout)[0], run(momoe_mlp_ref, x, w1, w2, ids, scores, dout)[0])


def test_nan_stays_in_its_token(device, backend):
    x, w1, w2, ids, scores, _ = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    clean, _ = momoe_mlp(x, w1, w2, ids, scores, backend=backend)
    x[11] = float("nan")
    out, counts = momoe_mlp(x, w1, w2, ids, scores, backend=backend)
    others = [t for t in range(len(x)) if t != 11]
    assert out[11].isnan().all() and torch.equal(out[others], clean[others])
    assert counts.sum() == ids.numel()


def test_strided_inputs(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    ones = torch.ones_like(x)
    want, _ = run(momoe_mlp, x, w1, w2, ids, scores, ones, backend=backend)
    leaves = [t.detach().clone().requires_grad_() for t in (x.t().contiguous(), w1, w2, scores)]
    out, _ = momoe_mlp(leaves[0].t(), *leaves[1:3], ids.t().contiguous().t(), leaves[3], backend=backend)
    out.sum().backward()  # a gradient of stride 0
    got = (out.detach(), leaves[0].grad.t(), *(t.grad for t in leaves[1:]))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_a_second_derivative_is_refused(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w1, w2, scores)]
    out, _ = momoe_mlp(*leaves[:3], ids, leaves[3], 37, backend=backend)
    want = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    got = torch.autograd.grad(out, leaves, dout, create_graph=True)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    for leaf in leaves:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(got[0].square().sum(), leaf, retain_graph=True)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda x: momoe_mlp(x, w1, w2, ids, scores, backend=backend)[0], (x,), (x,))


def test_vmap_within_autograd(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    x.requires_grad_()

    def forward(x):
        return momoe_mlp(x, w1, w2, ids, scores, 50, backend=backend)[0]

    (want,) = torch.autograd.grad(forward(x), x, dout)
    both = torch.func.vmap(forward)(torch.stack([x, 2 * x]))
    (got,) = torch.autograd.grad(both[0], x, dout)
    torch.testing.assert_close(got, want)


def test_an_output_without_a_gradient(device, backend):
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out, other):
            return out + other

        @staticmethod
        def backward(ctx, grad):
            return None, grad

    x, w1, w2, ids, scores, _ = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    other = torch.zeros_like(x).requires_grad_()
    out, _ = momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, backend=backend)
    Dropped.apply(out, other).sum().backward()
    assert x.grad is None and (other.grad == 1).all()


def test_gradients_only_where_wanted(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    want, _ = run(momoe_mlp, x, w1, w2, ids, scores, dout, backend=backend)
    for wanted, index in (((x, 1)), (w1, 2), (w2, 3), (scores, 4)):
        wanted.requires_grad_()
        out, _ = momoe_mlp(x, w1, w2, ids, scores, backend=backend)
        (grad,) = torch.autograd.grad(out, wanted, dout)
        wanted.requires_grad_(False)
        assert torch.equal(grad, want[index])


def saved_bytes(inputs, save_percent, backend):
    x, w1, w2, ids, scores, _ = inputs
    own = {t.untyped_storage().data_ptr() for t in inputs}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, save_percent, backend=backend)
    return sum(kept.values())


@pytest.mark.parametrize("save_percent", [0, 1, 37, 99, 100])
def test_keeps_what_the_table_says(save_percent, device, backend):
    T, D, F, E, K = shape = (300, 32, 32, 4, 2)
    held = saved_bytes(make_inputs(shape, torch.float16, device), save_percent, backend)
    z = T * K * save_percent // 100 * 2 * F * 2
    assert z <= held <= z + 24 * T * K


def test_backward_gets_no_zero_gradient_of_z(device, monkeypatch):
    """Of an output that has no gradient autograd would make zeros: here a second z, at the peak."""
    from momoe_titan.kernels import op as autograd

    shape = (41, 32, 56, 3, 2)  # of no other test, whose tensors may be alive still
    x, w1, w2, ids, scores, dout = make_inputs(shape, torch.float32, device)
    alive = []

    def spy(*args):
        same = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (ids.numel(), 2 * w2.shape[1])]
        alive.append(len({o.untyped_storage().data_ptr() for o in same}))
        return real(*args)

    real = autograd.torch_backward
    monkeypatch.setattr(autograd, "torch_backward", spy)
    out, _ = momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, 100, backend="torch")
    out.backward(dout)
    assert alive == [1]  # z itself


def test_no_grad_keeps_and_writes_no_z(device, backend, monkeypatch):
    from momoe_titan.kernels import op as autograd

    rows = []
    real = autograd.num_saved_rows
    monkeypatch.setattr(autograd, "num_saved_rows", lambda *a: rows.append(real(*a)) or rows[-1])
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    with_grad, _ = run(momoe_mlp, x, w1, w2, ids, scores, dout, 100, backend=backend)
    assert rows == [ids.numel()]
    with torch.no_grad():
        out, _ = momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, 100, backend=backend)
    assert rows[1:] == [0] and not out.requires_grad and torch.equal(out, with_grad[0])


def test_saved_rows_are_exact():
    assert [num_saved_rows(90, p) for p in (0, 1, 37, 99, 100)] == [0, 0, 33, 89, 90]
    assert num_saved_rows(1 << 23, 33.3) == (1 << 23) * 333 // 1000


def test_float32_parameters_under_autocast(device, backend):
    if device == "cpu" and backend == "triton":
        pytest.skip("CPU autocast is bfloat16, which the interpreter rounds toward zero")
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    dout = dout.bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        got, _ = run(momoe_mlp, x, w1, w2, ids, scores, dout, 37, backend=backend)
    assert got[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in got[1:])
    rounded = [t.bfloat16() for t in (x, w1, w2)]
    want, _ = run(momoe_mlp, *rounded, ids, scores, dout, 37, backend=backend)
    assert all(torch.equal(g.bfloat16(), w.bfloat16()) for g, w in zip(got, want, strict=True))


def test_scores_of_half_precision(device, backend):
    inputs = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device, scores_dtype=torch.float16)
    got, _ = run(momoe_mlp, *inputs, backend=backend)
    assert got[4].dtype == torch.float16
    assert error(got[4], oracle(*inputs)[0][4]) < 1e-3


def test_compiles_whole_and_for_any_token_count(device, backend):
    graphs = []

    def counting_backend(graph, example_inputs):
        graphs.append(graph)
        return graph

    def layer(x, w1, w2, ids, scores):
        return momoe_mlp(x * 2, w1, w2, ids, scores, 37, backend=backend)[0] * 0.5

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting_backend)
    for tokens in (12, 30, 21):
        x, w1, w2, ids, scores, _ = make_inputs((tokens, 32, 32, 4, 2), torch.float32, device)
        assert torch.equal(compiled(x, w1, w2, ids, scores), layer(x, w1, w2, ids, scores))
    assert len(graphs) == 1


def test_compiles_whole_for_any_save_percent(device, backend):
    x, w1, w2, ids, scores, _ = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    want, _ = momoe_mlp(x, w1, w2, ids, scores, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(momoe_mlp, fullgraph=True, dynamic=True, backend="aot_eager")
    for save_percent in (10.0, 37.5, 60.0):
        assert torch.equal(compiled(x.requires_grad_(), w1, w2, ids, scores, save_percent, backend=backend)[0], want)


def test_aot_autograd_traces_both_ways(device, backend):
    inputs = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    compiled = torch.compile(lambda *a: momoe_mlp(*a, 37, backend=backend), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    want, _ = run(momoe_mlp, *inputs, 37, backend=backend)
    got, _ = run(compiled, *inputs)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_fake_implementations(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w1, w2, scores)]
    args = (*leaves[:3], ids, leaves[3], ids.numel(), 37.0, False, backend)
    torch.library.opcheck(
        torch.ops.momoe_titan.moe_forward.default, args, test_utils=("test_schema", "test_faketensor")
    )
    with torch.no_grad():
        _, _, z, routing = torch.ops.momoe_titan.moe_forward(*args)
        args = (dout, x, w1, w2, scores, z, routing, ids.numel(), 37.0, [True, False, True, True], backend)
        for op in (torch.ops.momoe_titan.moe_backward.default, torch.ops.momoe_titan.moe_backward_over_z.default):
            torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("save_percent", [37, 100])
def test_z_is_given_up_only_by_the_last_backward(device, backend, save_percent, monkeypatch):
    from momoe_titan.kernels import op as autograd

    over = []
    real = autograd._is_last_use
    monkeypatch.setattr(autograd, "_is_last_use", lambda *args: over.append(real(*args)) or over[-1])
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, w1, w2, scores)]
    out, _ = momoe_mlp(*leaves[:3], ids, leaves[3], save_percent, backend=backend)
    kept, again, last = (torch.autograd.grad(out, leaves, dout, retain_graph=keep) for keep in (True, True, False))
    assert over == [False, False, True]
    for other in (again, last):
        assert all(torch.equal(a, b) for a, b in zip(kept, other, strict=True))


@pytest.mark.parametrize("save_percent", [37, 100])
def test_shed_z_is_computed_again(device, backend, save_percent):
    """To the bit, by each backward of a kept graph too, whether shed before the first or after it."""
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float16, device)
    leaves = [t.requires_grad_() for t in (x, w1, w2, scores)]
    want = []
    for shed_at in (None, 0, 1):
        kept = []
        out, _ = momoe_mlp(*leaves[:3], ids, leaves[3], save_percent, backend=backend, on_saved=kept.append)
        (z,) = kept
        assert z.shape == (num_saved_rows(ids.numel(), save_percent), 2 * w2.shape[1])
        for i in range(2):
            if i == shed_at:
                z.untyped_storage().resize_(0)
            got = torch.autograd.grad(out, leaves, dout, retain_graph=i < 1)
            want = want or got
            for name, g, w in zip(NAMES[1:], got, want, strict=True):
                assert torch.equal(g, w), (name, shed_at, i)


def test_z_is_shown_only_where_it_is_kept(device, backend):
    x, w1, w2, ids, scores, _ = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    shown = []
    momoe_mlp(x, w1, w2, ids, scores, 100, backend=backend, on_saved=shown.append)
    momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, 0, backend=backend, on_saved=shown.append)
    assert not shown


@pytest.mark.parametrize("shed", [False, True])
def test_shedding_frees_z(device, backend, shed):
    """Nobody but the graph holds what on_saved was shown."""
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    storages = []

    def on_saved(z):
        storages.append(weakref.ref(z.untyped_storage()))

    out, _ = momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, 100, backend=backend, on_saved=on_saved)
    (storage,) = storages
    assert storage().nbytes() == ids.numel() * 2 * w2.shape[1] * 4
    if shed:
        storage().resize_(0)
        assert storage().data_ptr() == 0
    out.backward(dout)
    if backend == "triton" and interpreting():
        gc.collect()  # Triton's interpreter leaves circles of objects that hold its arguments
    assert storage() is None


@pytest.mark.parametrize("save_percent", [0, 37, 100])
def test_dw2_before_or_after_dz_is_let_go(device, save_percent, monkeypatch):
    """The same gradients; z, and where dw2 comes last dz too, are gone by then."""
    from momoe_titan.kernels import op as autograd

    some = Experts(torch.empty(1, 64, 128), torch.empty(1, 64, 64))
    gemms = type(autograd.select_gemms(torch.empty(0, 64, dtype=torch.float16, device=device), some))
    kept, seen = [], []

    def spied(name, real):
        def weight_grad(*args):
            seen.append((name, *(z.untyped_storage().nbytes() > 0 for z in kept)))
            real(*args)

        return weight_grad

    memory_schedule = autograd.memory_schedule

    def in_order(last, *args):
        return dataclasses.replace(memory_schedule(*args), dw2_last=last)

    monkeypatch.setattr(gemms, "up_weight_grad", spied("dw1", gemms.up_weight_grad))
    monkeypatch.setattr(gemms, "down_weight_grad", spied("dw2", gemms.down_weight_grad))
    x, w1, w2, ids, scores, dout = make_inputs((40, 64, 64, 4, 2), torch.float16, device)
    leaves, results = [t.requires_grad_() for t in (x, w1, w2, scores)], []
    for last in (False, True):
        schedule = functools.partial(in_order, last)
        monkeypatch.setattr(autograd, "memory_schedule", schedule)
        kept.clear()
        out, _ = momoe_mlp(*leaves[:3], ids, leaves[3], save_percent, backend="triton", on_saved=kept.append)
        results.append(torch.autograd.grad(out, leaves, dout))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [name for name, *_ in seen] == ["dw2", "dw1", "dw1", "dw2"]
    if save_percent:  # in a buffer of its own, dz needs z no more
        has_z = gemms.traits.dz_over_z
        assert [alive for _, alive in seen] == [has_z, has_z, has_z, False]


def test_another_backward_after_an_error_is_refused(device, backend, monkeypatch):
    from momoe_titan.kernels import op as autograd

    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    out, _ = momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, 100, backend=backend)
    with monkeypatch.context() as patched:
        patched.setattr(autograd, "unpack_routing", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            out.backward(dout)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(dout)


def test_batched_gradients(device, backend):
    x, w1, w2, ids, scores, dout = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    out, _ = momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, 37, backend=backend)
    douts = torch.stack([dout, -dout, 2 * dout])
    want = [torch.autograd.grad(out, x, d, retain_graph=True)[0] for d in douts]
    (got,) = torch.autograd.grad(out, x, douts, is_grads_batched=True)
    torch.testing.assert_close(got, torch.stack(want))


def test_selective_checkpointing_saves_the_op_by_name(device, backend, monkeypatch):
    from momoe_titan.kernels import op as autograd

    calls = []
    real = autograd.num_saved_rows
    monkeypatch.setattr(autograd, "num_saved_rows", lambda *a: calls.append(1) or real(*a))
    saved = torch.ops.momoe_titan.moe_forward.default
    inputs = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == saved else CheckpointPolicy.PREFER_RECOMPUTE

    def checkpointed(context_fn, *args):
        kwargs = {"context_fn": context_fn} if context_fn else {}
        return checkpoint(lambda *a: momoe_mlp(*a, 37, backend=backend), *args, use_reentrant=False, **kwargs)

    want, _ = run(momoe_mlp, *inputs, 37, backend=backend)
    for context_fn, forwards in ((lambda: create_selective_checkpoint_contexts(policy), 1), (None, 2)):
        calls.clear()
        got, _ = run(functools.partial(checkpointed, context_fn), *inputs)
        assert len(calls) == forwards
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


BAD = {
    "save_percent must be a number from 0 to 100, got -1": dict(save_percent=-1),
    "save_percent must be a number from 0 to 100, got 101": dict(save_percent=101),
    "save_percent must be a number from 0 to 100, got nan": dict(save_percent=float("nan")),
    "save_percent must be a number from 0 to 100, got '50'": dict(save_percent="50"),
    "save_percent must be a number from 0 to 100, got True": dict(save_percent=True),
    "backend must be one of .*, got 'cuda'": dict(backend="cuda"),
    "x must have D = 32 columns, got \\(45, 31\\)": dict(x=torch.randn(45, 31)),
    "w1 must be .* to go with w2, got \\(3, 32, 95\\)": dict(w1=torch.randn(3, 32, 95)),
    "ids and scores must both be .*, got \\(45, 2\\) and \\(45, 3\\)": dict(scores=torch.randn(45, 3)),
    "ids must have at least one column, got \\(45, 0\\)": dict(
        ids=torch.empty(45, 0, dtype=torch.int64), scores=torch.empty(45, 0)
    ),
    "ids must be int32 or int64, got torch.float32": dict(ids=torch.zeros(45, 2)),
    "scores must be of a floating dtype, got torch.int64": dict(scores=torch.zeros(45, 2, dtype=torch.int64)),
    "x must be bfloat16, float16 or float32, got torch.float64": dict(x=torch.randn(45, 32, dtype=torch.float64)),
    "must share a dtype outside of autocast, got torch.float16": dict(x=torch.randn(45, 32).half()),
    "num_rows must be from 0 to T \\* K = 90, got 91": dict(num_rows=91),
    "num_rows must be an int, got 45.0": dict(num_rows=45.0),
    "num_rows must be an int, got True": dict(num_rows=True),
    "w2 must be of 1 to 65536 experts, got \\(0, 48, 32\\)": dict(w1=torch.empty(0, 32, 96), w2=torch.empty(0, 48, 32)),
    "w2 must be of 1 to 65536 experts, got \\(65537, 1, 32\\)": dict(
        w1=torch.empty(65537, 32, 2), w2=torch.empty(65537, 1, 32)
    ),
    "ids must be in \\[0, 3\\), got -1": dict(ids=torch.full((45, 2), -1), check_ids=True),
    "ids must be in \\[0, 3\\), got 5": dict(ids=torch.full((45, 2), 5), check_ids=True),
    "must not name an expert twice for a token, got \\[1, 1\\] for token 0": dict(
        ids=torch.full((45, 2), 1), check_ids=True
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    x, w1, w2, ids, scores, _ = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, "cpu")
    arguments = dict(x=x, w1=w1, w2=w2, ids=ids, scores=scores, backend="torch") | BAD[message]
    positional = [arguments.pop(name) for name in ("x", "w1", "w2", "ids", "scores")]
    with pytest.raises(ValueError, match=message):
        momoe_mlp(*positional, **arguments)


def test_more_rows_than_the_tiles_can_number_are_refused(backend, device, monkeypatch):
    from momoe_titan.kernels import op as autograd

    monkeypatch.setattr(autograd, "MAX_TILES", 0)
    x, w1, w2, ids, scores, _ = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, device)
    with pytest.raises(ValueError, match="T \\* K must be at most 0, got 90: split the batch"):
        momoe_mlp(x, w1, w2, ids, scores, backend=backend)


def test_views_off_their_alignment_are_copied():
    from momoe_titan.kernels.op import _aligned

    flat = torch.randn(64)
    assert _aligned(flat[:8]).data_ptr() == flat.data_ptr()
    moved = _aligned(flat[1:9])
    assert moved.data_ptr() % 16 == 0 and torch.equal(moved, flat[1:9])


def test_triton_backend_is_refused_without_a_device(monkeypatch):
    from momoe_titan.kernels import gpu

    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    x, w1, w2, ids, scores, _ = make_inputs(SHAPES["tiles_cross_experts"], torch.float32, "cpu")
    with pytest.raises(ValueError, match="backend 'triton' needs a CUDA device"):
        momoe_mlp(x, w1, w2, ids, scores, backend="triton")
