"""The time model by hand-made work, and the work that a trace counts."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from momoe_titan.kernels import momoe_mlp
from momoe_titan.kernels.gpu import PlannedGpu
from momoe_titan.plan.cost import (
    CALL,
    GPUS,
    SHARES,
    UNFUSED,
    Gpu,
    Network,
    Run,
    StepCost,
    Work,
    attention_flops,
    collective_seconds,
    expert_tflops,
    seconds,
    step_time,
)
from momoe_titan.plan.on_gpu import as_on_gpu
from momoe_titan.plan.trace import MemoryTrace
from tests.support.forks import in_forks

pytestmark = pytest.mark.usefixtures("hopper_kernels_under_any_release")

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
GPU = Gpu(
    matmul=100, attention={64: 50, 256: 100}, float32=10, grouped=20, memory=1, fused=2, optimizer=1,
    experts={256: (100, 200), 1024: (300, 400)}, launch=0,
)  # fmt: skip


def cost(**sent) -> StepCost:
    c = StepCost(8)
    c.work[True, "matmul"] = Work(flops=10e12, count=5)  # 100 ms
    c.work[True, "experts forward 256"] = Work(flops=3e12, count=1)  # 30 ms
    c.work[True, "experts again 256"] = Work(flops=2e12, count=1)  # 20 ms at save_percent 0
    c.work[False, "optimizer"] = Work(num_bytes=50e9, count=4)  # 50 ms
    return c


def test_compute():
    assert step_time(cost(), GPU, Network(), 100, 1)["step"] == pytest.approx(0.18)
    assert step_time(cost(), GPU, Network(), 0, 1)["step"] == pytest.approx(0.20)
    assert step_time(cost(), GPU, Network(), 50, 3)["step"] == pytest.approx(3 * 0.14 + 0.05)
    slow_host = Gpu(**{**GPU.__dict__, "launch": 1e5})
    assert step_time(cost(), slow_host, Network(), 100, 1)["step"] == pytest.approx(0.1 * 10)


def test_what_a_run_changes():
    """torch.compile lets ops move less; from a CUDA graph the host launches what is outside of the microbatches."""
    c = cost()
    c.work[True, "elementwise"] = Work(num_bytes=40e9, count=3)
    c.work[True, "attention 128"] = Work(flops=7.5e12, count=1)  # 100 ms
    assert step_time(c, GPU, Network(), 100, 1)["step"] == pytest.approx(0.18 + 0.04 + 0.1)
    assert step_time(c, GPU, Network(), 100, 1, run=Run(compiled=True))["step"] == pytest.approx(0.18 + 0.02 + 0.1)
    slow_host = Gpu(**{**GPU.__dict__, "launch": 1e5})
    t = step_time(c, slow_host, Network(), 100, 1, run=Run(from_graph=True))
    assert t["host"] == pytest.approx(0.1 * 4)
    t = step_time(c, slow_host, Network(), 100, 1, run=Run(compiled=True))
    assert t["host"] == pytest.approx(0.1 * (4 + UNFUSED * (5 + 1 + 1)))
    c.work[True, "grouped matmul"] = Work(flops=2e12, count=1)  # 100 ms, of TorchTitan's MoE
    assert step_time(c, GPU, Network(), 100, 1, run=Run(compiled=True))["step"] == pytest.approx(0.18 + 0.04 + 0.2)


def test_communication_hides_behind_compute_or_not():
    network = Network(nvlink=100, ib=10, overlap=0.5)
    c = cost()
    c.sent[True, "all-gather", True, False] = Work(
        num_bytes=8e9 * SHARES["all-gather"]
    )  # 80 ms of the 90 that can hide
    assert step_time(c, GPU, network, 100, 1)["exposed"] == 0
    c.sent[True, "all-gather", True, True] = Work(num_bytes=1e9)  # 100 ms between nodes
    assert step_time(c, GPU, network, 100, 1)["exposed"] == pytest.approx(0.09)
    c.sent[True, "all-to-all", False, False] = Work(num_bytes=2e9 * SHARES["all-to-all"])  # 20 ms, always seen
    assert step_time(c, GPU, network, 100, 1)["exposed"] == pytest.approx(0.11)
    c.sent[True, "all-to-all", False, False].count = 100
    assert step_time(c, GPU, network, 100, 1)["exposed"] == pytest.approx(0.11 + 100 * CALL)


@pytest.mark.parametrize("lanes, bandwidth", [(0, 257), (1, 50), (2, 100), (4, 200), (8, 257)])
def test_rings_leave_a_node_by_all_its_adapters(lanes, bandwidth):
    """Until NVLink, through which all rings go, is the limit."""
    took = collective_seconds("all-gather", Work(num_bytes=1e9), Network(), lanes)
    assert took == pytest.approx(1 / bandwidth, rel=0.01)
    alone = collective_seconds("all-to-all", Work(num_bytes=1e9), Network(), lanes)
    assert alone == pytest.approx(1 / (50 if lanes else 297), rel=0.01)


def test_collectives_take_what_was_measured():
    rows = json.loads((RESULTS / "link_2xh200.json").read_text())["rows"]
    for row in rows:
        sent = row["MB"] * 1e6 / 2 * (2 if row["collective"] == "all-reduce" else 1)
        predicted = collective_seconds(row["collective"], Work(num_bytes=sent, count=1), Network())
        assert predicted == pytest.approx(row["us"] / 1e6, rel=0.1 if row["MB"] > 1 else 0.3), row
    assert {row["collective"] for row in rows} == set(SHARES)


def test_pipeline_bubble():
    t = step_time(cost(), GPU, Network(), 100, 1, pipeline=(4, 8))
    assert t["step"] == pytest.approx(0.18 / 4 * (1 + 3 / 8)) and t["bubble"] == pytest.approx(0.18 / 4 * 3 / 8)


def test_rates_between_widths():
    assert expert_tflops(GPU, 64) == (100, 200) and expert_tflops(GPU, 4096) == (300, 400)
    assert expert_tflops(GPU, 512) == pytest.approx((200, 300))
    assert expert_tflops(GPUS["h200"], 256) == (452, 518)


def test_experts_in_float32():
    assert seconds("experts backward 256 float32", Work(flops=10e12), GPU) == pytest.approx(1.0)
    assert seconds("experts backward 256", Work(flops=10e12), GPU) == pytest.approx(0.05)


@pytest.mark.parametrize("dtype, suffix", [(torch.bfloat16, ""), (torch.float32, " float32")])
def test_work_of_ops(dtype, suffix):
    c = StepCost(8)
    t, d, f, e, k = 256, 128, 64, 4, 2
    with as_on_gpu(PlannedGpu((9, 0))), FakeTensorMode(), MemoryTrace(lambda module: None, c) as trace:
        trace.phase = "forward"
        x, w1, w2 = (torch.empty(s, dtype=dtype, requires_grad=True) for s in ((t, d), (e, d, 2 * f), (e, f, d)))
        ids, scores = torch.empty(t, k, dtype=torch.int64), torch.empty(t, k, requires_grad=True)
        out, _ = momoe_mlp(x, w1, w2, ids, scores, 0)
        out.backward(torch.empty_like(out))
        trace.phase = "optimizer"
        weight = torch.empty(d, d)
        weight @ weight
        weight.view(-1)  # no work
        weight.add_(1.0)
    unit = 2 * t * k * d * f
    flops = {kind: w.flops for (micro, kind), w in c.work.items() if "experts" in kind}
    assert flops == {
        f"experts {which} 64{suffix}": times * unit for which, times in (("forward", 3), ("backward", 6), ("again", 2))
    }
    assert c.work[False, "float32 matmul"] == Work(flops=2 * d**3, count=1)
    assert c.work[False, "optimizer"] == Work(num_bytes=2 * d * d * 4, count=1)


@pytest.mark.parametrize(
    "activation, two, frozen, products",
    [
        ("swiglu", True, "", (3, 6, 2)),
        ("relu2", False, "", (2, 4, 1)),
        ("relu2", False, "w1 w2", (2, 2, 1)),
        ("swiglu", False, "w1 w2", (3, 3, 2)),
        ("swiglu", True, "w1", (3, 5, 2)),
        ("swiglu", False, "x w2", (3, 3, 2)),
    ],
)
def test_experts_without_a_gate_or_frozen_have_fewer_products(activation, two, frozen, products):
    c = StepCost(8)
    t, d, f, e, k = 256, 128, 64, 4, 2
    with as_on_gpu(PlannedGpu((9, 0))), FakeTensorMode(), MemoryTrace(lambda module: None, c) as trace:
        trace.phase = "forward"
        up, gate = torch.empty(e, d, f), torch.empty(e, d, f, requires_grad=True)
        whole = torch.empty(e, d, 2 * f if activation == "swiglu" else f)
        x, w2, scores = torch.empty(t, d), torch.empty(e, f, d), torch.rand(t, k, requires_grad=True)
        for name, tensor in {"x": x, "w1": up if two else whole, "w2": w2}.items():
            tensor.requires_grad_(name not in frozen)
        ids, w1 = torch.empty(t, k, dtype=torch.int64), (up, gate) if two else whole
        out, _ = momoe_mlp(x, w1, w2, ids, scores, activation=activation)
        out.backward(torch.empty_like(out))
    flops = [w.flops / (2 * t * k * d * f) for (_, kind), w in c.work.items() if kind.startswith("experts")]
    assert flops == list(products)


def _collectives_are_named_by_what_they_do() -> None:
    dist.init_process_group("fake", rank=0, world_size=4)
    name = dist.group.WORLD.group_name
    functional, rows, even = torch.ops._c10d_functional, torch.empty(8, 16), [2] * 4
    c, num_bytes = StepCost(2), 8 * 16 * 4
    for func, args in (
        (functional.all_reduce.default, (rows, "sum", name)),
        (functional.reduce_scatter_tensor.default, (rows, "sum", 4, name)),
        (functional.all_gather_into_tensor.default, (rows[:2], 4, name)),
        (functional.all_to_all_single.default, (rows, even, even, name)),
        (torch.ops.momoe_titan.send_rows.default, (rows, even, even, name)),
    ):
        c(func, args, {}, rows, "forward")
    sent = {
        "all-reduce": Work(num_bytes=2 * num_bytes * 3 / 4, count=1),
        "reduce-scatter": Work(num_bytes=num_bytes * 3 / 4, count=1),
        "all-gather": Work(num_bytes=num_bytes * 3 / 4, count=1),
        "all-to-all": Work(num_bytes=2 * num_bytes * 3 / 4, count=2),
    }
    assert c.sent == {(True, kind, False, 2): work for kind, work in sent.items()}  # two GPUs of each node


def test_collectives_are_named_by_what_they_do():
    """Not by the name of their group, which is among their arguments."""
    assert in_forks(1, lambda rank: _collectives_are_named_by_what_they_do())


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_counted_with_fewer_heads_of_keys(heads):
    """Without torch's own formula, which takes no such shapes before torch 2.13."""
    query, key, value = (3, 4, 16, 8), (3, heads, 32, 8), (3, heads, 32, 24)
    as_many = key[:1] + (4,) + key[2:], value[:1] + (4,) + value[2:]
    assert attention_flops(query, key, value, False) == sdpa_flop_count(query, *as_many)
    grad = (*query[:3], value[3])
    assert attention_flops(query, key, value, True) == sdpa_backward_flop_count(grad, query, *as_many)


def test_attention_in_a_trace_needs_no_formula_of_torch(monkeypatch):
    """Its operands are found behind the output's gradient."""
    aten, found = torch.ops.aten, StepCost(8)
    for packet in (aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_cudnn_attention_backward):
        monkeypatch.setitem(flop_registry, packet, None)
    q, k, v = (torch.empty(2, heads, 16, 64, device="meta") for heads in (4, 2, 2))
    found(aten._scaled_dot_product_cudnn_attention.default, (q, k, v, None, True), {}, None, "forward")
    found(aten._scaled_dot_product_cudnn_attention_backward.default, (q, q, k, v, q), {}, None, "backward")
    assert found.work[True, "attention 64"].flops == 7 * 2 * 4 * 16 * 16 * 64
