"""Weights as others keep them, and experts that are more than a SwiGLU, against a float64 oracle."""

import functools
from types import SimpleNamespace

import pytest
import torch

from momoe_titan.kernels import ACTIVATIONS, ORDERS, gemms, momoe_grouped_mlp, momoe_mlp, momoe_mlp_ref, op, versions
from momoe_titan.kernels.activations import activate, activate_backward, is_gated
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.hopper import launch as hopper
from momoe_titan.kernels.hopper.launch import Stacked
from momoe_titan.kernels.memory_schedule import memory_schedule
from tests.kernels.test_op import error

# (T, D, F, E, K): small, because the interpreter is slow; odd widths, and 19 rows of an expert in tiles of 16
SHAPE = (19, 20, 23, 2, 2)
LAYOUTS = {
    # name: (order, how w1 is stored, how w2 is stored)
    "own": ("up_gate", "in_out", "in_out"),
    "gate first": ("gate_up", "in_out", "in_out"),
    "out_in": ("gate_up", "out_in", "out_in"),
    "two tensors": (None, "in_out", "in_out"),
    "two tensors, out_in": (None, "out_in", "out_in"),
    "halves of one tensor": (None, "views", "in_out"),
    "interleaved": ("interleaved_gate_up", "in_out", "in_out"),
    "interleaved, out_in": ("interleaved_up_gate", "out_in", "in_out"),
    "experts last": ("up_gate", "experts_last", "experts_last"),
    "experts apart": ("up_gate", "apart", "in_out"),
}


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def stored(w, how):
    """The same (E, in, out) values in other memory."""
    if how == "in_out":
        return w.contiguous()
    if how == "out_in":
        return w.transpose(1, 2).contiguous().transpose(1, 2)
    return w.permute(1, 2, 0).contiguous().permute(2, 0, 1)


class Layer:
    """Inputs, and the same in float64."""

    def __init__(
        self, shape, layout="own", activation="swiglu", biases=False, dtype=torch.float32, device="cpu", **kind
    ):
        T, D, F, E, K = shape
        order, w1_is, w2_is = LAYOUTS[layout]
        self.kind = dict(activation=activation, order=order or "up_gate", **kind)
        gated = is_gated(activation)

        def randn(*size, scale=1.0):
            return (torch.randn(size, device=device) * scale).to(dtype)

        w1 = randn(E, D, (1 + gated) * F, scale=1.5 * D**-0.5)
        self.tensors = {"x": randn(T, D), "scores": torch.rand(T, K, device=device)}
        if order is None:
            if w1_is == "views":  # one leaf; the op sees two views of it
                self.parts = lambda w: w.split(F, dim=2)
                self.tensors["w1"] = w1
            else:
                self.tensors |= {"up": stored(w1[:, :, :F], w1_is), "gate": stored(w1[:, :, F:], w1_is)}
        elif w1_is == "apart":  # one leaf with more rows than the op sees of an expert
            self.parts = lambda w: w[:, :D]
            self.tensors["w1"] = torch.cat([w1, w1[:, :8]], dim=1)
        else:
            self.tensors["w1"] = stored(w1, w1_is)
        self.tensors["w2"] = stored(randn(E, F, D, scale=F**-0.5), w2_is)
        if biases:
            self.tensors |= {"bias1": randn(E, w1.shape[2]), "bias2": randn(E, D)}
        self.ids = torch.rand(T, E, device=device).topk(K, -1)[1]
        self.dout = randn(T, D)

    def weights(self, t):
        if "up" in t:
            return t["up"], t["gate"]
        return self.parts(t["w1"]) if hasattr(self, "parts") else t["w1"]

    def experts(self):
        """As the op has them."""
        t, kind = self.tensors, self.kind
        weights = self.weights(t)
        w1, gate = weights if isinstance(weights, tuple) else (weights, None)
        return Experts(w1, t["w2"], gate, t.get("bias1"), t.get("bias2"), **kind)

    def run(self, fn, dtype=None, wanted=None, **options):
        """out and the gradient of each tensor, by name."""
        wanted = wanted or tuple(self.tensors)
        t = {name: v.detach().to(dtype or v.dtype).requires_grad_(name in wanted) for name, v in self.tensors.items()}
        biases = {name: t.get(name) for name in ("bias1", "bias2")}
        out, _ = fn(t["x"], self.weights(t), t["w2"], self.ids, t["scores"], **biases, **self.kind, **options)
        grads = torch.autograd.grad(out, [t[name] for name in wanted], self.dout.to(out.dtype))
        return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}

    def check(self, **options):
        """Errors at most twice those of torch in the same dtype, the same bits at every save_percent, and gradients
        stored as their weights are."""
        want, torchs = self.run(momoe_mlp_ref, torch.float64), self.run(momoe_mlp_ref)
        got, *others = (self.run(momoe_mlp, save_percent=p, **options) for p in (37, 0, 100))
        assert all(torch.equal(other[name], got[name]) for other in others for name in got)
        for name in want:
            dtype = got[name].dtype
            floor = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 0.25)
            allowed = max(2 * error(torchs[name], want[name]), floor)
            assert error(got[name], want[name]) <= allowed, (name, error(got[name], want[name]), allowed)
            if name in ("w1", "w2", "up", "gate"):
                assert got[name].stride() == self.tensors[name].stride(), name
        return got


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, backend, device):
    Layer(SHAPE, layout, device=device).check(backend=backend)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_are_the_same_experts(order, backend, device):
    layer = Layer(SHAPE, device=device)
    want = layer.run(momoe_mlp, backend=backend)
    up, gate = layer.tensors["w1"].chunk(2, dim=2)
    experts = Experts(torch.empty_like(layer.tensors["w1"]), layer.tensors["w2"], order=order)
    for part, values in zip(experts.split(experts.w1), (up, gate), strict=True):
        part.copy_(values)
    layer.tensors["w1"], layer.kind["order"] = experts.w1, order
    got = layer.run(momoe_mlp, backend=backend)
    got["w1"] = torch.cat(experts.split(got["w1"]), dim=2)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, backend, device):
    layer = Layer(SHAPE, activation=activation, biases=True, device=device)
    layer.tensors["x"] *= 4  # some beyond the limits of the clamped one
    layer.check(backend=backend)


