"""Linear and cross entropy by chunks: losses and gradients are those of the whole logits, in float32 and bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from momoe_titan.kernels import cross_entropy
from momoe_titan.kernels.cross_entropy import IGNORED, Shard, linear_cross_entropy, rows_of_chunk
from momoe_titan.kernels.gpu import PlannedGpu, plan_for

SHAPES = {  # (T, D, V)
    "one token": (1, 8, 50),
    "classes that fill no block": (19, 16, 203),
    "several blocks of classes": (3, 8, 4096 + 4096 + 5),
    "a block exactly": (5, 8, 4096),
}


def case(num_tokens, dim, num_classes, dtype=torch.float32, device="cpu", ignored=0.3):
    generator = torch.Generator().manual_seed(num_tokens + num_classes)
    x_TD = torch.randn(num_tokens, dim, generator=generator)
    weight_VD = torch.randn(num_classes, dim, generator=generator) / dim**0.5
    labels_T = torch.randint(num_classes, (num_tokens,), generator=generator)
    labels_T[torch.rand(num_tokens, generator=generator) < ignored] = IGNORED
    x_TD, weight_VD = (t.to(device, dtype).requires_grad_() for t in (x_TD, weight_VD))
    return x_TD, weight_VD, labels_T.to(device)


def with_gradients(loss, *inputs, scale=0.125):
    return [loss.detach(), *torch.autograd.grad(loss * scale, inputs)]


def reference(x_TD, weight_VD, labels_T):
    x_TD, weight_VD = (t.detach().float().requires_grad_() for t in (x_TD, weight_VD))
    loss = F.cross_entropy(F.linear(x_TD, weight_VD), labels_T, reduction="sum")
    return with_gradients(loss, x_TD, weight_VD)


def assert_close(got, want, rtol):
    for mine, theirs in zip(got, want, strict=True):
        assert (mine.float() - theirs).norm() <= rtol * theirs.norm() + 1e-12


def of_rows(x_TD, weight_VD, rows):
    return rows * weight_VD.shape[0] * x_TD.element_size()


@pytest.fixture
def by_kernel(monkeypatch):
    """The kernel, in the interpreter where there is no GPU; otherwise torch computes what is on a CPU."""
    monkeypatch.setattr(cross_entropy, "_run_reference", cross_entropy._run_kernel)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_equals_whole_logits(shape, rows):
    x_TD, weight_VD, labels_T = case(*SHAPES[shape])
    loss = linear_cross_entropy(x_TD, weight_VD, labels_T, chunk_bytes=of_rows(x_TD, weight_VD, rows))
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close(with_gradients(loss, x_TD, weight_VD), reference(x_TD, weight_VD, labels_T), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, dtype, device, by_kernel):
    x_TD, weight_VD, labels_T = case(*SHAPES[shape], dtype, device)
    loss = linear_cross_entropy(x_TD, weight_VD, labels_T, chunk_bytes=of_rows(x_TD, weight_VD, 7))
    got = with_gradients(loss, x_TD, weight_VD)
    assert got[1].dtype == got[2].dtype == dtype
    assert_close(got, reference(x_TD, weight_VD, labels_T), 2e-6 if dtype == torch.float32 else 0.01)
    with torch.no_grad():
        again = linear_cross_entropy(x_TD, weight_VD, labels_T, chunk_bytes=of_rows(x_TD, weight_VD, 7))
    assert torch.equal(again, got[0])


@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_every_token_ignored(by, request):
    if by == "kernel":
        request.getfixturevalue("by_kernel")
    x_TD, weight_VD, labels_T = case(4, 8, 50, ignored=1.1)
    got = with_gradients(linear_cross_entropy(x_TD, weight_VD, labels_T), x_TD, weight_VD)
    assert [t.abs().max().item() for t in got] == [0, 0, 0]


@pytest.mark.parametrize("by", ["kernel", "torch"])
@pytest.mark.parametrize("label", [-1, 50, 2**40])
def test_a_label_that_is_no_class_makes_loss_and_gradients_nan(by, label, request):
    if by == "kernel":
        request.getfixturevalue("by_kernel")
    x_TD, weight_VD, labels_T = case(4, 8, 50, ignored=0)
    labels_T[2] = label
    loss, dx_TD, dweight_VD = with_gradients(linear_cross_entropy(x_TD, weight_VD, labels_T), x_TD, weight_VD)
    assert loss.isnan() and dweight_VD.isnan().all()
    assert dx_TD.isnan().any(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("by", ["kernel", "torch"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_shared_classes(by, ranks, request):
    """Ranks one after another: first all their statistics of the only chunk, then with these their gradients."""
    if by == "kernel":
        request.getfixturevalue("by_kernel")
    x_TD, weight_VD, labels_T = case(6, 8, 50)
    want = reference(x_TD, weight_VD, labels_T)
    parts = weight_VD.detach().chunk(ranks)
    firsts = [sum(map(len, parts[:rank])) for rank in range(ranks)]
    found = []

    def on_rank(rank, gather):
        part = parts[rank].clone().requires_grad_()
        loss = linear_cross_entropy(x_TD, part, labels_T, shard=Shard(firsts[rank], 50, gather))
        return with_gradients(loss, x_TD, part)

    def note(stats_2C):
        found.append(stats_2C)
        return torch.stack([stats_2C])

    for rank in range(ranks):
        on_rank(rank, note)
    results = [on_rank(rank, lambda stats_2C: torch.stack(found)) for rank in range(ranks)]
    losses, dx_TD, dparts = zip(*results, strict=True)
    for loss in losses:
        assert_close([loss, sum(dx_TD), torch.cat(dparts)], want, 2e-6)


def test_strided_inputs():
    x_TD, weight_VD, labels_T = case(8, 8, 50)
    want = reference(x_TD, weight_VD, labels_T)
    x_TD = torch.stack([x_TD.detach(), x_TD.detach()], dim=2)[..., 0].requires_grad_()
    weight_VD = weight_VD.detach().t().contiguous().t().requires_grad_()
    labels_T = torch.stack([labels_T, labels_T], dim=1)[:, 0]
    assert not (x_TD.is_contiguous() or weight_VD.is_contiguous() or labels_T.is_contiguous())
    loss = linear_cross_entropy(x_TD, weight_VD, labels_T, chunk_bytes=of_rows(x_TD, weight_VD, 3))
    assert_close(with_gradients(loss, x_TD, weight_VD), want, 2e-6)


def test_no_tokens():
    x_TD, weight_VD, labels_T = case(0, 8, 50)
    loss, dx_TD, dweight_VD = with_gradients(linear_cross_entropy(x_TD, weight_VD, labels_T), x_TD, weight_VD)
    assert loss == 0 and dx_TD.shape == (0, 8) and not dweight_VD.any()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradient_that_is_asked_for(frozen):
    x_TD, weight_VD, labels_T = case(4, 8, 50)
    loss, dx_TD, dweight_VD = reference(x_TD, weight_VD, labels_T)
    inputs = {"x": x_TD, "weight": weight_VD}
    inputs.pop(frozen).requires_grad_(False)
    got = with_gradients(linear_cross_entropy(x_TD, weight_VD, labels_T), *inputs.values())
    assert_close(got, [loss, dweight_VD if frozen == "x" else dx_TD], 2e-6)


def test_autocast_computes_in_its_dtype_and_sums_the_weights_gradient_in_float32():
    x_TD, weight_VD, labels_T = case(64, 16, 50, ignored=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x_TD, weight_VD, labels_T, dtype=torch.bfloat16, chunk_bytes=1)
    got = with_gradients(loss, x_TD, weight_VD)
    assert [t.dtype for t in got] == [torch.float32] * 3
    assert torch.equal(got[1], got[1].bfloat16().float())
    assert not torch.equal(got[2], got[2].bfloat16().float())
    assert_close(got, reference(x_TD, weight_VD, labels_T), 0.01)


def test_the_backward_repeats_only_where_the_graph_is_kept():
    x_TD, weight_VD, labels_T = case(4, 8, 50)
    loss = linear_cross_entropy(x_TD, weight_VD, labels_T)
    once, twice = (torch.autograd.grad(loss, [x_TD, weight_VD], retain_graph=keep) for keep in (True, False))
    assert all(map(torch.equal, once, twice))
    with pytest.raises(RuntimeError, match="second time|retain_graph"):
        loss.backward()


def test_the_weights_gradient_is_not_copied():
    x_TD, weight_VD, labels_T = case(4, 8, 50)
    loss = linear_cross_entropy(x_TD, weight_VD, labels_T)
    address = loss.grad_fn.gradients[1].data_ptr()  # pyright: ignore - of our autograd function
    (loss * 0.5).backward()
    assert weight_VD.grad is not None and weight_VD.grad.data_ptr() == address


def test_chunks_are_even_and_fit():
    assert rows_of_chunk(16384, 2 * 151936, 256 << 20) == 768  # 22 chunks of 883 tokens, made multiples of 128
    assert rows_of_chunk(300, 100, 100 * 128) == 128
    assert rows_of_chunk(10, 100, 799) == 5  # 2 chunks, of 7 at most
    assert rows_of_chunk(10, 100, 0) == 1 and rows_of_chunk(0, 100, 1000) >= 1


def test_is_planned_as_on_a_gpu():
    """No kernel is launched, the three products are of bfloat16 numbers, and none has another dtype as its result: on
    fake tensors torch 2.11 has no such product, and the job could not be planned."""
    seen = []

    class Observer(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((func, [a.dtype for a in args if isinstance(a, torch.Tensor)]))
            return func(*args, **(kwargs or {}))

    with plan_for(PlannedGpu((9, 0))), FakeTensorMode(), Observer():
        x_TD, weight_VD = (torch.empty(n, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, 50))
        linear_cross_entropy(x_TD, weight_VD, torch.empty(4, dtype=torch.int64)).backward()
    products = [dtypes for func, dtypes in seen if func is torch.ops.aten.mm.out]
    assert products == 3 * [[torch.bfloat16, torch.bfloat16]]
    assert not [func for func, _ in seen if func.overloadpacket is torch.ops.aten.addmm or "copy" in str(func)]
    assert weight_VD.grad is not None and weight_VD.grad.shape == (50, 8) and weight_VD.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("size", [1, 5, 1 << 20, (1 << 20) + 1, 5 << 20])
def test_a_wide_gradient_is_multiplied_in_its_own_memory(size):
    wide, factor = torch.randn(size, 1), torch.tensor(0.3)
    want, address = (wide * factor).bfloat16(), wide.data_ptr()
    narrow = cross_entropy._multiply_in_place(wide, factor, torch.bfloat16)
    assert torch.equal(narrow, want) and narrow.data_ptr() == address


def test_a_compiled_caller_calls_it_uncompiled_at_any_number_of_tokens():
    counter, counts = CompileCounter(), []

    @torch.compile(backend=counter)
    def loss_of(x_TD, weight_VD, labels_T):
        return 2 * linear_cross_entropy(x_TD + 1, weight_VD, labels_T)

    for num_tokens in (5, 9, 12, 20, 33):
        x_TD, weight_VD, labels_T = case(num_tokens, 8, 50)
        want = 2 * linear_cross_entropy(x_TD + 1, weight_VD, labels_T)
        assert torch.equal(loss_of(x_TD, weight_VD, labels_T), want)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[2] < 10  # for 5 tokens, for 9, and for any number
