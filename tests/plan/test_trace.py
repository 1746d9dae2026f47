"""The trace against what real tensors take."""

import contextlib
import gc
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from momoe_titan.kernels import momoe_mlp, op, versions
from momoe_titan.kernels.cross_entropy import linear_cross_entropy
from momoe_titan.kernels.gpu import PlannedGpu
from momoe_titan.memory.allocator import block_bytes
from momoe_titan.memory.plan import MemoryPlan, Moment
from momoe_titan.model import MomoeLlama
from momoe_titan.plan.on_gpu import as_on_gpu
from momoe_titan.plan.trace import MemoryTrace, Place
from tests.support.tiny import batch, build, loss_of, tiny_args

pytestmark = pytest.mark.usefixtures("hopper_kernels_under_any_release")


def alive(trace):
    return sum(trace.parts().values())


@pytest.mark.parametrize("save_percent", [[0.0, 0.0], [0.0, 37.0], [100.0, 100.0]])
def test_kept_bytes_are_those_of_the_saved_tensors(save_percent):
    model = build(tiny_args(save_percent=save_percent))
    tokens, labels = (t.contiguous() for t in batch(0))
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers(), tokens, labels]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # kept alive, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, tokens, labels)
    expected = sum(block_bytes(storage.nbytes()) for storage in saved.values())

    with FakeTensorMode(), MemoryTrace(lambda module: None, implementations={}) as trace:  # the op by its fake
        fake = MomoeLlama(tiny_args(save_percent=save_percent))
        inputs = torch.empty(tokens.shape, dtype=torch.int64), torch.empty(labels.shape, dtype=torch.int64)
        before = alive(trace)
        fake_loss = loss_of(fake, *inputs)
        after = alive(trace)
    loss_bytes = block_bytes(fake_loss.untyped_storage().nbytes())
    assert loss.untyped_storage().nbytes() == fake_loss.untyped_storage().nbytes()
    assert after - before - loss_bytes == expected