@pytest.mark.parametrize("layout", ["interleaved", "two tensors, out_in"])
def test_gpt_oss_in_each_layout(layout, backend, device):
    layer = Layer(SHAPE, layout, "clamped_swiglu", True, device=device)
    layer.check(backend=backend)


@pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2", "clamped_swiglu"])
def test_scores_on_the_input(activation, biases, backend, device):
    layer = Layer(SHAPE, activation=activation, biases=biases, device=device, scores_on_input=True)
    layer.tensors["scores"][3] = 0.0
    layer.check(backend=backend)


@pytest.mark.parametrize("sentinel", [-1, 2])
def test_slots_of_no_expert_have_no_gradient(sentinel, backend, device):
    layer = Layer(SHAPE, biases=True, activation="geglu", device=device)
    layer.ids[torch.rand(layer.ids.shape, device=device) < 0.5] = sentinel
    got = layer.check(backend=backend)
    assert (got["scores"][layer.ids == sentinel] == 0).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_sorted_by_expert(weighted, backend, device):
    """The same as with their ids, and zeros for the rows that belong to no expert."""
    layer = Layer((45, 20, 23, 5, 1), "out_in", biases=True, device=device)
    counts = torch.tensor([7, 0, 20, 3, 9], device=device)
    layer.ids = torch.repeat_interleave(torch.arange(5, device=device), counts)
    layer.ids = torch.cat([layer.ids, layer.ids.new_full((6,), 5)])[:, None]
    if not weighted:
        layer.tensors["scores"].fill_(1.0)
    want = layer.run(momoe_mlp, backend=backend, save_percent=50)

    def grouped(x, w1, w2, ids, scores, **options):
        scores = scores[:, 0] if weighted else None
        return momoe_grouped_mlp(x, w1, w2, counts.int(), scores, **options), None

    got = layer.run(grouped, wanted=tuple(n for n in layer.tensors if weighted or n != "scores"), backend=backend)
    assert all(torch.equal(got[name], want[name]) for name in got)
    assert (got["out"][39:] == 0).all() and (got["x"][39:] == 0).all()


