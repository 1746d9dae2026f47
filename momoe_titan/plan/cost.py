"""Predicts the time of a training step on N GPUs, from a job's traced operations and measured rates.

The trace names every op and collective of a rank's step with its sizes. Products are counted in
FLOPs, everything else in bytes moved, collectives in bytes sent. docs/parallelism.md has the formulas
and says which rates are measured and which are assumed.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf, log2
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    _resolve_process_group,  # pyright: ignore[reportPrivateImportUsage] - no public name
)
from torch.utils.flop_counter import flop_registry

from momoe_titan.kernels.activations import is_gated
from momoe_titan.kernels.op import Needs
from momoe_titan.model.parallel import dispatch, gathered  # noqa: F401 - registers the ops below

ops = torch.ops
_FORWARD = ops.momoe_titan.moe_forward
_BACKWARDS = ops.momoe_titan.moe_backward, ops.momoe_titan.moe_backward_over_z
_ATTENTION = "scaled_dot_product"
# Collectives: (name, index of the tensor argument, how often a rank sends (n - 1)/n of that tensor).
_COLLECTIVES = {
    ops.c10d._allgather_base_: ("all-gather", 0, 1),
    ops.c10d._reduce_scatter_base_: ("reduce-scatter", 1, 1),
    ops.c10d.allreduce_: ("all-reduce", 0, 2),
    ops.c10d.alltoall_base_: ("all-to-all", 1, 1),
    ops._c10d_functional.all_gather_into_tensor: ("all-gather", None, 1),
    ops._c10d_functional.reduce_scatter_tensor: ("reduce-scatter", 0, 1),
    ops._c10d_functional.all_reduce: ("all-reduce", 0, 2),
    ops._c10d_functional.all_to_all_single: ("all-to-all", 0, 1),
    ops.momoe_titan.send_rows: ("all-to-all", 0, 1),
    ops.momoe_titan.gather_tokens: ("all-gather", None, 1),
    ops.momoe_titan.gather_choice: ("all-gather", None, 1),
    ops.momoe_titan.send_blocks: ("all-to-all", 0, 1),
}
# What NCCL makes of a link within a node: seconds of a call beside its bytes, and the share of the link's bandwidth.
# Fitted to benchmarks/results/link_2xh200.json, all-reduce as a reduce-scatter and an all-gather.
CALL = 30e-6
SHARES = {"all-gather": 0.57, "reduce-scatter": 0.56, "all-to-all": 0.66, "all-reduce": 0.56}
# FSDP's collectives, which run at the same time as the compute of neighbouring blocks
_FSDP = (ops.c10d._allgather_base_, ops.c10d._reduce_scatter_base_, ops.c10d.alltoall_base_)


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU in bfloat16.

    Attributes:
        matmul: TFLOPS reached by cuBLAS.
        attention: width of a head -> TFLOPS reached by attention (causal FLOPs).
        float32: TFLOPS of float32 products.
        grouped: TFLOPS of torch._grouped_mm, which TorchTitan's MoE uses.
        memory: TB/s of ops that only move data.
        fused: the same under torch.compile, which moves less: of the bytes that the ops would move one by one.
        optimizer: TB/s of the gradient norm and AdamW.
        experts: F -> TFLOPS of a MoE layer, forward and backward at save_percent 100.
        launch: host time per op in microseconds, with all the Python code around it; a step takes at least
            this times its number of ops. See `Run`.
    """

    matmul: float
    attention: dict[int, float]
    float32: float
    grouped: float
    memory: float
    fused: float
    optimizer: float
    experts: dict[int, tuple[float, float]]
    launch: float = 100.0


