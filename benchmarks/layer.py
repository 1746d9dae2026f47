"""One MoE layer alone: speed, memory and error of ours and of other implementations.

    python benchmarks/layer.py --shapes 7B-n256,30B-n1024,seed-64e --save_percent 0,50,100 \
        --routing balanced,skewed --out bench.json --charts charts
    python benchmarks/layer.py --shapes olmoe-1b-7b --tokens 1,4,16,64 --save_percent 100 --cuda_graph   # decoding
    python benchmarks/layer.py --from bench.json --charts charts   # draw only
    python benchmarks/layer.py --device cpu --shapes tiny      # checks the script, not the speed

The router is not measured: every implementation gets the same expert ids and scores, in bfloat16. The columns:
    routing   balanced: each token takes the top K of random logits, which is nearly balanced. skewed: 30% of the
              tokens choose expert 0, and none chooses one of the last quarter of the experts.
    ms        medians over many runs. Implementations take turns within one process, so that a change of the GPU's
              clock hits all of them. bwd is the time between the end of the forward and the end of the backward;
              inf is the forward under no_grad.
    TFLOPS    6*T*K*D*F forward and 12*T*K*D*F backward, whatever is recomputed.
    of limit  TFLOPS of forward and backward over those of an 8192^3 matrix product in the same run.
    held MiB  memory still allocated between forward and backward, besides inputs, weights and output.
    peak MiB  the same at its peak during forward and backward, gradients included.
    graph ms  with --cuda_graph, for ours and SonicMoE: the time of a replayed CUDA graph, which has no launch overhead.
              The forward without gradients takes other experts each time.
    of copy   with --cuda_graph: the speed of reading the chosen experts' weights over the speed of a copy in the same
              run (bytes read and written).
    errors    norm(result - reference) / norm(reference), against momoe_mlp_ref in float32.
An implementation that is not installed, or does not fit, is a row that says so. Results are written after every shape,
so that a run that is cut short keeps what it has. --charts draws bar charts of forward and backward, forward, and peak
memory (PNG), for which it needs matplotlib: pip install "momoe_titan[plot]".
"""

import argparse
import gc
import importlib
import itertools
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

from momoe_titan.kernels import momoe_mlp, momoe_mlp_ref
from momoe_titan.kernels.compile_count import compile_count
from momoe_titan.kernels.experts import Experts
from momoe_titan.save_percent import num_saved_rows

MIB = 2**20

# name: (T, D, F, E, K)
SHAPES = {
    # SonicMoE's paper, arXiv 2512.14080, figures 13 and 14
    "1.4B-n256": (40960, 768, 256, 128, 8),
    "1.4B-n512": (40960, 768, 512, 64, 4),
    "1.4B-n1024": (40960, 768, 1024, 32, 2),
    "7B-n256": (24576, 1536, 256, 128, 8),
    "7B-n512": (24576, 1536, 512, 64, 4),
    "7B-n1024": (24576, 1536, 1024, 32, 2),
    "30B-n256": (32768, 4096, 256, 256, 16),
    "30B-n512": (32768, 4096, 512, 128, 8),
    "30B-n1024": (32768, 4096, 1024, 64, 4),
    "120B-n512": (32768, 4096, 512, 256, 16),
    "120B-n1024": (32768, 4096, 1024, 128, 8),
    "120B-n2048": (32768, 4096, 2048, 64, 4),
    # the first MoMoE release
    "seed-tiny": (1024, 1024, 512, 32, 4),
    "seed-64e": (8192, 2048, 1024, 64, 8),
    "seed-64e-wide": (12288, 2048, 1280, 64, 6),
    "seed-64e-odd": (7680, 2176, 1152, 64, 6),
    "seed-128e": (32768, 2048, 1024, 128, 8),
    "seed-128e-long": (65536, 2048, 1024, 128, 8),
    # models, 16384 tokens
    "mixtral-8x7b": (16384, 4096, 14336, 8, 2),
    "qwen3-30b-a3b": (16384, 2048, 768, 128, 8),
    "olmoe-1b-7b": (16384, 2048, 1024, 64, 8),
    "deepseek-v2-lite": (16384, 2048, 1408, 64, 6),
    "deepseek-v3": (16384, 7168, 2048, 256, 8),
    "gpt-oss-20b": (16384, 2880, 2880, 32, 4),
    # for a CPU
    "tiny": (256, 64, 48, 8, 2),
}
SHAPE_SETS = {
    "sonic": [name for name in SHAPES if name[0].isdigit()],
    "seed": [name for name in SHAPES if name.startswith("seed")],
    "models": ["mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b", "deepseek-v2-lite", "deepseek-v3", "gpt-oss-20b"],
}
ROUTINGS = ("balanced", "skewed")