@pytest.mark.parametrize("frozen", [("w1", "w2", "bias1", "bias2"), ("w1",), ("x", "w2"), ("up",)])
def test_frozen_experts(frozen, backend, device, monkeypatch):
    """The same gradients of the others; for a frozen weight none is computed, nor room left by the schedule."""
    layer = Layer(SHAPE, "two tensors" if "up" in frozen else "out_in", biases=True, device=device)
    want = layer.run(momoe_mlp, backend=backend, save_percent=50)
    wanted = tuple(name for name in layer.tensors if name not in frozen)
    computed, planned = [], []
    kind = type(gemms.select_gemms(layer.tensors["x"], layer.experts()))

    def spied(name):
        real = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args: computed.append((name, args[-1])) or real(*args))

    def schedule(sizes, *args):
        planned.append((sizes.trains_w1, sizes.trains_w2))
        return memory_schedule(sizes, *args)

    spied("up_weight_grad")
    spied("down_weight_grad")
    monkeypatch.setattr(op, "memory_schedule", schedule)
    got = layer.run(momoe_mlp, wanted=wanted, backend=backend, save_percent=50)
    assert all(torch.equal(got[name], want[name]) for name in got)
    if backend == "triton":
        trained = any(name in wanted for name in ("w1", "up", "gate")), "w2" in wanted
        assert planned == [trained] * 2  # forward and backward
        names = ("up_weight_grad", "down_weight_grad")
        assert {name for name, _ in computed} == {name for name, needed in zip(names, trained, strict=True) if needed}
        if "up" in frozen:
            (outputs,) = (outputs for name, outputs in computed if name == "up_weight_grad")
            assert outputs[0] is None and outputs[1] is not None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_activations(activation):
    """The kernels' formulas have their own test: `test_activations`."""
    up, gate = torch.randn(2, 300, dtype=torch.float64) * 5
    inputs = [t.requires_grad_() for t in ((up, gate) if is_gated(activation) else (up,))]
    gate = gate if is_gated(activation) else None
    act, *grads = activate_backward(activation, up, gate, torch.ones_like(up))
    want = torch.autograd.grad(activate(activation, up, gate).sum(), inputs)
    torch.testing.assert_close(act, activate(activation, up, gate).detach())
    for g, w in zip(grads, want, strict=False):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_the_hopper_kernels_form_is_that_of_the_columns(order, activation):
    w1, w2 = torch.empty(2, 64, 128 if activation == "swiglu" else 64), torch.empty(2, 64, 64)
    experts = Experts(w1, w2, activation=activation, order=order)
    up, gate, step = experts.columns
    assert hopper._is_gate_first(experts) == (gate < up)
    assert hopper._form(experts) == ("ungated" if activation == "relu2" else {1: "halves", 2: "interleaved"}[step])