GPUS = {
    # The H200's rates are fitted to the parts of compiled steps of 500M, 1.4B and 7B; the experts' have routing and
    # combination in them, F = 768 is a layer alone. The H100's experts are layers alone, F = 512 in between; its
    # `fused` is fitted to compile_500m_h100.json, `optimizer` is the H200's less by the memories' bandwidths, the other
    # rates of products are taken to be the H200's. `memory` is fitted to steps without torch.compile, `launch` to FSDP
    # and EP on two H100s, `float32` to TP on two H100s. benchmarks/results/rates_step_time.json has all of them.
    "h200": Gpu(
        590, {64: 320, 128: 395}, 25, 300, memory=2.7, fused=3.9, optimizer=3.8,
        experts={256: (452, 518), 512: (533, 551), 768: (530, 558), 1024: (568, 579)},
    ),
    "h100": Gpu(
        590, {64: 320, 128: 395}, 25, 300, memory=2.4, fused=3.6, optimizer=2.7,
        experts={256: (410, 473), 512: (500, 530), 1024: (568, 579)},
    ),
}  # fmt: skip


@dataclass
class Network:
    """GB/s that one GPU sends, in one direction, and how much of FSDP's traffic hides behind compute.

    Attributes:
        nvlink: what the link carries within a node of `node_size` GPUs; NCCL reaches `SHARES` of it.
        ib: what a GPU sends to other nodes, by a network adapter of its own.
        overlap: fraction of the compute time that FSDP's collectives can use.
    """

    nvlink: float = 450.0
    ib: float = 50.0
    node_size: int = 8
    overlap: float = 0.9


@dataclass
class Work:
    """The work of one kind of op, in one step or microbatch."""

    flops: float = 0.0
    num_bytes: float = 0.0
    count: int = 0


