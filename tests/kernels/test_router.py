"""The router's kernels against torch: the choice and its order exactly, scores and gradients to float32."""

import pytest
import torch

from momoe_titan.kernels import router
from momoe_titan.kernels.router import bfloat16_parts, float32_product, route

INF, NAN = float("inf"), float("nan")


def route_ref(logits_TE, bias_E, top_k, score_func, normalize=False, scale=1.0):
    """The documented rules in torch."""
    largest = torch.finfo(torch.float32).max
    logits_TE = logits_TE.clamp(-largest, largest)
    scores_TE = logits_TE.sigmoid() if score_func == "sigmoid" else logits_TE.softmax(1)
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if score_func == "softmax_of_chosen":
        choice_TE = choice_TE.masked_fill(choice_TE.isnan(), -INF)
    ids_TK = choice_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    if score_func == "softmax_of_chosen":
        ids_TK = ids_TK.sort(dim=1).values
        scores_TK = logits_TE.gather(1, ids_TK).softmax(1)
    else:
        scores_TK = scores_TE.gather(1, ids_TK)
    if normalize:
        scores_TK = scores_TK / (scores_TK.sum(1, keepdim=True) + 1e-20)
    return scores_TK * scale, ids_TK


def both(logits, bias, *how, dscores=None):
    """[(scores, ids, dlogits)] of the kernels and of the reference."""
    results = []
    for function in (route, route_ref):
        leaf = logits.clone().requires_grad_()
        scores, ids = function(leaf, bias, *how)
        torch.manual_seed(1)
        dscores = torch.randn(scores.shape, device=scores.device)
        (dlogits,) = torch.autograd.grad(scores, leaf, dscores)
        results.append((scores.detach(), ids, dlogits))
    return results


HOW = {  # (E, K, score function, normalise, scale)
    "softmax": (40, 4, "softmax", False, 2.5),
    "softmax normalised": (64, 8, "softmax", True, 1.0),
    "sigmoid": (7, 3, "sigmoid", False, 1.0),
    "sigmoid normalised": (128, 6, "sigmoid", True, 2.5),
    "of chosen": (33, 5, "softmax_of_chosen", False, 1.0),
    "all of few": (4, 4, "softmax", True, 1.0),
    "one of one": (1, 1, "sigmoid", True, 1.0),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", HOW)
def test_matches_torch(name, biased, device):
    experts, *how = HOW[name]
    torch.manual_seed(0)
    logits = torch.randn(67, experts, device=device) * 3
    bias = torch.randn(experts, device=device) * 0.1 if biased else None
    got, want = both(logits, bias, *how)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid", "softmax_of_chosen"])
def test_ties_infinities_and_nan(score_func, device):
    rows = [
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [1.0, 2.0, 1.0, 2.0, 1.0],
        [-0.0, 0.0, -0.0, 0.0, 0.0],
        [0.0, INF, -INF, INF, 0.0],
        [0.0, -INF, INF, -INF, 0.0],
        [-INF] * 5,
        [200.0, 100.0, 300.0, 100.0, 50.0],  # sigmoid: all are 1
        [1.0, NAN, 2.0, NAN, 0.0],
        [NAN] * 5,
    ]
    logits = torch.tensor(rows, device=device)
    tie = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0], device=device)
    for bias in (None, tie, -tie, torch.full((5,), -INF, device=device)):
        got, want = both(logits, bias, 3, score_func)
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], equal_nan=True)
        clean = ~logits.isnan().any(1)
        torch.testing.assert_close(got[2][clean], want[2][clean])


def test_reads_a_range_of_columns(device):
    logits = torch.randn(9, 12, device=device)
    got, want = route(logits[:, 3:8], None, 2, "softmax"), route_ref(logits[:, 3:8], None, 2, "softmax")
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0])


def test_no_token(device):
    scores, ids = route(torch.empty(0, 8, device=device), None, 2, "softmax")
    assert scores.shape == ids.shape == (0, 2)