BAD = {
    "activation must be one of .*, got 'gelu'": dict(activation="gelu"),
    "order must be one of .*, got 'gate'": dict(order="gate"),
    "order is that of one w1": dict(w1=(torch.empty(3, 32, 48), torch.empty(3, 32, 48)), order="gate_up"),
    "has no gate": dict(w1=(torch.empty(3, 32, 48), torch.empty(3, 32, 48)), activation="relu2"),
    "w1 must be \\(E, D, F\\) = \\(3, 32, 48\\) to go with w2": dict(activation="relu2"),
    "gate must be \\(E, D, F\\) = \\(3, 32, 48\\)": dict(w1=(torch.empty(3, 32, 48), torch.empty(3, 32, 96))),
    "up and gate must be stored alike": dict(
        w1=(torch.empty(3, 32, 48), torch.empty(3, 48, 32).transpose(1, 2)),
    ),
    "bias1 must be \\(E, 96\\)": dict(bias1=torch.empty(3, 48)),
    "bias2 must be \\(E, 32\\)": dict(bias2=torch.empty(3, 48)),
    "must share a dtype": dict(bias2=torch.empty(3, 32, dtype=torch.bfloat16)),
    "must not be an expanded view": dict(w2=torch.empty(1, 48, 32).expand(3, 48, 32)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_experts_are_refused_by_name(message):
    x, ids = torch.randn(9, 32), torch.zeros(9, 1, dtype=torch.int64)
    kind = dict(w1=torch.empty(3, 32, 96), w2=torch.empty(3, 48, 32), backend="torch") | BAD[message]
    with pytest.raises(ValueError, match=message):
        momoe_mlp(x, kind.pop("w1"), kind.pop("w2"), ids, torch.rand(9, 1), **kind)


def test_bad_groups_are_refused_by_name():
    x, w1, w2 = torch.randn(9, 32), torch.empty(3, 32, 96), torch.empty(3, 48, 32)
    grouped = functools.partial(momoe_grouped_mlp, x, w1, w2)
    with pytest.raises(ValueError, match="counts must be int32 or int64 of shape \\(E,\\) = \\(3,\\)"):
        grouped(torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="counts must be int32 or int64"):
        grouped(torch.tensor([4.0, 5.0, 0.0]))
    with pytest.raises(ValueError, match="scores must be \\(R,\\) = \\(9,\\)"):
        grouped(torch.tensor([4, 5, 0]), torch.ones(3))


STRIDES = {
    "own": (lambda: torch.empty(3, 64, 128), (False, 64, 64, 128, 128)),
    "out_in": (lambda: torch.empty(3, 128, 64).mT, (True, 128, 128, 64, 64)),
    "half of the columns": (lambda: torch.empty(3, 64, 256)[:, :, 128:], (False, 64, 64, 128, 256)),
    "half of the rows": (lambda: torch.empty(3, 256, 64)[:, 128:].mT, (True, 256, 128, 64, 64)),
    "one expert": (lambda: torch.empty(1, 64, 128), (False, 64, 64, 128, 128)),
    "experts last": (lambda: torch.empty(64, 128, 3).permute(2, 0, 1), None),
    "rows off 16 bytes": (lambda: torch.empty(3, 64, 129)[:, :, :128], None),
    "experts between rows": (lambda: torch.empty(3, 64 * 136)[:, : 64 * 128].unflatten(1, (64, 128)), "stacked"),
}


@pytest.mark.parametrize("name", STRIDES)
def test_what_tma_can_read(name):
    make, want = STRIDES[name]
    found = Stacked.of(make())
    if want == "stacked":  # 68 rows of 128 from one expert to the next
        assert (found.rows, found.height) == (68, 64)
    else:
        assert (found and (found.is_nk, found.rows, found.height, found.width, found.stride)) == want


def test_the_log_says_once_why_the_portable_kernels_run(monkeypatch, caplog):
    monkeypatch.setattr(versions, "TRITON", (3, 6))
    monkeypatch.setattr(gemms.gpu, "device_properties", lambda device: ((9, 0), "Some GPU"))
    monkeypatch.setattr(gemms.gpu, "interpreting", lambda: False)
    gemms._warn_portable.cache_clear()
    x = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(4, 64), is_cuda=True)
    w1, w2, bias = torch.empty(3, 64, 128), torch.empty(3, 64, 64), torch.empty(3, 128)
    assert isinstance(gemms.select_gemms(x, Experts(w1, w2, bias1=bias)), gemms.HopperGemms)
    assert isinstance(gemms.select_gemms(x, Experts(w1, w2, scores_on_input=True)), gemms.HopperGemms)
    assert not caplog.records
    for _ in range(2):
        refused = Experts(w1, w2, bias1=bias, scores_on_input=True)
        assert isinstance(gemms.select_gemms(x, refused), gemms.PortableGemms)
        refused = Experts(w1, torch.empty(64, 64, 3).permute(2, 0, 1))
        assert isinstance(gemms.select_gemms(x, refused), gemms.PortableGemms)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and "do not take a bias of the first product together with scores" in said[0]
    assert "do not take w2 with strides (1, 192, 3)" in said[1]
