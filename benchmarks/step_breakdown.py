"""Where the time of a training step goes on a GPU, and where the time to the first step goes.

    python benchmarks/step_breakdown.py --out breakdown.json -- --job.config_file train_configs/500m.toml \
        --compile.enable --training.local_batch_size 16
    torchrun --nproc_per_node=2 benchmarks/step_breakdown.py --out breakdown.json -- \
        --job.config_file train_configs/500m.toml

What follows `--` are the options of the job. It runs in this process, and its last steps are measured three times:
without a profiler (the time of a step), with one that sees the GPU only (how much of that time the GPU works), and with
one that sees the host too. The last slows the host down, but tells to which part of the step each kernel belongs, and
what the GPU waited for. The kernels of a CUDA graph have no op around them: the parts then go by their names alone, and
the output layer's products count as dense.

The file has milliseconds per step by part, the kernels that take longest, and the gaps between kernels; and when each
phase before the first steps had ended, in seconds since the process was started. With several ranks it is of the first
one, and says of each collective of the last step when it ran, and for how long no other kernel did (exposed). A
collective takes as long as its slowest rank makes it wait.
"""

import argparse
import bisect
import collections
import gc
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

_STARTED = time.time()

import torch  # noqa: E402 - the imports below are one of the phases
import triton.knobs  # noqa: E402

TIMED, PROFILED = 20, 3  # steps
SHOWN = 40  # kernels, gaps and ops in the file

# The first pattern that fits the name of an op around a kernel, or the kernel's own, is its part of the step.
COLLECTIVE = r"ncclDevKernel|ncclKernel"
PARTS = (
    ("collectives", COLLECTIVE),
    ("FSDP copies", r"FSDP::|fsdp::|chunk_cat|split_with_sizes|CopyFunctor"),
    ("optimizer", r"Optimizer\.step|adamw|clip_grad|_foreach|fused_adam|multi_tensor_apply|zero_grad|_square_sum"),
    ("attention", r"sdpa|scaled_dot_product|cudnn|flash|fmha|complex"),
    (
        "router",
        r"momoe_titan::(route|bfloat16_parts|accumulate)|_route|_parts_kernel|_count_margins|sgemm|f32f32|(?<!cross)_entropy",
    ),
    ("experts", r"momoe_titan::moe_|rows_kernel|up_proj|down_proj|weight_grad|_combine|_score_grad|_place|_histogram"),
    ("loss", r"log_softmax|cross_entropy|nll_loss|softmax_online"),
    ("norm", r"rms_norm"),
    ("embedding", r"embedding|indexing_backward|unique|sort|radix"),
    ("copies", r"^Memcpy|^Memset"),
    ("dense", r"nvjet|gemm|cutlass|aten::mm|cublas"),
)
LENGTHS = (5, 20, 100)  # microseconds, by which gaps are told apart


def part_of(names: list[str], shapes: str, vocab_size: int, num_experts: int) -> str:
    """The part of the step that a kernel belongs to.

    Args:
        names: of the ops around it, and its own.
        shapes: of the inputs of the innermost op.
        vocab_size, num_experts: sizes by which products of the output layer and of the gate are known.
    """
    sizes = {int(n) for n in re.findall(r"\d+", shapes)}
    if any("aten::mm" in name or "addmm" in name for name in names):
        if vocab_size in sizes:
            return "loss"
        if sizes & {num_experts, 3 * num_experts, 4 * num_experts}:
            return "router"
    for part, pattern in PARTS:
        if any(re.search(pattern, name) for name in names):
            return part
    return "elementwise"


def gaps_between(spans: list[tuple[float, float]]) -> tuple[float, list[tuple[float, float]]]:
    """How long spans, sorted by their begin, cover together, and the gaps between them."""
    covered, gaps, end = 0.0, [], spans[0][0]
    for begin, stop in spans:
        if begin > end:
            gaps.append((end, begin))
        covered += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return covered, gaps


def exposed_ms(kernels: list[dict]) -> tuple[float, list[dict[str, Any]]]:
    """How long collectives ran with no other kernel beside them, in all and for each collective.

    Args:
        kernels: of one stretch of time, sorted by their begin.
    """
    compute = [(e["ts"], e["ts"] + e["dur"]) for e in kernels if not re.search(COLLECTIVE, e["name"])]
    starts, ends, end = [], [], float("-inf")  # of stretches with compute
    for begin, stop in compute:
        if begin > end:
            starts.append(begin)
            ends.append(stop)
        else:
            ends[-1] = max(ends[-1], stop)
        end = max(end, stop)
    rows = []
    for e in kernels:
        if re.search(COLLECTIVE, e["name"]):
            begin, stop = e["ts"], e["ts"] + e["dur"]
            first, last = bisect.bisect_right(ends, begin), bisect.bisect_left(starts, stop)
            hidden = sum(min(ends[i], stop) - max(starts[i], begin) for i in range(first, last))
            name = re.sub(r"^ncclDevKernel_|\(.*", "", e["name"])
            at = (begin - kernels[0]["ts"]) / 1e3
            rows.append({"name": name, "at_ms": at, "ms": e["dur"] / 1e3, "exposed_ms": (e["dur"] - hidden) / 1e3})
    return sum(row["exposed_ms"] for row in rows), rows


