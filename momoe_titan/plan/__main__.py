"""Predict the memory of a training job before anything runs, on any machine.

    python -m momoe_titan.plan --job.config_file train_configs/500m.toml [--gpu h200] \\
        [--world_size 8] [--json] [any other option of the job]

Prints what the GPU of one rank holds in a training step, by part, at several save_percent, and the
largest save_percent that fits. docs/memory_planning.md says what is counted and how exact it is.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from momoe_titan.memory.plan import (
    CUBLAS_BYTES,
    GIB,
    PLAN_FAILED,
    MemoryPlan,
    budget_bytes,
    context_bytes,
)

GPU_MEMORY_GIB = {"h100": 79.0, "h200": 139.0}  # as PyTorch shows it
PATIENCE = 5.0  # seconds without a word
SAVE_PERCENTS = (0, 25, 50, 75, 100)
PHASES = ("forward", "loss", "backward", "clip", "optimizer")


def build_parser() -> argparse.ArgumentParser:
    # What is unknown here is the job's; abbreviations would take from that.
    parser = argparse.ArgumentParser(
        "python -m momoe_titan.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu",
        choices=tuple(GPU_MEMORY_GIB),
        default="h100",
        help="the GPU of each rank, which says its memory, and its rates for --time (default: %(default)s)",
    )
    parser.add_argument(
        "--gpu_memory_gib",
        type=float,
        help="of one GPU as PyTorch shows it, for another one (default: that of --gpu, 79 of an H100, 139 of an H200)",
    )
    parser.add_argument("--world_size", type=int, default=1, help="ranks of the job")
    parser.add_argument(
        "--context_gib",
        type=float,
        help="memory outside of PyTorch's allocator: the CUDA context, and NCCL's buffers on several ranks "
        "(default 0.6, 1.6 on several ranks: assumed; and the buffers of momoe.fsdp_copies)",
    )
    parser.add_argument("--capability", default="9.0", help="compute capability of the GPU, which decides the kernels")
    parser.add_argument("--time", action="store_true", help="also predict the time of a step (docs/parallelism.md)")
    parser.add_argument("--nvlink", type=float, default=450.0, help="GB/s a GPU sends within its node")
    parser.add_argument("--ib", type=float, default=50.0, help="GB/s a GPU sends to other nodes")
    parser.add_argument("--node_size", type=int, default=8, help="GPUs of a node")
    parser.add_argument(
        "--overlap", type=float, default=0.9, help="fraction of the compute time that can hide FSDP's traffic"
    )
    parser.add_argument(
        "--host_us",
        type=float,
        default=100.0,
        help="microseconds of the host per op; less where it is fast or the model compiled",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--job_json", action="store_true", help="read the whole job as JSON from standard input, not from a file"
    )
    return parser


def read_job(args: argparse.Namespace, job_args: list[str]) -> Any:
    """The job's configuration, by TorchTitan's own reader."""
    from torchtitan.config import ConfigManager, JobConfig

    from momoe_titan.config import reading

    if args.job_json:
        values = json.load(sys.stdin)
        custom = importlib.import_module(values["job"]["custom_config_module"]).JobConfig
        merged = ConfigManager._merge_configs(JobConfig, custom)
        return ConfigManager()._dict_to_dataclass(merged, values)
    return reading.read_job(job_args)


# TorchTitan, and what imports it, is imported inside of functions: not before `describe_cpu` is in force.


def predict(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What is printed.

    Raises:
        ValueError: options or a configuration that cannot be used.
    """
    from torchtitan.tools.logging import logger

    from momoe_titan.plan.cost import StepCost

    capability = check_options(args)
    logger.setLevel(logging.WARNING)
    module = config.experimental.custom_import or "momoe_titan.register"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise ValueError(f"experimental.custom_import {module!r}: {e}") from e
    began = time.perf_counter()
    stages = config.parallelism.pipeline_parallel_degree
    cost = StepCost(args.node_size) if args.time else None
    plan = _plan(args, config, capability, cost)
    given = args.context_gib
    context = context_bytes(args.world_size) + plan.staging if given is None else int(given * GIB)
    memory = gpu_memory_gib(args)
    budget = budget_bytes(config.momoe.memory_budget, int(memory * GIB))
    choice, reserved = largest_that_fits(plan, budget - context)
    tried = [] if args.job_json or reserved + context <= budget else try_others(args, config)
    return {
        "model": f"{config.model.name} {config.model.flavor}",
        "num_parameters": plan.num_parameters,
        "world_size": args.world_size,
        "gpu": f"{args.gpu.upper() if args.gpu_memory_gib is None else 'GPU'} with {memory:g} GiB, compute capability "
        f"{args.capability}",
        "layout": layout(config, args.world_size),
        "local_batch": [config.training.local_batch_size, config.training.seq_len],
        "budget": budget,
        "budget_from": budget_from(config.momoe.memory_budget, memory),
        "context": context,
        "kept": plan.kept,
        "rows": [_memory_at(percent, plan, context, budget) for percent in SAVE_PERCENTS],
        "fits": {"save_percent": choice, "total": reserved + context},
        "tried": tried,
        "time": {} if cost is None else _times(args, config, cost, stages),
        "notes": plan.notes,
        "plan": plan.to_dict(),
        "seconds": round(time.perf_counter() - began, 2),
    }