class Case:
    """Inputs of one shape: tokens, weights (the first F columns up, the last F gate), chosen experts, gradient."""

    def __init__(self, name: str, device: torch.device, routing: str, seed: int, tokens: int | None = None):
        self.name, self.device = name, device
        self.T, self.D, self.F, self.E, self.K = SHAPES[name]
        self.T = tokens or self.T
        g = torch.Generator(device=device).manual_seed(seed)

        def normal(*shape, scale=1.0):
            # Filled one slice at a time: a float32 copy of the weights would be the peak.
            out = torch.empty(shape, device=device, dtype=torch.bfloat16)
            for part in out if len(shape) == 3 else [out]:
                part.copy_(torch.randn(part.shape, device=device, generator=g) * scale)
            return out

        self.x = normal(self.T, self.D).requires_grad_()
        self.w1 = normal(self.E, self.D, 2 * self.F, scale=self.D**-0.5).requires_grad_()
        self.w2 = normal(self.E, self.F, self.D, scale=self.F**-0.5).requires_grad_()
        self.dout = normal(self.T, self.D)
        logits = torch.randn(self.T, self.E, device=device, generator=g)
        if routing == "skewed":
            used = max(self.E - self.E // 4, self.K + 1)
            logits[:, used:] = -torch.inf
            logits[:, 0] = torch.where(torch.arange(self.T, device=device) % 10 < 3, 100.0, -100.0)
        chosen, ids = logits.topk(self.K)
        self.ids, order = ids.sort(dim=1)
        self.scores = chosen.clamp(-3, 3).gather(1, order).softmax(1).requires_grad_()
        self.counts = torch.bincount(self.ids.flatten(), minlength=self.E)
        self.flops = 6 * self.T * self.K * self.D * self.F

    def choices(self, number: int) -> list[torch.Tensor]:
        """`number` choices of experts: the case's own, and the same shifted to other experts."""
        return [(self.ids + i * self.E // number) % self.E for i in range(number)]

    def reference(self) -> dict[str, torch.Tensor]:
        """y and all gradients in float32, one expert at a time to bound the memory."""
        x, dout = self.x.detach().float(), self.dout.float()
        total = {
            "y": torch.zeros_like(x),
            "dx": torch.zeros_like(x),
            "dscore": torch.zeros_like(self.scores),
            "dw1": torch.empty(self.w1.shape, device=self.device),
            "dw2": torch.empty(self.w2.shape, device=self.device),
        }
        for e in range(self.E):
            leaves = [x, self.w1[e : e + 1].float(), self.w2[e : e + 1].float(), self.scores]
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            ids = torch.where(self.ids == e, 0, -1)
            y, _ = momoe_mlp_ref(*leaves[:3], ids, leaves[3])
            dx, dw1, dw2, dscore = torch.autograd.grad(y, leaves, dout)
            total["y"] += y.detach()
            total["dx"] += dx
            total["dscore"] += dscore
            total["dw1"][e : e + 1], total["dw2"][e : e + 1] = dw1, dw2
        return total


class Ours:
    def __init__(self, case: Case, save_percent: float, backend: str):
        self.case, self.save_percent, self.backend = case, save_percent, backend
        self.leaves = [case.x, case.w1, case.w2, case.scores]
        self.ids = self.own_ids(case.ids)

    @staticmethod
    def own_ids(ids_TK: torch.Tensor) -> torch.Tensor:
        return ids_TK

    def forward(self):
        c = self.case
        return momoe_mlp(c.x, c.w1, c.w2, self.ids, c.scores, self.save_percent, backend=self.backend)[0]

    def gradients(self, grads):
        return dict(zip(("dx", "dw1", "dw2", "dscore"), grads, strict=True))

    def held_bound_mib(self) -> float:
        """The memory that the design allows to hold: the saved rows of z, and 24 bytes of routing per row."""
        rows = self.case.T * self.case.K
        saved = num_saved_rows(rows, self.save_percent)
        return (saved * 2 * self.case.F * 2 + 24 * rows) / MIB


class OurLayout(Ours):
    """Ours on weights as others keep them; gradients are compared in our layout."""

    def __init__(self, case: Case, save_percent: float, backend: str, layout: str):
        super().__init__(case, save_percent, backend)
        self.out_in = layout.endswith("out_in")
        up, gate = case.w1.detach().split(case.F, dim=2)
        self.order = "up_gate"
        if layout.startswith("two"):
            weights = [up, gate]
        elif layout.startswith("interleaved"):
            weights, self.order = [torch.stack([gate, up], dim=3).flatten(2)], "interleaved_gate_up"
        else:
            weights, self.order = [torch.cat([gate, up], dim=2)], "gate_up"
        self.weights = [self.stored(w) for w in (*weights, case.w2.detach())]
        self.leaves = [case.x, *self.weights, case.scores]

    def stored(self, w: torch.Tensor) -> torch.Tensor:
        return (w.transpose(1, 2) if self.out_in else w).contiguous().requires_grad_()

    def logical(self, w: torch.Tensor) -> torch.Tensor:
        return w.transpose(1, 2) if self.out_in else w

    def forward(self):
        c, (*up, down) = self.case, map(self.logical, self.weights)
        w1 = tuple(up) if len(up) == 2 else up[0]
        options = dict(backend=self.backend, order=self.order)
        return momoe_mlp(c.x, w1, down, self.ids, c.scores, self.save_percent, **options)[0]

    def gradients(self, grads):
        dx, *dw1, dw2, dscore = grads
        dw1 = [self.logical(g) for g in dw1]
        if len(dw1) == 1:
            split = Experts(self.logical(self.weights[0]), self.logical(self.weights[-1]), order=self.order).split
            dw1 = split(dw1[0])
        return {"dx": dx, "dw1": torch.cat(dw1, dim=2), "dw2": self.logical(dw2), "dscore": dscore}


class FixedRouter(nn.Module):
    """Takes the place of TorchTitan's router and returns the case's choice."""

    def __init__(self, case: Case):
        super().__init__()
        self.top_k = case.K
        self.ids, self.scores, self.counts = case.ids, case.scores, case.counts

    def forward(self, x, expert_bias=None):
        return self.scores, self.ids, self.counts


class CpuReorderer(nn.Module):
    """TorchTitan's reorderer on floats: it counts by torch.histc, which has no integer kernel on the CPU."""

    def __init__(self, reorderer: nn.Module):
        super().__init__()
        self.reorderer = reorderer

    def forward(self, scores, ids):
        scores, order, counts = self.reorderer(scores, ids.float())
        return scores, order, counts.int()


class TorchTitan:
    def __init__(self, case: Case, compiled: bool = False):
        from torchtitan.models.moe import MoE, MoEArgs

        args = MoEArgs(
            num_experts=case.E,
            num_shared_experts=0,
            top_k=case.K,
            score_before_experts=False,
            use_grouped_mm=case.device.type == "cuda",
            load_balance_coeff=None,
        )
        with torch.device("meta"):
            moe = MoE(args, dim=case.D, hidden_dim=case.F)
        moe.router = FixedRouter(case)
        if case.device.type != "cuda":
            moe.reorderer = CpuReorderer(moe.reorderer)
        experts = moe.experts
        up, gate = case.w1.detach().transpose(1, 2).split(case.F, dim=1)
        experts.w3 = nn.Parameter(up.contiguous())
        experts.w1 = nn.Parameter(gate.contiguous())
        experts.w2 = nn.Parameter(case.w2.detach().transpose(1, 2).contiguous())
        moe.tokens_per_expert = torch.zeros(case.E, device=case.device)
        self.case = case
        self.leaves = [case.x, experts.w3, experts.w1, experts.w2, case.scores]
        if compiled:
            torch._dynamo.reset()
            moe = torch.compile(moe)
        self.moe = moe

    def forward(self):
        return self.moe(self.case.x[None])[0]

    def gradients(self, grads):
        dx, dup, dgate, dw2, dscore = grads
        dw1 = torch.cat([dup, dgate], dim=1).transpose(1, 2)
        return {"dx": dx, "dw1": dw1, "dw2": dw2.transpose(1, 2), "dscore": dscore}


class ScatterMoE:
    def __init__(self, case: Case):
        mlp = importlib.import_module("scattermoe.mlp")
        with torch.device("meta"):
            moe = mlp.GLUMLP(case.D, case.F, case.E, case.K, activation=nn.SiLU())
        moe.experts.weight = nn.Parameter(case.w1.detach().transpose(1, 2).contiguous())
        moe.output_experts.weight = nn.Parameter(case.w2.detach().transpose(1, 2).contiguous())
        self.case, self.moe = case, moe
        self.leaves = [case.x, moe.experts.weight, moe.output_experts.weight, case.scores]

    def forward(self):
        return self.moe(self.case.x, self.case.scores.to(self.case.x.dtype), self.case.ids)

    def gradients(self, grads):
        dx, dw1, dw2, dscore = grads
        return {"dx": dx, "dw1": dw1.transpose(1, 2), "dw2": dw2.transpose(1, 2), "dscore": dscore}


class SonicMoE:
    """SonicMoE. Its first linear layer interleaves gate and up columns, gate first."""

    def __init__(self, case: Case):
        self.functional = importlib.import_module("sonicmoe.functional")
        self.swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
        up, gate = case.w1.detach().transpose(1, 2).split(case.F, dim=1)
        self.w1 = torch.stack([gate, up], dim=2).flatten(1, 2).contiguous().requires_grad_()
        self.w2 = case.w2.detach().transpose(1, 2).contiguous().requires_grad_()
        self.tokens = torch.arange(case.T, device=case.device, dtype=torch.int32)
        self.tokens = self.tokens.repeat_interleave(case.K)
        self.case = case
        self.leaves = [case.x, self.w1, self.w2, case.scores]
        self.ids = self.own_ids(case.ids)

    @staticmethod
    def own_ids(ids_TK: torch.Tensor) -> torch.Tensor:
        return ids_TK.flatten().int()

    def forward(self):
        return self.functional.moe_general_routing_inputs(
            self.case.x,
            self.case.scores.flatten(),
            self.tokens,
            self.ids,
            self.w1.permute(1, 2, 0),
            None,
            self.w2.permute(1, 2, 0),
            None,
            self.case.E,
            torch.cuda.current_stream().cuda_stream,
            self.swiglu,
            not torch.is_grad_enabled(),  # its inference mode
        )[0]

    def gradients(self, grads):
        dx, dw1, dw2, dscore = grads
        gate, up = dw1.unflatten(1, (-1, 2)).unbind(2)
        dw1 = torch.cat([up, gate], dim=1).transpose(1, 2)
        return {"dx": dx, "dw1": dw1, "dw2": dw2.transpose(1, 2), "dscore": dscore}


class OriginalMoMoE:
    """The first MoMoE release, from the package of that name."""

    def __init__(self, case: Case, save_percent: float):
        module = importlib.import_module("momoe.momoe")
        self.moe = module.MoMoE(case.D, case.F, case.E, case.K, save_percent, case.w1, case.w2)
        zeros = torch.zeros(case.T, case.E, device=case.device)
        self.mask = zeros.int().scatter(1, case.ids, 1).t().contiguous()
        s_TE = zeros.scatter(1, case.ids, case.scores.detach())
        self.s = s_TE.t().contiguous().requires_grad_()
        self.case = case
        self.leaves = [case.x, self.moe.Wl1_ND2H, self.moe.Wl2_NHD, self.s]

    def forward(self):
        return self.moe(self.case.x[None], self.mask, self.s)[0][0]

    def gradients(self, grads):
        dx, dw1, dw2, ds = grads
        return {"dx": dx, "dw1": dw1, "dw2": dw2, "dscore": ds.t().gather(1, self.case.ids)}


LAYOUTS = ("out_in", "two", "two_out_in", "interleaved", "interleaved_out_in")


def builders(names: list[str], save_percents: list[float], backend: str, layouts: list[str]) -> dict:
    """Label in the table -> the function that builds the implementation for a case."""
    table = {}
    for layout, p in itertools.product(layouts, save_percents):
        table[f"momoe_titan {layout} save {p:g}"] = lambda c, p=p, layout=layout: OurLayout(c, p, backend, layout)
    for name in names:
        if name == "ours":
            for p in save_percents:
                table[f"momoe_titan save {p:g}"] = lambda c, p=p: Ours(c, p, backend)
        elif name == "momoe":
            for p in save_percents:
                table[f"MoMoE (original) save {p:g}"] = lambda c, p=p: OriginalMoMoE(c, p)
        elif name == "torchtitan":
            table["TorchTitan"] = TorchTitan
        elif name == "torchtitan_compiled":
            table["TorchTitan, torch.compile"] = lambda c: TorchTitan(c, compiled=True)
        elif name == "scattermoe":
            table["ScatterMoE"] = ScatterMoE
        elif name == "sonicmoe":
            table["SonicMoE"] = SonicMoE
        else:
            raise ValueError(f"implementation {name!r} is not known")
    return table


class Clock:
    """Time stamps on the device's queue, or on the wall where there is none."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def stamp(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, start, end) -> float:
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)


def step(implementation):
    y = implementation.forward()
    return y, torch.autograd.grad(y, implementation.leaves, implementation.case.dout)


def error_table(case: Case, implementation, reference) -> dict[str, float]:
    y, grads = step(implementation)
    results = {"y": y.detach(), **implementation.gradients(grads)}
    return {
        name: float((results[name].float() - expected).norm() / expected.norm()) for name, expected in reference.items()
    }


def memory_table(case: Case, implementation) -> dict[str, float]:
    if case.device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = implementation.forward()
    torch.cuda.synchronize()
    base += y.numel() * y.element_size()
    held = torch.cuda.memory_allocated() - base
    grads = torch.autograd.grad(y, implementation.leaves, case.dout)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    del y, grads
    return {"held_mib": held / MIB, "peak_mib": peak / MIB}


def time_in_turn(case: Case, implementations: dict, seconds: float) -> dict[str, dict]:
    """Medians of every implementation, which take turns of a few runs each until the time is over.

    Each round of turns has an order of its own: a power-limited GPU is slower after an implementation that draws much.
    """
    clock = Clock(case.device)
    turns, shuffler = list(implementations.items()), random.Random(0)
    stamps = {label: [] for label in implementations}
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 2 or (time.perf_counter() < deadline and rounds < 200):
        shuffler.shuffle(turns)
        for label, implementation in turns:
            for run in range(4):
                start = clock.stamp()
                y = implementation.forward()
                middle = clock.stamp()
                grads = torch.autograd.grad(y, implementation.leaves, case.dout)
                end = clock.stamp()
                del y, grads
                with torch.no_grad():
                    implementation.forward()
                # Not the first run of a turn: it finds the caches filled by another implementation.
                if run:
                    stamps[label].append((start, middle, end, clock.stamp()))
            # Within a turn the host runs ahead of the device, so that launches are not timed.
            clock.wait()
        rounds += 1
    table = {}
    for label, runs in stamps.items():
        forward = statistics.median(clock.ms(a, b) for a, b, _, _ in runs)
        backward = statistics.median(clock.ms(b, c) for _, b, c, _ in runs)
        both = statistics.median(clock.ms(a, c) for a, _, c, _ in runs)
        inference = statistics.median(clock.ms(c, d) for _, _, c, d in runs)
        table[label] = {
            "fwd_ms": forward,
            "bwd_ms": backward,
            "fwd_bwd_ms": both,
            "inf_ms": inference,
            "fwd_tflops": case.flops / forward / 1e9,
            "bwd_tflops": 2 * case.flops / backward / 1e9,
            "fwd_bwd_tflops": 3 * case.flops / both / 1e9,
            "inf_tflops": case.flops / inference / 1e9,
            "runs": len(runs),
        }
    return table


def replayed_ms(run) -> float:
    """Time of one CUDA graph of run(): the median of ten timings, each of about ten milliseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()  # noqa: F841  what is freed within a capture is used again
    clock = Clock(torch.device("cuda"))

    def ms(replays):
        start = clock.stamp()
        for _ in range(replays):
            graph.replay()
        end = clock.stamp()
        clock.wait()
        return clock.ms(start, end) / replays

    ms(2)
    replays = max(1, int(10 / ms(2)))
    return statistics.median(ms(replays) for _ in range(10))


GRAPH_CHOICES = 8


def graph_table(case: Case, implementation, limits: dict) -> dict[str, float]:
    """Times of CUDA graphs, for implementations that can be given the choice of experts."""
    if not hasattr(implementation, "own_ids"):
        return {}
    both = replayed_ms(lambda: step(implementation))
    choices = [implementation.own_ids(ids) for ids in case.choices(GRAPH_CHOICES)]

    def forwards():
        for implementation.ids in choices:
            implementation.forward()

    with torch.no_grad():
        inference = replayed_ms(forwards) / len(choices)
    implementation.ids = choices[0]
    read = int((case.counts > 0).sum()) * 3 * case.D * case.F * case.w1.element_size()
    return {
        "graph_fwd_bwd_ms": both,
        "graph_fwd_bwd_tflops": 3 * case.flops / both / 1e9,
        "graph_inf_ms": inference,
        "graph_inf_of_copy": read / inference / 1e9 / limits["copy_tb_per_s"],
    }


def why_not(error: BaseException) -> str:
    if isinstance(error, ImportError):
        return f"not installed ({error})"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"


def free_memory():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def label_of(name: str, tokens: int | None) -> str:
    return f"{name} T={tokens}" if tokens else name


def measure(
    name: str, tokens: int | None, routing: str, table: dict, limits: dict, args: argparse.Namespace
) -> list[dict]:
    """Rows of one shape, number of tokens and routing."""
    device = torch.device(args.device)
    where = {"shape": label_of(name, tokens), "routing": routing}
    rows = {label: {**where, "implementation": label} for label in table}
    try:
        case = Case(name, device, routing, args.seed, tokens)
        reference = None if args.no_errors else case.reference()
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row["failed"] = why_not(error)
        return list(rows.values())
    load = case.counts.max().item() / (case.T * case.K / case.E)
    ready = {}
    for label, build in table.items():
        row = rows[label]
        row.update(T=case.T, D=case.D, F=case.F, E=case.E, K=case.K, max_load=load)
        compiles = compile_count()
        try:
            implementation = build(case)
            begin = time.perf_counter()
            step(implementation)
            Clock(device).wait()
            row["first_call_s"] = time.perf_counter() - begin
            row["first_call_compiles"] = compile_count() - compiles
            if reference is not None:
                row["errors"] = error_table(case, implementation, reference)
            row.update(memory_table(case, implementation))
            if hasattr(implementation, "held_bound_mib"):
                row["held_bound_mib"] = implementation.held_bound_mib()
            ready[label] = implementation
        # A rival that fails, in whatever way, is a row of the table and not its end.
        except Exception as error:
            row["failed"] = why_not(error)
        free_memory()
    del reference
    free_memory()
    try:
        for label, times in time_in_turn(case, ready, args.seconds_per_case).items():
            of_limit = times["fwd_bwd_tflops"] / limits["matmul_tflops"]
            rows[label].update(times, of_limit=of_limit)
    except torch.OutOfMemoryError as error:
        for label in ready:
            rows[label]["failed"] = why_not(error)
        return list(rows.values())
    if args.cuda_graph:
        for label, implementation in ready.items():
            try:
                rows[label].update(graph_table(case, implementation, limits))
            except Exception as error:  # a rival that cannot be captured has its other numbers
                rows[label]["graph_failed"] = why_not(error)
            free_memory()
    return list(rows.values())


def machine_limits(device: torch.device) -> dict[str, float]:
    """The speed that the device reaches in a plain bf16 matrix product and in a copy."""
    clock = Clock(device)
    n, copied = (8192, 2**30) if clock.cuda else (512, 2**24)
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def median_ms(run):
        times = []
        for _ in range(25):
            start = clock.stamp()
            run()
            times.append((start, clock.stamp()))
        clock.wait()
        return statistics.median(clock.ms(*pair) for pair in times[5:])

    return {
        "matmul_n": n,
        "matmul_tflops": 2 * n**3 / median_ms(lambda: a @ b) / 1e9,
        "copy_tb_per_s": 2 * copied / median_ms(lambda: target.copy_(source)) / 1e9,
    }


def markdown(rows: list[dict]) -> str:
    columns = [
        ("fwd ms", "fwd_ms", "{:.2f}"),
        ("fwd+bwd ms", "fwd_bwd_ms", "{:.2f}"),
        ("fwd TFLOPS", "fwd_tflops", "{:.0f}"),
        ("bwd TFLOPS", "bwd_tflops", "{:.0f}"),
        ("fwd+bwd TFLOPS", "fwd_bwd_tflops", "{:.0f}"),
        ("inf TFLOPS", "inf_tflops", "{:.0f}"),
        ("of limit", "of_limit", "{:.0%}"),
        ("graph fwd+bwd ms", "graph_fwd_bwd_ms", "{:.3f}"),
        ("graph TFLOPS", "graph_fwd_bwd_tflops", "{:.0f}"),
        ("graph inf ms", "graph_inf_ms", "{:.4f}"),
        ("of copy", "graph_inf_of_copy", "{:.0%}"),
        ("held MiB", "held_mib", "{:.1f}"),
        ("bound MiB", "held_bound_mib", "{:.1f}"),
        ("peak MiB", "peak_mib", "{:.0f}"),
        ("first call s", "first_call_s", "{:.1f}"),
    ]
    columns = [c for c in columns if not c[0].startswith(("graph", "of copy")) or any(c[1] in row for row in rows)]
    errors = ["y", "dx", "dscore", "dw1", "dw2"]
    heads = ["shape", "routing", "implementation", *(c[0] for c in columns), *(f"err {e}" for e in errors)]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for row in rows:
        cells = [row["shape"], row["routing"], row["implementation"]]
        if "failed" in row:
            cells += [row["failed"]] + [""] * (len(heads) - 4)
        else:
            cells += [f.format(row[key]) if key in row else "" for _, key, f in columns]
            cells += [f"{row['errors'][e]:.4f}" if "errors" in row else "" for e in errors]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


CHARTS = {  # file name: (key of a row, title, unit)
    "fwd_bwd": ("fwd_bwd_tflops", "forward + backward", "TFLOPS"),
    "fwd": ("fwd_tflops", "forward", "TFLOPS"),
    "memory": ("peak_mib", "peak memory, gradients included", "MiB"),
}


GROUPS_PER_LINE = 6


def draw(result: dict, folder: Path) -> None:
    """Draw the charts as PNG files, one group of bars per shape and routing.

    Raises:
        SystemExit: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        sys.exit('charts need matplotlib: pip install "momoe_titan[plot]"')
    folder.mkdir(parents=True, exist_ok=True)
    rows = {(r["shape"], r["routing"], r["implementation"]): r for r in result["rows"]}
    groups = list(dict.fromkeys(key[:2] for key in rows))
    labels = list(dict.fromkeys(key[2] for key in rows))
    lines = [groups[i : i + GROUPS_PER_LINE] for i in range(0, len(groups), GROUPS_PER_LINE)]
    width = 0.8 / len(labels)
    for name, (key, title, unit) in CHARTS.items():
        size = max(6, 1 + 0.35 * len(lines[0]) * len(labels)), 1.5 + 3 * len(lines)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(f"One MoE layer, {title}\n{result['device']}", fontsize=10)
        for axes, line in zip(figure.subplots(len(lines), squeeze=False)[:, 0], lines, strict=True):
            for i, label in enumerate(labels):
                heights = [rows.get((*group, label), {}).get(key, 0) for group in line]
                places = [g + (i - (len(labels) - 1) / 2) * width for g in range(len(line))]
                bars = axes.bar(places, heights, width, label=label)
                axes.bar_label(bars, [f"{h:.0f}" if h else "none" for h in heights], fontsize=6, rotation=90, padding=2)
            names = [shape if routing == "balanced" else f"{shape}\n{routing}" for shape, routing in line]
            axes.set_xticks(range(len(line)), names, fontsize=8)
            axes.set_xlim(-0.5, len(lines[0]) - 0.5)
            axes.set_ylabel(unit)
            axes.margins(y=0.2)
        axes.legend(fontsize=7, ncols=min(len(labels), 4), loc="upper center", bbox_to_anchor=(0.5, -0.12))
        figure.savefig(folder / f"{name}.png", dpi=150)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes",
        default="7B-n256,30B-n1024,seed-64e",
        help=f"comma-separated, of {', '.join(SHAPES)}; or a set: {', '.join(SHAPE_SETS)}",
    )
    parser.add_argument("--save_percent", default="0,50,100", help="comma-separated")
    parser.add_argument(
        "--implementations",
        default="ours,torchtitan,scattermoe,sonicmoe,momoe",
        help="comma-separated; also torchtitan_compiled",
    )
    parser.add_argument(
        "--layouts", default="", help=f"comma-separated: ours on weights in other layouts too, of {', '.join(LAYOUTS)}"
    )
    parser.add_argument("--backend", default="auto", help="of ours: auto, triton or torch")
    parser.add_argument("--routing", default="balanced", help=f"comma-separated, of {', '.join(ROUTINGS)}")
    parser.add_argument("--tokens", default=None, help="comma-separated; in place of the shapes' own numbers of tokens")
    parser.add_argument("--cuda_graph", action="store_true", help="time CUDA graphs too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds_per_case", type=float, default=10.0, help="of timed runs, per shape")
    parser.add_argument("--seconds_total", type=float, default=540.0, help="no shape is begun after this")
    parser.add_argument("--no_errors", action="store_true", help="leave out the float32 reference")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default=None, help="JSON file to write")
    parser.add_argument("--charts", default=None, help="folder for the charts")
    parser.add_argument("--from", dest="source", default=None, help="JSON file to draw, in place of measuring")
    args = parser.parse_args()
    args.shapes = [s for name in args.shapes.split(",") for s in SHAPE_SETS.get(name, [name])]
    for name in args.shapes:
        if name not in SHAPES:
            parser.error(f"--shapes: {name!r} is none of {', '.join([*SHAPES, *SHAPE_SETS])}")
    args.routing = args.routing.split(",")
    for routing in args.routing:
        if routing not in ROUTINGS:
            parser.error(f"--routing: {routing!r} is none of {', '.join(ROUTINGS)}")
    if args.tokens and not all(t.isdecimal() and int(t) for t in args.tokens.split(",")):
        parser.error(f"--tokens: {args.tokens!r} are not all positive numbers")
    args.layouts = args.layouts.split(",") if args.layouts else []
    for layout in args.layouts:
        if layout not in LAYOUTS:
            parser.error(f"--layouts: {layout!r} is none of {', '.join(LAYOUTS)}")
    args.tokens = [int(t) for t in args.tokens.split(",")] if args.tokens else [None]
    if args.cuda_graph and not args.device.startswith("cuda"):
        parser.error(f"--cuda_graph: needs a GPU, --device is {args.device!r}")
    if args.source and not args.charts:
        parser.error("--from needs --charts")
    args.save_percent = [float(p) for p in args.save_percent.split(",")]
    return args


def main() -> None:
    args = parse_arguments()
    if args.source:
        draw(json.loads(Path(args.source).read_text()), Path(args.charts))
        return
    begin = time.perf_counter()
    table = builders(args.implementations.split(","), args.save_percent, args.backend, args.layouts)
    device = torch.device(args.device)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "limits": machine_limits(device),
        "rows": [],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}), flush=True)
    cases = list(itertools.product(args.shapes, args.tokens, args.routing))
    for name, tokens, routing in cases:
        if time.perf_counter() - begin > args.seconds_total:
            where = {"shape": label_of(name, tokens), "routing": routing, "failed": "no time left"}
            rows = [{**where, "implementation": label} for label in table]
        else:
            rows = measure(name, tokens, routing, table, result["limits"], args)
        free_memory()
        result["rows"] += rows
        print(markdown(rows) + "\n", flush=True)
        if args.out:
            Path(args.out).write_text(json.dumps(result, indent=1) + "\n")
    if len(cases) > 1:
        print(markdown(result["rows"]))
    if args.charts:
        draw(result, Path(args.charts))


if __name__ == "__main__":
    main()
