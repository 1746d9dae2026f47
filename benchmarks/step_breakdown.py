"""Where the time of a training step goes on one GPU, and where the time to the first step goes.

    python benchmarks/step_breakdown.py --out breakdown.json -- --job.config_file train_configs/500m.toml \
        --compile.enable --training.local_batch_size 16

What follows `--` are the options of the job, whose last steps are measured three times: without a profiler (the step's
time), with a profiler that sees the GPU only (how much of that time the GPU works), and with one that sees the host
too, which slows the host down and says which part of the step each kernel belongs to, and what the host did while the
GPU waited. With CUDA graphs a kernel does not know its part: pass `--attribute` options that switch graphs off
for a run of its own, or leave the parts to the kernels' names.

The file has milliseconds per step by part, and the seconds of every phase before the first step's end.
"""

import argparse
import collections
import gc
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

_STARTED = time.time()

import torch  # noqa: E402 - the imports below are one of the phases
import triton.knobs  # noqa: E402

TIMED, PROFILED = 20, 3  # steps
SHOWN = 40  # kernels and gaps in the file

# The first pattern that fits the names of the ops around a kernel, or the kernel's own, is its part of the step.
PARTS = (
    ("optimizer", r"Optimizer\.step|adamw|clip_grad|_foreach|fused_adam|multi_tensor_apply|zero_grad"),
    ("attention", r"sdpa|scaled_dot_product|cudnn|flash|fmha|complex"),
    (
        "router",
        r"momoe_titan::(route|bfloat16_parts|gate|accumulate)|_route|_parts_kernel|_gate|_count_margins|sgemm|f32f32",
    ),
    (
        "experts",
        r"momoe_titan::moe_|rows_kernel|up_proj|down_proj|weight_grad|_combine_kernel|_score_grad|_place_kernel",
    ),
    ("loss", r"log_softmax|cross_entropy|nll_loss|linear_cross|softmax_online"),
    ("norm", r"rms_norm|rmsnorm|_norm_"),
    ("embedding", r"embedding|indexing_backward|unique|sort|radix"),
    ("copies", r"^Memcpy|^Memset"),
    ("dense", r"nvjet|gemm|cutlass|aten::mm|cublas"),
)


def part_of(names: list[str], dims: str, vocab_size: int, num_experts: int) -> str:
    """The part of the step of a kernel, by the names of the ops around it (its own last) and the shapes of the last."""
    sizes = {int(n) for n in re.findall(r"\d+", dims)}
    is_product = any("aten::mm" in name or "addmm" in name for name in names)
    if is_product and vocab_size in sizes:
        return "loss"
    if is_product and sizes & {num_experts, 2 * num_experts, 3 * num_experts, 4 * num_experts}:
        return "router"
    for part, pattern in PARTS:
        if any(re.search(pattern, name) for name in names):
            return part
    return "elementwise"


def union(spans: list[tuple[float, float]]) -> tuple[float, list[tuple[float, float]]]:
    """The time that sorted spans cover, and the gaps between them."""
    covered, gaps, end = 0.0, [], spans[0][0]
    for begin, stop in spans:
        if begin > end:
            gaps.append((end, begin))
        covered += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return covered, gaps


class Trace:
    """A Chrome trace of PyTorch's profiler. Times are microseconds."""

    def __init__(self, path: Path):
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
        gpu = ("kernel", "gpu_memcpy", "gpu_memset")
        self.kernels = sorted((e for e in events if e.get("cat") in gpu), key=lambda e: e["ts"])
        self.launches = {
            e["args"]["correlation"]: e
            for e in events
            if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
        }
        self.ops: dict[Any, list[dict]] = collections.defaultdict(list)
        for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
            if e.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime"):
                self.ops[e["tid"]].append(e)

    def busy(self) -> tuple[float, list[tuple[float, float]], float]:
        """Time in which the GPU works, the gaps, and the time from the first kernel to the last one's end."""
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in self.kernels]
        covered, gaps = union(spans)
        return covered, gaps, max(stop for _, stop in spans) - spans[0][0]

    def around(self, kernel: dict) -> list[dict]:
        """The ops in whose time on the host the kernel was launched, the outermost first."""
        launch = self.launches.get(kernel.get("args", {}).get("correlation"))
        if launch is None:
            return []
        return self.open_at(launch["ts"], launch["tid"])

    def open_at(self, when: float, thread: Any) -> list[dict]:
        found = getattr(self, "_index", None)
        if found is None:
            found = self._index = {}
        if thread not in found:
            found[thread] = self._stacks(self.ops[thread])
        starts, stacks = found[thread]
        import bisect

        i = bisect.bisect_right(starts, when) - 1
        return [e for e in stacks[i] if e["ts"] + e["dur"] >= when] if i >= 0 else []

    @staticmethod
    def _stacks(ops: list[dict]) -> tuple[list[float], list[list[dict]]]:
        starts, stacks, stack = [], [], []
        for e in ops:
            stack = [s for s in stack if s["ts"] + s["dur"] > e["ts"]]
            stack.append(e)
            starts.append(e["ts"])
            stacks.append(list(stack))
        return starts, stacks