def gpu_memory_gib(args: argparse.Namespace) -> float:
    """The memory of a GPU: what was given, or that of the named GPU."""
    return GPU_MEMORY_GIB[args.gpu] if args.gpu_memory_gib is None else args.gpu_memory_gib


def budget_from(memory_budget: float, memory_gib: float) -> str:
    """Where the budget comes from, in words; see `budget_bytes`."""
    share = f" x {memory_gib:g}" if memory_budget <= 1 else ""
    return f"momoe.memory_budget {memory_budget:g}{share}"


def layout(config: Any, world_size: int) -> str:
    """The parallelism of a job in words."""
    p = config.parallelism
    degrees = {
        "replicas": p.data_parallel_replicate_degree,
        "FSDP": p.data_parallel_shard_degree,
        "tensor parallel": p.tensor_parallel_degree,
        "context parallel": p.context_parallel_degree,
        "pipeline stages": p.pipeline_parallel_degree,
    }
    if degrees["FSDP"] == -1:
        others = math.prod(degree for name, degree in degrees.items() if name != "FSDP")
        degrees["FSDP"] = world_size // others
    degrees["of them expert parallel"] = p.expert_parallel_degree
    used = [f"{name} {degree}" for name, degree in degrees.items() if degree > 1]
    return ", ".join(used) or "no parallelism"