@dataclass
class StepCost:
    """An observer of MemoryTrace that adds up the work of a step.

    Attributes:
        work: (True in a microbatch, False outside; kind of op) -> Work. Kinds: "matmul",
            "float32 matmul", "grouped matmul", "attention W" (of heads of width W), "experts forward F",
            "experts backward F", "experts again F" (z at save_percent 0), these three also with " float32",
            "elementwise", "optimizer".
        sent: (True in a microbatch; collective; True for FSDP's; `lanes`) -> Work. Lanes are the GPUs of a node that
            take part, where there are several nodes, and 0 within a node.
        num_microbatches: how many were traced.
    """

    node_size: int
    num_microbatches: int = 1
    work: dict[tuple, Work] = field(default_factory=lambda: defaultdict(Work))
    sent: dict[tuple, Work] = field(default_factory=lambda: defaultdict(Work))

    def clear(self) -> None:
        self.work.clear()
        self.sent.clear()

    def __call__(self, func, args, kwargs, out, phase: str) -> None:
        packet, micro = func._overloadpacket, phase in ("forward", "loss", "backward")
        if packet in _COLLECTIVES:
            self._collective(packet, args, out, micro)
        elif packet in (_FORWARD, *_BACKWARDS):
            self._experts(func, args, micro, packet is _FORWARD)
        elif packet is ops.aten._grouped_mm:
            left, right = args[:2]
            self._add(micro, "grouped matmul", 2 * left.shape[-2] * left.shape[-1] * right.shape[-1])
        elif packet in flop_registry and _ATTENTION in str(packet):
            backward = "backward" in str(packet)
            query, key, value = _tensors(args)[backward : backward + 3]  # behind the output's gradient
            flops = attention_flops(query.shape, key.shape, value.shape, backward)
            self._add(micro, f"attention {query.shape[-1]}", flops / 2)  # causal
        elif packet in flop_registry:
            operands = [a for a in args if not isinstance(a, torch.dtype)]  # torch's formulas know no output dtype
            flops = flop_registry[packet](*operands, **kwargs, out_val=out)
            factors = _tensors(args)[-2:]  # behind what the product is added to
            single = any(a.dtype == torch.float32 for a in factors)
            self._add(micro, "float32 matmul" if single else "matmul", flops)
        elif _moves_data(func):
            moved = sum(map(_num_bytes, (*_tensors(args), *_tensors(kwargs.values()), *_tensors([out]))))
            self._add(micro, "optimizer" if phase == "optimizer" else "elementwise", num_bytes=moved)

    def _add(self, micro: bool, kind: str, flops: float = 0.0, num_bytes: float = 0.0) -> None:
        work = self.work[micro, kind]
        work.flops += flops
        work.num_bytes += num_bytes
        work.count += 1

    def _experts(self, func, args, micro: bool, forward: bool) -> None:
        # The dispatcher leaves out arguments at the end that have their default.
        given: dict[str, Any] = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
        _, ffn, d_model = given["w2"].shape
        unit = 2 * (given.get("usual_rows") or given["num_rows"]) * d_model * ffn
        width = f"{ffn} float32" if given["w2"].dtype == torch.float32 else f"{ffn}"
        up = 2 if is_gated(given.get("activation", "swiglu")) else 1  # units of a product with w1
        if forward:
            self._add(micro, f"experts forward {width}", (up + 1) * unit)
            return
        needs = Needs(*given["needs"])
        up_grad = up * needs.w1 if given.get("gate") is None else needs.w1 + needs.gate
        self._add(micro, f"experts backward {width}", (1 + needs.w2 + up * needs.x + up_grad) * unit)
        self._add(micro, f"experts again {width}", up * unit)

    def _collective(self, packet, args, out, micro: bool) -> None:
        name, index, times = _COLLECTIVES[packet]
        group = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        if group is not None:
            group = dist.ProcessGroup.unbox(group)
        else:
            group_name: Any = next(a for a in reversed(args) if isinstance(a, str))
            group = _resolve_process_group(group_name)
        ranks = dist.get_process_group_ranks(group)
        tensors = _tensors([out if index is None else args[index]])
        nodes = Counter(rank // self.node_size for rank in ranks)
        lanes = max(nodes.values()) if len(nodes) > 1 else 0
        work = self.sent[micro, name, packet in _FSDP, lanes]
        work.num_bytes += times * sum(map(_num_bytes, tensors)) * (len(ranks) - 1) / len(ranks)
        work.count += 1


def _tensors(values) -> list[torch.Tensor]:
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(_tensors(value))
    return found


def _num_bytes(tensor: torch.Tensor) -> int:
    """Of its elements, those of an expanded tensor once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _moves_data(func) -> bool:
    name = func._schema.name.split("::")[1]
    if name.startswith(("empty", "new_empty", "wait_tensor", "detach", "device", "_wrap")):
        return False
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _between(rates: dict[int, float], size: int) -> float:
    """The rate of a size: between those of a table by the logarithm, beyond the table the nearest."""
    sizes = sorted(rates)
    low = max((s for s in sizes if s <= size), default=sizes[0])
    high = min((s for s in sizes if s >= size), default=sizes[-1])
    if low == high:
        return rates[low]
    position = (log2(size) - log2(low)) / (log2(high) - log2(low))
    return rates[low] + position * (rates[high] - rates[low])


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], backward: bool) -> int:
    """Of attention without a mask, from the shapes (batch, heads, tokens, width).

    As torch counts them (`torch.utils.flop_counter`), which before torch 2.13 refuses fewer heads of keys than of
    queries. Two products forward, and in the backward five: the scores again, and a gradient for each factor of both.
    """
    pairs = query[0] * query[1] * query[2] * key[2]
    return 2 * pairs * (3 * query[3] + 2 * value[3] if backward else query[3] + value[3])


def expert_tflops(gpu: Gpu, ffn: int) -> tuple[float, float]:
    """Forward and backward at this F: between measured widths by the logarithm, beyond them the nearest."""
    forward, backward = (_between({width: pair[i] for width, pair in gpu.experts.items()}, ffn) for i in (0, 1))
    return forward, backward


def seconds(kind: str, work: Work, gpu: Gpu, fused: bool = False) -> float:
    """On the GPU, for one kind of work; `fused` where torch.compile has what moves data."""
    if kind.startswith("experts"):
        _, which, ffn, *dtype = kind.split()
        forward, backward = (gpu.float32, gpu.float32) if dtype else expert_tflops(gpu, int(ffn))
        # a repeated product is one of the forward's
        return work.flops / 1e12 / (backward if which == "backward" else forward)
    if kind.startswith("attention"):
        return work.flops / 1e12 / _between(gpu.attention, int(kind.split()[1]))
    rates = {"matmul": gpu.matmul, "float32 matmul": gpu.float32, "grouped matmul": gpu.grouped}
    if kind in rates:
        return work.flops / 1e12 / rates[kind]
    return work.num_bytes / 1e12 / (gpu.optimizer if kind == "optimizer" else gpu.fused if fused else gpu.memory)


def collective_seconds(name: str, work: Work, network: Network, lanes: int = 0) -> float:
    """Of one kind of collective, within a node or, with `lanes` GPUs of each, between nodes.

    Between nodes NCCL lays as many rings as lanes, each of which leaves a node by another GPU's adapter. What a GPU
    sends in all rings goes through NVLink, and an adapter carries no more than its ring. In an all-to-all each GPU's
    adapter carries what that GPU sends.
    """
    within = network.nvlink * SHARES[name] if lanes != 1 else inf
    between = network.ib * (1 if name == "all-to-all" else lanes) if lanes else inf
    bandwidth = min(within, between)
    return work.count * CALL + work.num_bytes / 1e9 / bandwidth


class Run(NamedTuple):
    """How a step is run: under torch.compile, and from a CUDA graph, which takes no time of the host.

    Under torch.compile the host launches no op that only moves data by itself, and takes `UNFUSED` times as long for
    each of the others.
    """

    compiled: bool = False
    from_graph: bool = False


EAGER = Run()
UNFUSED = 2.6  # fitted to a step of 500M without a graph (cuda_graph_500m_h200.json)


def step_time(
    cost: StepCost,
    gpu: Gpu,
    network: Network,
    save_percent: float,
    num_microbatches: int,
    pipeline: tuple[int, int] = (1, 1),
    run: Run = EAGER,
) -> dict:
    """Seconds of a step and what they are made of.

    Args:
        cost: of the trace.
        save_percent: mean over the MoE layers.
        num_microbatches: of gradient accumulation.
        pipeline: stages, and microbatches that go through them one after another.
        run: how the step is run.

    Returns:
        "by_kind": seconds on the GPU; "collectives": seconds by collective; "compute", "host",
        "exposed": what of the collectives nothing hides; "step".
    """
    stages, waves = pipeline
    # Around TorchTitan's MoE data moves by indices, which torch.compile does not fuse with much.
    fused = run.compiled and not any(kind == "grouped matmul" for _, kind in cost.work)
    repeated = num_microbatches / cost.num_microbatches
    by_kind: dict[str, float] = defaultdict(float)
    count = 0.0
    for (micro, kind), work in cost.work.items():
        times = (repeated if micro else 1) / stages
        if " again " in kind:
            times *= 1 - save_percent / 100
        by_kind[kind] += seconds(kind, work, gpu, fused) * times
        if not (run.from_graph and micro):
            launches = (0 if kind == "elementwise" else UNFUSED) if run.compiled and micro else 1
            count += work.count * times * launches
    collectives: dict[str, float] = defaultdict(float)
    hideable = open_ = 0.0
    for (micro, name, fsdp, lanes), work in cost.sent.items():
        taken = collective_seconds(name, work, network, lanes) * (repeated if micro else 1) / stages
        collectives[f"{name}{', FSDP' if fsdp else ''}{', between nodes' if lanes else ''}"] += taken
        hideable, open_ = hideable + taken * fsdp, open_ + taken * (not fsdp)
    compute, host = sum(by_kind.values()), count * gpu.launch / 1e6
    busy = max(compute, host)
    exposed = max(0.0, hideable - network.overlap * busy) + open_
    return {
        "by_kind": dict(by_kind),
        "collectives": dict(collectives),
        "compute": compute,
        "host": host,
        "exposed": exposed,
        "bubble": (busy + exposed) * (stages - 1) / waves,
        "step": (busy + exposed) * (1 + (stages - 1) / waves),
    }