def breakdown(trace: Trace, steps: int, vocab_size: int, num_experts: int) -> dict[str, Any]:
    """Milliseconds per step by part, the kernels that take longest, and what ends the gaps."""
    parts, kernels = collections.Counter(), collections.Counter()
    calls, part_by_name = collections.Counter(), {}
    for kernel in trace.kernels:
        ops = trace.around(kernel)
        dims = (
            json.dumps(
                ops[-2 if len(ops) > 1 and ops[-1]["cat"] == "cuda_runtime" else -1]
                .get("args", {})
                .get("Input Dims", "")
            )
            if ops
            else ""
        )
        names = [e["name"] for e in ops if e["cat"] != "cuda_runtime"] + [kernel["name"]]
        part = part_of(names, dims, vocab_size, num_experts)
        key = f"{part}: {kernel['name'][:110]} {dims if 'aten::mm' in names else ''}"
        parts[part] += kernel["dur"]
        kernels[key] += kernel["dur"]
        calls[key] += 1
        part_by_name[kernel["name"]] = part
    covered, gaps, whole = trace.busy()
    ends = {e["ts"]: e for e in trace.kernels}
    reasons, lengths = collections.Counter(), collections.Counter()
    for begin, end in gaps:
        lengths[
            "below 5 us"
            if end - begin < 5
            else "5 to 20"
            if end - begin < 20
            else "20 to 100"
            if end - begin < 100
            else "above 100"
        ] += end - begin
        ops = [e["name"] for e in trace.around(ends[end])]
        reasons[
            " > ".join(n[:60] for n in ops if not n.startswith("ProfilerStep"))[:200] + " > " + ends[end]["name"][:50]
        ] += end - begin
    ms = 1e3 * steps
    return {
        "busy_ms": covered / ms,
        "whole_ms": whole / ms,
        "parts_ms": {part: us / ms for part, us in parts.most_common()},
        "kernels": [{"kernel": k, "ms": us / ms, "calls": calls[k] / steps} for k, us in kernels.most_common(SHOWN)],
        "gaps_ms_by_length": {k: us / ms for k, us in lengths.most_common()},
        "gaps_ms_before": {k: us / ms for k, us in reasons.most_common(SHOWN)},
        "host_ops_ms": host_ops(trace, ms),
    }


def host_ops(trace: Trace, ms: float) -> dict[str, float]:
    """Host time of the ops that take most of it, those inside them left out."""
    total = collections.Counter()
    for ops in trace.ops.values():
        starts, stacks = trace._stacks(ops)
        own = {id(e): e["dur"] for e in ops}
        for stack in stacks:
            if len(stack) > 1:
                own[id(stack[-2])] -= stack[-1]["dur"]
        for e in ops:
            total[e["name"][:80]] += own[id(e)]
    return {name: us / ms for name, us in total.most_common(SHOWN)}


class Phases:
    """Seconds since the process was started, by what had just ended."""

    def __init__(self):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        self.began = time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
        self.ended: dict[str, float] = {"interpreter": _STARTED - self.began}
        self.kernels: list[dict[str, Any]] = []
        before = triton.knobs.compilation.listener

        def listener(*args, **kwargs):
            times, src = kwargs.get("times"), kwargs.get("src")
            us = {k: v for k, v in vars(times).items() if isinstance(v, (int, float))} if times is not None else {}
            lowering = sum(t for _, t in getattr(times, "lowering_stages", []) or [])
            self.kernels.append(
                {
                    "name": getattr(getattr(src, "fn", None), "__name__", str(getattr(src, "name", "?"))),
                    "hit": bool(kwargs.get("cache_hit")),
                    "at": time.time() - self.began,
                    "lowering_us": lowering,
                    **us,
                }
            )
            if before is not None:
                before(*args, **kwargs)

        triton.knobs.compilation.listener = listener

    def end(self, name: str) -> None:
        self.ended[name] = time.time() - self.began


