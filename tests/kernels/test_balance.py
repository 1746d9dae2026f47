"""A step of quantile balancing for all layers at once: the kernels against plain torch."""

import pytest
import torch

from momoe_titan.kernels import balance
from momoe_titan.kernels.balance import BalanceStep
from momoe_titan.kernels.quantile import NUM_BINS

SHAPES = {  # layers, E, K, D
    "experts not a power of two": (3, 5, 2, 40),
    "several blocks": (2, 32, 4, 300),
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    return request.param


@pytest.fixture
def by_kernels(monkeypatch):
    """A step whose kernels run, in Triton's interpreter where there is no GPU."""
    monkeypatch.setattr(balance, "runs_here", lambda t: True)
    return BalanceStep()


def in_torch(name, *args):
    """The same method in plain torch, on the CPU."""

    def moved(arg):
        if isinstance(arg, torch.Tensor):
            return arg.cpu().clone()
        return [moved(a) for a in arg] if isinstance(arg, list) else arg

    args = [moved(arg) for arg in args]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(balance, "runs_here", lambda t: False)
        return getattr(BalanceStep(), name)(*args), args


def histograms(layers, experts, device):
    """Margins around 0, of which a fifth of the bins have none; the last layer saw no token."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 50, (layers, experts, NUM_BINS), generator=generator, dtype=torch.int32)
    counts *= torch.rand(layers, experts, NUM_BINS, generator=generator) < 0.8
    counts[-1] = 0
    return counts.to(device)


def biases_of(layers, experts, device):
    generator = torch.Generator().manual_seed(1)
    return [(0.1 * torch.randn(experts, generator=generator)).to(device) for _ in range(layers)]


def test_collect(by_kernels, shape, device):
    layers, experts, _, dim = shape
    counts = [torch.randint(0, 2**40, (experts,), device=device) for _ in range(layers + 1)]
    margins = list(histograms(layers, experts, device).unbind())
    sums = [torch.randn(dim + 1, device=device) for _ in range(layers)]
    groups = [counts, margins, sums]
    (want_flat, want), zeroed = in_torch("collect", groups)
    flat, parts = by_kernels.collect(groups)
    assert torch.equal(flat.cpu(), want_flat) and want_flat[: experts * layers].any()
    assert all(torch.equal(part.cpu(), w) for part, w in zip(parts, want, strict=True))
    assert parts[0].data_ptr() == flat.data_ptr()
    assert not any(t.any() for by in (groups, zeroed[0]) for group in by for t in group)


def test_quantiles_and_solve(by_kernels, shape, device):
    layers, experts, top_k, _ = shape
    histogram_LEB = histograms(layers, experts, device).double()
    want, _ = in_torch("quantiles", histogram_LEB, top_k)
    got = by_kernels.quantiles(histogram_LEB, top_k)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=0, equal_nan=True)
    assert want[-1].isnan().all() and want[:-1].isfinite().all()

    biases = biases_of(layers, experts, device)
    before = [bias.clone() for bias in biases]
    _, (moved, *_) = in_torch("solve", biases, histogram_LEB, top_k, 0.3, None)
    by_kernels.solve(biases, histogram_LEB, top_k, 0.3, None)
    torch.testing.assert_close([bias.cpu() for bias in biases], moved, rtol=0, atol=1e-7)
    assert not torch.equal(biases[0], before[0]) and biases[0].mean().abs() < 1e-7
    assert torch.equal(biases[-1], before[-1])


@pytest.mark.parametrize("skips", [0.0, 1.0])
def test_a_skipped_step_moves_no_bias(by_kernels, device, skips):
    histogram_LEB = histograms(2, 8, device).double()
    for step in (by_kernels, None):
        biases = biases_of(2, 8, device)
        before = biases[0].clone()
        found_inf = torch.tensor(skips, device=device)
        args = biases, histogram_LEB, 2, 1.0, found_inf
        if step is None:
            _, (biases, *_) = in_torch("solve", *args)
        else:
            step.solve(*args)
        assert torch.equal(biases[0].cpu(), before.cpu()) == bool(skips)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_mean_logits(by_kernels, shape, device, dtype, biased):
    layers, experts, _, dim = shape
    weights = [torch.randn(experts, dim, device=device).to(dtype) for _ in range(layers)]
    gate_biases = [torch.randn(experts, device=device).to(dtype) for _ in range(layers)] if biased else []
    sums_LC = torch.randn(layers, dim + 1, device=device).double()
    sums_LC[:, -1] = torch.arange(layers)  # none in the first
    want, _ = in_torch("mean_logits", weights, gate_biases, sums_LC)
    got = by_kernels.mean_logits(weights, gate_biases, sums_LC)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_follow(by_kernels, shape, device, score_func):
    layers, experts, *_ = shape
    before_LE = torch.randn(layers, experts, device=device)
    after_LE = before_LE + 0.3 * torch.randn(layers, experts, device=device)
    after_LE[-1, 2] = float("nan")
    biases = biases_of(layers, experts, device)
    _, (want, *_) = in_torch("follow", biases, before_LE, after_LE, score_func, None)
    by_kernels.follow(biases, before_LE, after_LE, score_func, None)
    torch.testing.assert_close([bias.cpu() for bias in biases], want, rtol=0, atol=1e-6)
    untouched = biases_of(layers, experts, "cpu")
    assert torch.equal(want[-1], untouched[-1]) and not torch.equal(want[0], untouched[0])


def test_tables_are_sent_again_when_a_tensor_has_moved(by_kernels, device):
    histogram_LEB = histograms(2, 8, device).double()
    biases = biases_of(2, 8, device)
    for _ in range(2):
        by_kernels.solve(biases, histogram_LEB, 2, 1.0, None)
    assert by_kernels._biases.sent == 1
    other = [bias.clone() for bias in biases]
    by_kernels.solve(other, histogram_LEB, 2, 1.0, None)
    assert not torch.equal(other[0], biases[0])