def read_events(path: Path) -> list[dict]:
    """What a Chrome trace says of stretches of time."""
    return [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]


def kernels_of(events: list[dict]) -> list[dict]:
    """What ran on the GPU, sorted by its begin."""
    on_gpu = ("kernel", "gpu_memcpy", "gpu_memset")
    return sorted((e for e in events if e.get("cat") in on_gpu), key=lambda e: e["ts"])


class Trace:
    """A Chrome trace of PyTorch's profiler. Times are microseconds."""

    def __init__(self, path: Path):
        events = read_events(path)
        self.kernels = kernels_of(events)
        runtime = [e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")]
        self.launches = {e["args"]["correlation"]: e for e in runtime if "correlation" in e.get("args", {})}
        self.ops: dict[Any, list[dict]] = collections.defaultdict(list)  # by thread
        for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            if e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime"):
                self.ops[e["tid"]].append(e)
        self.stacks = {thread: _stacks(ops) for thread, ops in self.ops.items()}

    def around(self, kernel: dict) -> list[dict]:
        """The ops during which the host launched a kernel, the outermost first."""
        launch = self.launches.get(kernel.get("args", {}).get("correlation"))
        if launch is None or launch["tid"] not in self.stacks:
            return []
        starts, stacks = self.stacks[launch["tid"]]
        index = bisect.bisect_right(starts, launch["ts"]) - 1
        return [e for e in stacks[index] if e["ts"] + e["dur"] >= launch["ts"]] if index >= 0 else []

    def host_times(self) -> collections.Counter[str]:
        """Time of each op on the host, without that of the ops inside it."""
        total = collections.Counter()
        for ops in self.ops.values():
            own = {id(e): e["dur"] for e in ops}
            for stack in _stacks(ops)[1]:
                if len(stack) > 1:
                    own[id(stack[-2])] -= stack[-1]["dur"]
            for e in ops:
                total[e["name"][:80]] += own[id(e)]
        return total


def _stacks(ops: list[dict]) -> tuple[list[float], list[list[dict]]]:
    """When each op of a thread began, and the ops that were under way then, itself the last."""
    starts, stacks, stack = [], [], []
    for e in ops:
        stack = [s for s in stack if s["ts"] + s["dur"] > e["ts"]] + [e]
        starts.append(e["ts"])
        stacks.append(stack)
    return starts, stacks


def busy_pct(kernels: list[dict], of_optimizer: list[dict], steps: int) -> float | None:
    """How much of the time the GPU works, from the end of the first step's optimizer to that of the last one's.

    The profiler begins when the GPU has nothing to do, and what the host takes to launch a first step is no part of any
    other.

    Args:
        of_optimizer: those of the kernels that take the optimizer's steps, as many in each step.
    """
    ends = sorted(e["ts"] + e["dur"] for e in of_optimizer)
    if steps < 2 or len(ends) < steps:
        return None
    begin, end = ends[len(ends) // steps - 1], ends[-1]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in kernels if e["ts"] >= begin and e["ts"] + e["dur"] <= end]
    return 100 * gaps_between(spans)[0] / (end - begin)


def busy_pct_of(path: Path, steps: int) -> float | None:
    """`busy_pct` of a trace that need not tell of the host."""
    kernels = kernels_of(read_events(path))
    return busy_pct(kernels, [e for e in kernels if part_of([e["name"]], "", -1, -1) == "optimizer"], steps)


def breakdown(trace: Trace, steps: int, vocab_size: int, num_experts: int) -> dict[str, Any]:
    """Milliseconds per step: in all, by part, by kernel, in gaps by length and by what ended them, and on the host."""
    counters: Any = (collections.Counter() for _ in range(5))
    parts, kernels, calls, lengths, ended_by = counters
    of_optimizer = []
    for kernel in trace.kernels:
        ops = [e for e in trace.around(kernel) if e["cat"] != "cuda_runtime"]
        shapes = str(ops[-1].get("args", {}).get("Input Dims", "")) if ops else ""
        part = part_of([*(e["name"] for e in ops), kernel["name"]], shapes, vocab_size, num_experts)
        name = f"{part}: {kernel['name'][:110]}"
        of_optimizer += [kernel] if part == "optimizer" else []
        parts[part] += kernel["dur"]
        kernels[name] += kernel["dur"]
        calls[name] += 1
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in trace.kernels]
    busy, gaps = gaps_between(spans)
    first = {e["ts"]: e for e in trace.kernels}
    for begin, end in gaps:
        above = max((length for length in LENGTHS if end - begin >= length), default=0)
        lengths[f"from {above} us"] += end - begin
        names = [e["name"][:60] for e in trace.around(first[end]) if not e["name"].startswith("ProfilerStep")]
        ended_by[" > ".join([*names, first[end]["name"][:60]])] += end - begin
    whole = max(stop for _, stop in spans) - spans[0][0]

    def per_step(times: collections.Counter) -> dict[str, float]:
        return {name: us / steps / 1e3 for name, us in times.most_common(SHOWN)}

    exposed, collectives = exposed_ms(trace.kernels)
    return {
        "collectives_exposed_ms": exposed / steps,
        "collectives_of_last_step": collectives[len(collectives) * (steps - 1) // steps :],
        "busy_ms": busy / steps / 1e3,
        "whole_ms": whole / steps / 1e3,
        "busy_pct": busy_pct(trace.kernels, of_optimizer, steps),
        "parts_ms": per_step(parts),
        "kernels_ms": {f"{name} ({calls[name] / steps:g})": ms for name, ms in per_step(kernels).items()},
        "gaps_ms_by_length": per_step(lengths),
        "gaps_ms_before": per_step(ended_by),
        "host_ms": per_step(trace.host_times()),
    }


class Phases:
    """Seconds since the process was started, by what had just ended then; and the kernels that Triton compiled."""

    def __init__(self):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        self.began = time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
        self.ended = {"interpreter": _STARTED - self.began, "imports of torch and triton": time.time() - self.began}
        self.kernels: list[dict[str, Any]] = []
        triton.knobs.compilation.listener = self._note

    def end(self, name: str) -> None:
        self.ended[name] = time.time() - self.began

    def _note(self, *args: Any, src: Any = None, times: Any = None, cache_hit: bool = False, **others: Any) -> None:
        name = getattr(getattr(src, "fn", None), "__name__", None) or str(getattr(src, "name", "?"))
        self.kernels.append(
            {"kernel": name, "cached": cache_hit, "at": time.time() - self.began, "s": getattr(times, "total", 0) / 1e6}
        )


def profiled_trainer(base: type, phases: Phases, result: dict[str, Any], folder: Path) -> type:
    """The trainer `base`, which measures itself in its first and its last steps."""

    class Profiled(base):
        def __init__(self, *args):
            phases.end("imports and configuration")
            super().__init__(*args)
            torch.cuda.synchronize()
            phases.end("trainer built")
            last = self.job_config.training.steps
            self.timed, self.both = last - TIMED - 2 * PROFILED - 4, last - PROFILED
            activity = torch.profiler.ProfilerActivity
            self.windows = {"gpu": (last - 2 * PROFILED - 2, [activity.CUDA])}
            self.windows["gpu and host"] = (last - PROFILED, [activity.CPU, activity.CUDA])

        def train_step(self, data_iterator):
            begin = time.perf_counter()
            super().train_step(self._first_batches(data_iterator) if self.step == 1 else data_iterator)
            result.setdefault("host_ms_by_step", {})[self.step] = round(1e3 * (time.perf_counter() - begin), 2)
            if self.step <= 3:
                torch.cuda.synchronize()
                phases.end(f"step {self.step}")
            self._measure()

        @staticmethod
        def _first_batches(data_iterator: Iterator) -> Iterator:
            for batch in data_iterator:
                phases.end("data of step 1")
                yield batch

        def _measure(self):
            if self.step in (self.timed, self.timed + TIMED):
                torch.cuda.synchronize()
                begin, self.begin = getattr(self, "begin", 0.0), time.perf_counter()
                result["step_ms"] = 1e3 * (self.begin - begin) / TIMED
            for name, (first, activities) in self.windows.items():
                if self.step == first:
                    torch.cuda.synchronize()
                    self.profiler = torch.profiler.profile(activities=activities, record_shapes=len(activities) > 1)
                    self.profiler.start()
                elif self.step == first + PROFILED:
                    torch.cuda.synchronize()
                    self.profiler.stop()
                    path = folder / f"{name}.json"
                    self.profiler.export_chrome_trace(str(path))
                    sizes = self.model_args.vocab_size, self.model_args.moe_args.num_experts
                    result[name] = breakdown(Trace(path), PROFILED, *sizes)
                    gc.collect()

    return Profiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file for the results")
    parser.add_argument("--no_compile_ahead", action="store_true", help="compile kernels at their first launch only")
    parser.add_argument("--traces", help="folder for the profiler's traces; they are not kept by default")
    parser.add_argument("options", nargs="*", help="after --: of the job")
    args = parser.parse_args()
    sys.argv = [sys.argv[0], *args.options]
    phases, result = Phases(), {}
    from momoe_titan.train import set_single_process_defaults

    set_single_process_defaults()
    from momoe_titan.components import trainer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.traces or temporary) / os.environ["RANK"]
        folder.mkdir(parents=True, exist_ok=True)
        profiled = profiled_trainer(trainer.Trainer, phases, result, folder)
        ahead = (lambda config: None) if args.no_compile_ahead else trainer.compile_kernels_ahead
        with (
            mock.patch.object(trainer, "Trainer", profiled),
            mock.patch.object(trainer, "compile_kernels_ahead", ahead),
        ):
            status = trainer.train(sys.argv[1:])
    result["phases_s"], result["compiled_by_triton"] = phases.ended, phases.kernels
    result["dynamo"] = torch._dynamo.utils.compile_times(repr="str", aggregate=True)
    result["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if os.environ["RANK"] == "0":
        Path(args.out).write_text(json.dumps(result, indent=1))
    sys.exit(status)


if __name__ == "__main__":
    main()