def profiled_trainer(base: type, phases: Phases, result: dict[str, Any], folder: Path) -> type:
    """The trainer `base`, which measures itself in its last steps."""

    class Profiled(base):
        def __init__(self, *args):
            phases.end("imports and configuration")
            super().__init__(*args)
            torch.cuda.synchronize()
            phases.end("trainer built")
            self.profiler: Any = None
            last = self.job_config.training.steps
            self.windows = {
                "timed": last - TIMED - 2 * PROFILED - 4,
                "gpu": last - 2 * PROFILED - 2,
                "both": last - PROFILED,
            }

        def train_step(self, data_iterator):
            begin = time.perf_counter()
            super().train_step(self._timed(data_iterator) if self.step == 1 else data_iterator)
            result.setdefault("host_ms", {})[self.step] = round(1e3 * (time.perf_counter() - begin), 2)
            if self.step <= 3:
                if self.step == 1:
                    phases.end("step 1 on the host")
                torch.cuda.synchronize()
                phases.end(f"step {self.step}")
            self._measure()

        @staticmethod
        def _timed(data_iterator):
            for batch in data_iterator:
                phases.end("last batch of step 1")
                yield batch

        def _measure(self):
            step, activity = self.step, torch.profiler.ProfilerActivity
            if step == self.windows["timed"]:
                torch.cuda.synchronize()
                self.begin = time.perf_counter()
            elif step == self.windows["timed"] + TIMED:
                torch.cuda.synchronize()
                result["step_ms"] = 1e3 * (time.perf_counter() - self.begin) / TIMED
            for name, activities in (("gpu", [activity.CUDA]), ("both", [activity.CPU, activity.CUDA])):
                if step == self.windows[name]:
                    torch.cuda.synchronize()
                    self.profiler = torch.profiler.profile(activities=activities, record_shapes=name == "both")
                    self.profiler.start()
                elif step == self.windows[name] + PROFILED and self.profiler is not None:
                    torch.cuda.synchronize()
                    self.profiler.stop()
                    path = folder / f"{name}.json"
                    self.profiler.export_chrome_trace(str(path))
                    trace, self.profiler = Trace(path), None
                    args = self.model_args
                    sizes = args.vocab_size, args.moe_args.num_experts
                    result[name] = breakdown(trace, PROFILED, *sizes)
                    del trace
                    gc.collect()

    return Profiled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file for the results")
    parser.add_argument("--no_compile_ahead", action="store_true", help="compile kernels at their first launch only")
    parser.add_argument("--keep_traces", help="folder for the profiler's traces")
    parser.add_argument("options", nargs="*", help="after --: of the job")
    args = parser.parse_args()
    sys.argv = [sys.argv[0], *args.options]
    phases, result = Phases(), {}
    phases.end("torch and triton")
    from momoe_titan.train import set_single_process_defaults

    set_single_process_defaults()
    from momoe_titan.components import trainer

    phases.end("all imports")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep_traces or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        profiled = profiled_trainer(trainer.Trainer, phases, result, folder)
        ahead = (lambda config: None) if args.no_compile_ahead else trainer.compile_kernels_ahead
        with (
            mock.patch.object(trainer, "Trainer", profiled),
            mock.patch.object(trainer, "compile_kernels_ahead", ahead),
        ):
            status = trainer.train(sys.argv[1:])
    result["phases_s"], result["triton"] = phases.ended, phases.kernels
    result["dynamo"] = torch._dynamo.utils.compile_times(repr="str", aggregate=True)
    result["peak_gib"] = {
        "allocated": torch.cuda.max_memory_allocated() / 2**30,
        "reserved": torch.cuda.max_memory_reserved() / 2**30,
    }
    Path(args.out).write_text(json.dumps(result, indent=1))
    sys.exit(status)


if __name__ == "__main__":
    main()
