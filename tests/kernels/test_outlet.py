"""An op that sends the rows of others from inside writes the same rows, and sends none before it is written."""

import dataclasses

import pytest
import torch

from momoe_titan.kernels import momoe_mlp, op
from momoe_titan.kernels.outlet import OUTLETS, Blocks

T, D, F, E, K = 12, 16, 8, 4, 2
LARGE = (768, 256, 128, 8, 2)
NAME = "test"


class Sent:
    """Keeps what leaves; of three GPUs this is the second."""

    def __init__(self, log: list):
        self.log, self.staged = log, []

    def stage(self, rows_MC: torch.Tensor) -> Blocks:
        third = rows_MC.shape[0] // 3
        places = [torch.full_like(rows_MC[:third], torch.nan) for _ in range(2)]
        self.staged.append((rows_MC, places))
        return Blocks((third, 2 * third), [(0, third, places[0]), (2 * third, 3 * third, places[1])])

    def start(self) -> None:
        assert not any(place.isnan().any() for _, places in self.staged for place in places)
        self.log.append([(rows, *(place.clone() for place in places)) for rows, places in self.staged])


@pytest.fixture
def log(monkeypatch):
    log = []
    monkeypatch.setitem(OUTLETS, NAME, lambda: Sent(log))
    return log


@pytest.fixture
def in_two_ranges(monkeypatch):
    schedule = op._schedule

    def halved(gemms, x_TD, *args, **options):
        width = x_TD.shape[1]
        halves = (0, width // 2), (width // 2, width)
        return dataclasses.replace(schedule(gemms, x_TD, *args, **options), y_ranges=halves, dx_ranges=halves)

    monkeypatch.setattr(op, "_schedule", halved)


def run(backend: str, outlet: str, sizes=(T, D, F, E, K), device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    T, D, F, E, K = sizes
    shapes = (T, D), (E, D, 2 * F), (E, F, D), (T, D)
    x, w1, w2, dout = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    scores = torch.rand(T, K, device=device)
    ids = torch.rand(T, E, device=device).topk(K, dim=1)[1]
    leaves = [t.requires_grad_() for t in (x, scores, w1, w2)]
    out, _ = momoe_mlp(x, w1, w2, ids, scores, 50.0, backend=backend, outlet=outlet)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_of_others_leave_once_they_are_written(backend, log, in_two_ranges):
    check(log, backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_others_leave_a_gpu_once_they_are_written(dtype, log, in_two_ranges):
    check(log, "triton", LARGE, "cuda", dtype)


def check(log, *how):
    """The op with an outlet against the op without."""
    backend, *more = how
    plain = run(backend, "", *more)
    assert not log
    out, dx, dscores, dw1, dw2 = run(backend, NAME, *more)
    for got, want in zip((dw1, dw2), plain[3:], strict=True):
        assert torch.equal(got, want)
    (forward,), backward = log
    assert len(backward) == 2
    places = {"out": forward, "scores": backward[0], "x": backward[1]}
    for name, got, want in (("out", out, plain[0]), ("x", dx, plain[1]), ("scores", dscores, plain[2])):
        rows, first, last = places[name]
        assert rows.data_ptr() == got.data_ptr()  # where what others send arrives
        third = got.shape[0] // 3
        assert torch.equal(torch.cat([first, got[third : 2 * third], last]), want), name


def test_what_needs_no_gradient_does_not_leave(log):
    torch.manual_seed(0)
    x, w1, w2 = torch.randn(T, D), torch.randn(E, D, 2 * F, requires_grad=True), torch.randn(E, F, D)
    ids, scores = torch.arange(T * K).view(T, K) % E, torch.rand(T, K, requires_grad=True)
    out, _ = momoe_mlp(x, w1, w2, ids, scores, backend="torch", outlet=NAME)
    out.sum().backward()
    assert [len(sent) for sent in log] == [1, 1] and log[1][0][0].shape == (T, K)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_backward_for_the_weights_alone_sends_nothing(backend, log):
    """The second half of a zero-bubble pipeline's backward: nobody waits there for the gradients of tokens."""
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((T, D), (T, K))]
    w1, w2 = (torch.randn(shape, requires_grad=True) for shape in ((E, D, 2 * F), (E, F, D)))
    x, scores = (leaf.sin() for leaf in leaves)
    ids = torch.arange(T * K).view(T, K) % E
    out, _ = momoe_mlp(x, w1, w2, ids, scores, backend=backend, outlet=NAME)
    log.clear()
    for inputs, sent in ((leaves, [2]), ([w1, w2], []), (leaves[1:], [1]), (leaves[:1], [1])):
        found = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
        assert [len(together) for together in log] == sent and all(gradient.any() for gradient in found)
        log.clear()


def test_autocast_casts_no_tokens_whose_gradients_are_under_way(log):
    """The gradient of a cast would be read before what others send has arrived."""
    torch.manual_seed(0)
    w1, w2 = torch.randn(E, D, 2 * F, requires_grad=True), torch.randn(E, F, D, requires_grad=True)
    x, scores, ids = torch.randn(T, D), torch.rand(T, K), torch.arange(T * K).view(T, K) % E
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match="outlet: x must be torch.bfloat16, autocast's, got torch.float32"):
            momoe_mlp(x.requires_grad_(), w1, w2, ids, scores, backend="torch", outlet=NAME)
        assert not log
        narrow = x.detach().bfloat16().requires_grad_()
        for tokens in (narrow, x.detach()):  # no cast, and one without a backward
            momoe_mlp(tokens, w1, w2, ids, scores, backend="torch", outlet=NAME)[0].sum().backward()
    assert [len(sent) for sent in log] == [1, 1, 1] and narrow.grad is not None and w1.grad is not None