@contextlib.contextmanager
def without_collections():
    """Python frees circles of references whenever it likes, and a trace sees it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_the_op_takes_the_same_memory_whatever_the_routing(monkeypatch):
    """Balanced, and all tokens on the same experts: every allocation, those inside included."""
    t, d, f, e, k = 16, 16, 16, 4, 2
    generator = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(s, generator=generator).requires_grad_() for s in ((t, d), (e, d, 2 * f), (e, f, d)))
    balanced = torch.arange(t * k).view(t, k) % e
    skewed = torch.tensor([[3, 1]]).expand(t, k).contiguous()

    def events(ids):
        scores = torch.full((t, k), 0.5, requires_grad=True)
        with without_collections(), MemoryTrace(lambda module: None) as trace:
            out, counts = momoe_mlp(x, w1, w2, ids, scores, 50)
            out.sum().backward()
        assert counts.max() == (t if ids is skewed else t * k // e)
        x.grad = w1.grad = w2.grad = None
        first = {}
        return [(first.setdefault(number, len(first)), n) for number, n, _ in trace.events]

    assert Counter(n for _, n in events(balanced)) == Counter(n for _, n in events(skewed))
    assert events(balanced) == events(skewed)


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_the_inside_of_the_op_is_counted(capability):
    t, d, f, e, k = 4096, 128, 64, 8, 2
    place = Place("experts", "0")
    on_gpu = as_on_gpu(PlannedGpu(capability))
    with on_gpu, FakeTensorMode(), MemoryTrace(lambda module: None) as trace, trace.within(place):
        x, w1, w2 = (
            torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in ((t, d), (e, d, 2 * f), (e, f, d))
        )
        ids, scores = torch.empty(t, k, dtype=torch.int64), torch.empty(t, k, requires_grad=True)
        before = alive(trace)
        trace.begin_step()
        trace.phase = "forward"
        out, _ = momoe_mlp(x, w1, w2, ids, scores, 100)
        held = alive(trace) - before
        peak = {phase: max(m.base for (p, _), m in trace.moments.items() if p == phase) for phase in ("forward",)}
        out.backward(torch.empty_like(out))
        backward = max((m.base + sum(n for _, n in z) for (p, z), m in trace.moments.items() if p == "backward"))
    r, out_bytes = t * k, t * d * 2
    assert out_bytes + 12 * r <= held < out_bytes + 13 * r  # the routing: 12 bytes a row, and a little per expert
    assert {n for (_, z), _ in trace.moments.items() for _, n in z} == {r * 2 * f * 2}
    # act (R, F) and y (R, D) in the forward
    assert peak["forward"] - before == pytest.approx(held + r * f * 2 + r * d * 2, rel=0.01)
    z, act = r * 2 * f * 2, r * f * 2
    # of the backward: dz (R, 2F) in the place of z, and dx rows (R, D) that come when act is gone; or dz beside z
    at_least = held + (z + r * d * 2 + out_bytes if capability == (9, 0) else 2 * z + act)
    assert at_least < backward - before < at_least + 2 * act


def layer_plan(save_percent, layer, experts=8):
    """Of one layer forward and backward; without a name its z counts as what it is."""
    t, d, f, e, k = 4096, 128, 64, experts, 2
    with as_on_gpu(PlannedGpu((9, 0))), FakeTensorMode(), MemoryTrace(lambda module: None) as trace:
        x, w1, w2 = (
            torch.empty(s, dtype=torch.bfloat16, requires_grad=True) for s in ((t, d), (e, d, 2 * f), (e, f, d))
        )
        ids, scores = torch.empty(t, k, dtype=torch.int64), torch.empty(t, k, requires_grad=True)
        with trace.within(Place("experts", layer)):
            out, _ = momoe_mlp(x, w1, w2, ids, scores, save_percent)
        out.backward(torch.empty_like(out))
        moments = [Moment(phase, list(z), m.base, m.parts) for (phase, z), m in trace.moments.items()]
    return MemoryPlan(["0"] if layer else [], moments, {}, 0, events=list(trace.events))


@pytest.mark.parametrize("experts", [8, 128])  # dz is let go after dw2; before
@pytest.mark.parametrize("save_percent", [0, 30, 70, 100])
def test_dz_over_z_is_foreseen(save_percent, experts):
    """A trace at 100 foresees what one at save_percent finds, which also computes rows again of the tile around S."""
    foreseen, found = layer_plan(100, "0", experts), layer_plan(save_percent, None, experts)
    tile = 128 * 2 * 64 * 2
    assert abs(foreseen.peak(save_percent, "backward") - found.peak(0, "backward")) <= tile + block_bytes(1)
    assert foreseen.reserved(save_percent) == found.reserved(0)


@pytest.mark.parametrize("save_percent", [0, 30, 100])
def test_dw2_waits_for_dz_where_act_is_smaller(save_percent, monkeypatch):
    """The peak of a layer whose weights are large beside its rows has act in it, in place of dw2."""
    experts, act, dw2 = 128, 4096 * 2 * 64 * 2, 128 * 64 * 128 * 2
    last = layer_plan(save_percent, None, experts).peak(0, "backward")
    schedule = op.memory_schedule
    monkeypatch.setattr(op, "memory_schedule", lambda *args: replace(schedule(*args), dw2_last=False))
    assert layer_plan(save_percent, None, experts).peak(0, "backward") - last == dw2 - act > 0


FROZEN = dict(tokens=16384, d=2048, f=1024, experts=64, chosen=8)


def frozen_peak(phase, tokens, d, f, experts, chosen):
    """Of an MoE layer whose weights get no gradient."""
    with as_on_gpu(PlannedGpu((9, 0))), FakeTensorMode(), MemoryTrace(lambda module: None) as trace:
        x = torch.empty(tokens, d, dtype=torch.bfloat16, requires_grad=True)
        w1, w2 = (torch.empty(s, dtype=torch.bfloat16) for s in ((experts, d, 2 * f), (experts, f, d)))
        ids, scores = (
            torch.empty(tokens, chosen, dtype=torch.int64),
            torch.empty(tokens, chosen, requires_grad=True),
        )
        before = alive(trace)
        trace.begin_step()
        trace.phase = "forward"
        momoe_mlp(x, w1, w2, ids, scores, 100)[0].backward(torch.empty_like(x))
    return max(m.base + sum(n for _, n in z) for (p, z), m in trace.moments.items() if p == phase) - before


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_frozen_experts_have_no_weight_gradient_in_the_plan(phase):
    """The peaks of an MoE layer whose weights are frozen: z, and act, y or the rows of dx, in two ranges each."""
    t, d, f, _, k = FROZEN.values()
    z, act, out, rows = t * k * 2 * f * 2, t * k * f * 2, t * d * 2, t * k * d * 2
    peak = frozen_peak(phase, **FROZEN)
    # the backward has out, its gradient and dx
    want = z + act + rows // 2 + out if phase == "forward" else z + rows // 2 + 3 * out
    assert peak == pytest.approx(want, rel=0.02), (peak / 2**20, want / 2**20)


def test_the_plan_has_the_kernels_that_the_release_takes(monkeypatch):
    """Under a release of Triton that the Hopper kernels are not used with: those without ranges of y's columns."""
    monkeypatch.delenv(versions.ANY_RELEASE)
    rows = FROZEN["tokens"] * FROZEN["chosen"] * FROZEN["d"] * 2
    for release, num_ranges in ((3, 7), 2), ((3, 9), 1):
        monkeypatch.setattr(versions, "TRITON", release)
        t, _, f, _, k = FROZEN.values()
        rest = t * k * 3 * f * 2 + FROZEN["tokens"] * FROZEN["d"] * 2  # z, act and out
        assert frozen_peak("forward", **FROZEN) == pytest.approx(rest + rows // num_ranges, rel=0.02)


@pytest.mark.parametrize("made_once", [0, 1, 3])
def test_gradients_are_known_by_their_place_in_the_step_before(made_once):
    """Whatever the forward of the first step allocates that no later one does."""
    with FakeTensorMode(), MemoryTrace(lambda module: None) as trace:
        weight = torch.empty(1000, 1000, requires_grad=True)
        for step in range(2):
            trace.begin_step()
            weight.grad = None
            once = [torch.empty(10) for _ in range(made_once if step == 0 else 0)]
            (torch.empty(10, 1000) @ weight).sum().backward()
            trace.relabel(weight.grad, "gradients")
            del once
    highest = max(trace.moments.values(), key=lambda m: m.base)
    assert highest.parts["gradients"] == block_bytes(4_000_000)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_the_loss_takes_half_a_gib_beyond_its_gradients(weights_dtype):
    """Of 16k tokens and 151,936 classes, whose logits in bfloat16 and their gradient are 9.3 GiB."""
    tokens, classes, dim = 16384, 151936, 2048
    with as_on_gpu(PlannedGpu((9, 0))), FakeTensorMode(), MemoryTrace(lambda module: None) as trace:
        x_TD = torch.empty(tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        weight_VD = torch.empty(classes, dim, dtype=weights_dtype, requires_grad=True)
        labels_T = torch.empty(tokens, dtype=torch.int64)
        gradients = alive(trace) - labels_T.nbytes
        if weights_dtype == torch.bfloat16:
            gradients += weight_VD.nbytes  # summed in float32
        before = alive(trace)
        with torch.autocast("cpu", torch.bfloat16):
            linear_cross_entropy(x_TD, weight_VD, labels_T, dtype=torch.bfloat16).backward()
    beyond = max(moment.base for moment in trace.moments.values()) - before - gradients
    copy = 2 * classes * dim if weights_dtype == torch.float32 else 0  # of the weight
    assert 350 << 20 < beyond - copy < 512 << 20  # the logits of 1,280 tokens, and little else