def others_to_try(config: Any, world_size: int) -> list[tuple[dict[str, Any], int]]:
    """Jobs that take less memory, all of the changes last: fields that differ from this job's, and the ranks."""
    batch = config.training.local_batch_size
    changes: list[tuple[dict[str, Any], int]] = []
    if batch > 1:
        changes.append(({"training.local_batch_size": batch // 2}, world_size))
    if config.activation_checkpoint.mode != "full":
        changes.append(({"activation_checkpoint.mode": "full"}, world_size))
    if config.parallelism.data_parallel_shard_degree == -1:
        changes.append(({}, 2 * world_size))
    if len(changes) > 1:
        changes.append(({k: v for fields, _ in changes for k, v in fields.items()}, max(n for _, n in changes)))
    return changes


def try_others(args: argparse.Namespace, config: Any) -> list[dict[str, Any]]:
    """Plans of `others_to_try`, each made in a process of its own, all at once."""
    running = []
    for fields, world_size in others_to_try(config, args.world_size):
        job = dataclasses.asdict(config)
        for name, value in fields.items():
            section, field = name.split(".")
            job[section][field] = value
        command = [sys.executable, "-m", "momoe_titan.plan", "--job_json", "--json", f"--world_size={world_size}"]
        command += [f"--gpu_memory_gib={gpu_memory_gib(args)}", f"--capability={args.capability}"]
        command += [] if args.context_gib is None else [f"--context_gib={args.context_gib}"]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        running.append((fields, world_size, child, json.dumps(job).encode()))
    with ThreadPoolExecutor(max_workers=max(1, len(running))) as pool:
        said = list(pool.map(lambda entry: entry[2].communicate(entry[3])[0], running))
    tried = []
    for (fields, world_size, child, _), out in zip(running, said, strict=True):
        if child.returncode == 0:  # others are jobs that training refuses
            options = [f"--{name} {value}" for name, value in fields.items()]
            options += [f"--world_size {world_size}"] if world_size != args.world_size else []
            p = json.loads(out)
            tried.append({"options": " ".join(options), **p["fits"], "fits": p["fits"]["total"] <= p["budget"]})
    return tried


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """Say after `PATIENCE` seconds what is being done, where someone waits for it."""
    timer = threading.Timer(PATIENCE, print, ["planning: two steps of the job on tensors without memory ..."],
                            {"file": sys.stderr, "flush": True})  # fmt: skip
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _plan(args: argparse.Namespace, config, capability: tuple[int, int], cost) -> MemoryPlan:
    """The plan of the job; with --time as without pipeline stages."""
    from momoe_titan.plan.job import check_job, trace_job

    stages, world_size = config.parallelism.pipeline_parallel_degree, args.world_size
    if not args.time or stages == 1:
        return trace_job(config, world_size, capability, cost)
    check_job(config, world_size)
    # The ranks of one stage, but with all layers; `_times` divides their time.
    world_size //= stages
    config = copy.deepcopy(config)
    config.parallelism.pipeline_parallel_degree = 1
    plan = trace_job(config, world_size, capability, cost)
    if stages > 1:
        plan.notes.append(f"memory is as without pipeline stages; one of {stages} stages has about 1/{stages} of it")
    return plan


def _memory_at(percent: int, plan: MemoryPlan, context: int, budget: int) -> dict[str, Any]:
    """One row of the table: memory at this save_percent."""
    moment, active, reserved = plan.peak_moment(percent), plan.active(percent), plan.reserved(percent)
    assert reserved is not None, "no capacity is given"
    z = sum(n for _, n in moment.z) * percent // 100
    return {
        "save_percent": percent,
        "kept_z": plan.saved_z(percent),
        **{phase: plan.peak(percent, phase) for phase in PHASES},
        "max_active": active,
        "max_reserved": reserved,
        "total": reserved + context,
        "fits": reserved + context <= budget,
        "at_peak": {
            **moment.parts,
            "experts' saved pre-activations": z,
            "cuBLAS workspaces": CUBLAS_BYTES,
            "phase": moment.phase,
        },
    }


def _times(args: argparse.Namespace, config, cost, stages: int) -> dict[int, dict[str, Any]]:
    """The time of a step by save_percent."""
    from momoe_titan.components.cuda_graph import would_capture
    from momoe_titan.config.compile import compiles_model
    from momoe_titan.plan.cost import GPUS, Network, Run, step_time

    training, degrees = config.training, config.parallelism
    replicas = args.world_size // (stages * degrees.tensor_parallel_degree * degrees.context_parallel_degree)
    tokens = training.local_batch_size * training.seq_len * replicas
    repeats = max(1, training.global_batch_size // (training.local_batch_size * replicas))
    waves = max(1, training.local_batch_size // degrees.pipeline_parallel_microbatch_size)
    network = Network(args.nvlink, args.ib, args.node_size, args.overlap)
    gpu = replace(GPUS[args.gpu], launch=args.host_us)
    timed, run = {}, Run(compiles_model(config), would_capture(config, args.world_size))
    for percent in SAVE_PERCENTS:
        t = step_time(cost, gpu, network, percent, repeats, (stages, waves), run)
        timed[percent] = {**t, "tokens_per_s_per_gpu": tokens * repeats / t["step"] / args.world_size}
    return timed


def check_options(args: argparse.Namespace) -> tuple[int, int]:
    """Refuse options that cannot be; the compute capability as two numbers.

    Raises:
        ValueError: names the option and its value.
    """
    for name in ("gpu_memory_gib", "world_size", "nvlink", "ib", "node_size", "host_us"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}, must be finite and above 0")
    if args.context_gib is not None and not 0 <= args.context_gib < math.inf:
        raise ValueError(f"--context_gib is {args.context_gib}, must be finite and at least 0")
    if not 0 <= args.overlap <= 1:
        raise ValueError(f"--overlap is {args.overlap}, must be from 0 to 1")
    if not (found := re.fullmatch(r"(\d+)\.(\d+)", args.capability, re.ASCII)):
        raise ValueError(f"--capability is {args.capability!r}, must be two numbers as in 9.0")
    return int(found[1]), int(found[2])


def largest_that_fits(plan: MemoryPlan, room: int) -> tuple[Sequence[float], int]:
    """The largest save_percent with which no more than `room` bytes are reserved, by layer, and what is reserved then;
    where nothing fits, the one with which the least is.

    Tried are `MemoryPlan.fill`, which goes by what is surely enough, and every whole percent for all layers alike:
    what is reserved does not grow evenly with save_percent, and may shrink.
    """
    choices = [plan.fill(room), *([float(percent)] * len(plan.layers) for percent in range(101))]
    tried = []
    for choice in sorted(choices if plan.layers else [[]], key=sum, reverse=True):
        reserved = plan.reserved(choice)
        assert reserved is not None, "no capacity is given"
        if reserved <= room:
            return choice, reserved
        tried.append((reserved, choice))
    reserved, choice = min(tried)
    return choice, reserved


def text(p: dict) -> str:
    """The prediction for people to read."""
    batch, seq = p["local_batch"]
    lines = [
        f"{p['model']}: {p['num_parameters']:,} parameters, {batch} x {seq} tokens per rank and microbatch, "
        f"{p['world_size']} rank{'s' if p['world_size'] > 1 else ''}; GiB on one GPU",
        f"assumed: {p['gpu']}, for each rank; {p['layout']}",
        "",
    ]
    shown = [row["at_peak"] for row in p["rows"] if row["save_percent"] in (0, 100)]
    lines += ["at the peak of the step          save_percent 0          100"]
    names = sorted(
        {name for row in shown for name in row if name != "phase"}, key=lambda n: -max(r.get(n, 0) for r in shown)
    )
    for name in names:
        values = [row.get(name, 0) / GIB for row in shown]
        if max(values) >= 0.005:
            lines.append(f"  {name:<36}{values[0]:>11.2f}{values[1]:>13.2f}")
    lines += [f"  {'(the peak is in the ' + '/'.join(dict.fromkeys(r['phase'] for r in shown)) + ')'}", ""]
    head = ("forward", "loss", "backward", "clip", "optimizer", "allocated", "reserved", "total")
    lines += ["save_percent" + "".join(f"{h:>11}" for h in head)]
    for row in p["rows"]:
        values = [row[k] for k in (*PHASES, "max_active", "max_reserved", "total")]
        lines.append(
            f"{row['save_percent']:>12}"
            + "".join(f"{v / GIB:>11.2f}" for v in values)
            + ("" if row["fits"] else "  too much")
        )
    lines += [
        "",
        f"total = reserved + {p['context'] / GIB:.1f} outside of PyTorch's allocator; "
        f"budget {p['budget'] / GIB:.1f} = {p['budget_from']}",
    ]
    choice, total = p["fits"]["save_percent"], p["fits"]["total"]
    mean = sum(choice) / max(1, len(choice))
    if not choice:
        lines.append("no layer has a save_percent")
    elif total > p["budget"]:
        lines.append(f"does not fit: the least, save_percent {mean:.0f}, takes {total / GIB:.1f}")
        lines += tried_text(p["tried"])
    else:
        layers = "in every layer" if len(set(choice)) == 1 else "on average"
        lines.append(f"largest that fits: save_percent {mean:.0f} {layers}, {total / GIB:.1f} GiB in total")
        if len(set(choice)) > 1:
            lines.append(f"  by layer: {' '.join(f'{c:g}' for c in choice)}")
    if p["time"]:
        lines += ["", *time_text(p["time"])]
    return "\n".join(lines + [f"note: {note}" for note in p["notes"]])


def tried_text(tried: list[dict]) -> list[str]:
    """Lines on what to change where nothing fits."""
    lines = ["what to try, as planned:"] if tried else []
    for other in tried:
        mean = sum(other["save_percent"]) / max(1, len(other["save_percent"]))
        fits = f"fits with save_percent {mean:.0f}" if other["fits"] else "does not fit"
        lines.append(f"  {other['options']}: {fits}, {other['total'] / GIB:.1f} GiB")
    return lines


def time_text(timed: dict[int, dict]) -> list[str]:
    """Lines on the time of a step."""
    one = timed[100]
    lines = ["one step at save_percent 100, milliseconds of a GPU"]
    for name, value in sorted(one["by_kind"].items(), key=lambda kv: -kv[1]):
        if value >= 5e-5:
            lines.append(f"  {name:<36}{1e3 * value:>11.1f}")
    for name, value in one["collectives"].items():
        if value >= 5e-5:
            lines.append(f"  {name + ', on the wire':<36}{1e3 * value:>11.1f}")
    lines += ["", "save_percent    compute       host    exposed     bubble       step   tokens/s per GPU"]
    for percent, t in timed.items():
        values = [1e3 * t[name] for name in ("compute", "host", "exposed", "bubble", "step")]
        lines.append(f"{percent:>12}" + "".join(f"{v:>11.1f}" for v in values) + f"{t['tokens_per_s_per_gpu']:>19,.0f}")
    return lines


def main() -> None:
    from momoe_titan.train import describe_cpu

    parser = build_parser()
    args, job_args = parser.parse_known_args()
    # Nothing here is for a GPU, and a busy one should not see another process.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with describe_cpu():
        try:
            with contextlib.nullcontext() if args.job_json else progress():
                prediction = predict(args, read_job(args, job_args))
        except (ValueError, OSError) as e:
            print(f"{PLAN_FAILED}{e}", file=sys.stderr)
            sys.exit(2)
        except Exception as e:
            traceback.print_exc()
            first = str(e).strip().partition("\n")[0]
            print(
                f"{PLAN_FAILED}the job cannot be traced: {type(e).__name__}{': ' if first else ''}{first}",
                file=sys.stderr,
            )
            sys.exit(1)
    print(json.dumps(prediction) if args.json else text(prediction))


if __name__ == "__main__":
    main()