def test_traces_whole(device):
    logits = torch.randn(12, 8, device=device, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: route(x * 2, None, 2, "sigmoid", True)[0], fullgraph=True, backend="aot_eager")
    want, got = route(logits * 2, None, 2, "sigmoid", True)[0], compiled(logits)
    assert torch.equal(got, want)
    dout = torch.randn_like(want)
    assert torch.equal(torch.autograd.grad(got, logits, dout)[0], torch.autograd.grad(want, logits, dout)[0])
    args = (logits, None, 2, "softmax", True, 1.0)
    torch.library.opcheck(torch.ops.momoe_titan.route.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("by_rows", [True, False])
def test_parts_add_up(by_rows, device):
    t = torch.randn(37, 70, device=device)
    if device == "cpu":  # the interpreter rounds bfloat16 toward zero: 24 bits then need not fit
        t = (t * 2**12).round() / 2**12
    for matrix in (t, t.t()):
        high, middle, again, low = bfloat16_parts(matrix, by_rows).float().chunk(4, dim=0 if by_rows else 1)
        assert torch.equal(high, again)
        assert torch.equal((low.double() + middle + high).float(), matrix)
        assert (middle.abs() <= high.abs() * 2**-7).all()


def mm(a, b, out_dtype=None):
    return (a.float() @ b.float()).to(out_dtype or a.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_core_product(dtype, device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(router.torch, "mm", mm)  # out_dtype is CUDA's
        monkeypatch.setattr(router, "runs_here", lambda t: True)
    torch.manual_seed(0)
    x = torch.randn(300, 256, device=device).bfloat16().requires_grad_()
    w = (torch.randn(24, 256, device=device) / 16).to(dtype).requires_grad_()
    dout = torch.randn(300, 24, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = float32_product(x, w)
    assert out.dtype == torch.float32 and type(out.grad_fn).__name__ == "_TensorCoreProductBackward"
    got = (out, *torch.autograd.grad(out, (x, w), dout))
    x64, w64, dout64 = x.detach().double(), w.detach().double(), dout.double()
    want = (x64 @ w64.t(), dout64 @ w64, dout64.t() @ x64)
    for g, exact, rounded in zip(got, want, (torch.float32, torch.bfloat16, dtype), strict=True):
        error = ((g.detach().double() - exact).norm() / exact.norm()).item()
        best = ((exact.to(rounded).double() - exact).norm() / exact.norm()).item()
        assert g.dtype == rounded and error <= max(1.02 * best, 1e-6)


def test_both_routers_use_it(device, monkeypatch):
    from torchtitan.models.moe import MoEArgs

    from momoe_titan.model.router import MomoeRouter
    from momoe_titan.moe import layers
    from momoe_titan.moe import router as core

    torch.manual_seed(0)
    ours = layers.TopKRouter(16, 10, 5, 2, Wg_DN=torch.randn(16, 10, device=device))
    titan = MomoeRouter(
        16, MoEArgs(num_experts=10, top_k=4, score_func="sigmoid", route_norm=True, route_scale=2.5)
    ).to(device)
    x, bias = torch.randn(33, 16, device=device), torch.randn(10, device=device) * 0.1
    calls, results = [], []
    for kernels in (False, True):
        monkeypatch.setattr(core, "runs_here", lambda t, kernels=kernels: kernels)
        monkeypatch.setattr(core, "route", lambda *args: calls.append(args) or route(*args))
        ids, scores = ours.route(x, bias)
        scores_titan, ids_titan = titan(x, bias)
        grads = torch.autograd.grad((scores**2).sum() + (scores_titan**2).sum(), (ours.Wg_DN, titan.gate.weight))
        results.append((ids, ids_titan, scores, scores_titan, *grads))
        assert len(calls) == 2 * kernels
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_gate_has_no_product_of_float32(dtype, monkeypatch):
    """Of its forward and backward as torch.compile traces them, for a GPU: CUDA cores would multiply float32."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import default_partition

    class Traced(Exception):
        pass

    joint = []

    def partition(graph, *args, **kwargs):
        joint.append(graph)
        return default_partition(graph, *args, **kwargs)

    def run_nothing(graph, inputs):
        raise Traced

    monkeypatch.setattr(router, "runs_here", lambda t: True)
    x = torch.randn(32, 16).bfloat16().requires_grad_()
    w = torch.randn(8, 16).to(dtype).requires_grad_()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Traced"):
        torch.compile(float32_product, backend=aot_autograd(fw_compiler=run_nothing, partition_fn=partition))(x, w)
    products = [node for node in joint[0].graph.nodes if "mm" in str(node.target)]
    assert len(products) == 3
    operands = {operand.meta["val"].dtype for product in products for operand in product.args[:2]}
    assert operands == {torch.bfloat16}
