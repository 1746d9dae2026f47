"""Training jobs on one GPU, measured in turn: all are built and compiled first, then each trains some steps by itself.

    python benchmarks/in_turns.py --out turns.json --steps 20 --rounds 3 \
        --run "ours: --job.config_file train_configs/500m.toml" \
        --run "stock: --job.config_file train_configs/500m.toml --momoe.backend torchtitan" \
        -- --training.dataset python_stdlib --validation.no-enable --checkpoint.no-enable

What follows `--` are options of every job; `training.steps` is set here. A GPU's clock and a busy host change over
minutes: what is measured in turn is compared at the same time. Every job is a process, and all are on the GPU at once,
unless their memory does not fit together: a job is built when those of the group before have ended. Modules are
imported at the same time. What a run's own options may say beside those of the job:

    --group NAME              of the jobs that are on the GPU at once; groups go one after another
    --warm, --steps, --rounds in place of those of all
    --layers N                another number of layers for the flavor
    --memory_gib, --profiled  in place of those of all

    step_ms            of each round, by the host's clock, with the wait for the GPU at the end of the round
    backward_ms        of the same steps on the GPU: forward and backward of all microbatches
    optimizer_ms       the rest of a step on the GPU: gradient norm, optimizer, what follows it
    tokens_per_s, mfu  of the median round; mfu by TorchTitan's count, in which attention is not causal
    busy_pct           with --profiled N: how much of the time the GPU works, by a profiler that sees it alone, in the
                       last N - 1 of N more steps (the first one begins when the GPU has nothing to do)

--memory_gib limits what PyTorch may reserve. A job that needs more is a row that says so, as is any that fails.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from benchmarks.named_runs import add_named_runs, named_runs  # noqa: E402 - from the folder above


@dataclass(frozen=True)
class Plan:
    """What is measured of a job.

    Attributes:
        warm: steps before the first turn, which compile, and capture CUDA graphs.
        steps: of a turn.
        rounds: turns.
        memory_gib: what PyTorch may reserve, or None.
        group: of the jobs that are on the GPU at once.
        layers: in place of the flavor's, or None.
        profiled: steps after the last turn, under a profiler.
    """

    warm: int
    steps: int
    rounds: int
    memory_gib: float | None = None
    group: str = ""
    layers: int | None = None
    profiled: int = 0


class HostEvent:
    """What a CUDA event is asked here, by the host's clock: to try this script without a GPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "HostEvent") -> float:
        return 1e3 * (end.at - self.at)


def measured_trainer(base: type, link: Connection, plan: Plan) -> type:
    """The trainer `base`, which waits before every turn until it is told to go on, and says what the last one took."""
    import torch

    from benchmarks.step_breakdown import busy_pct_of

    class Measured(base):
        busy_pct: float | None = None

        def __init__(self, *args):
            super().__init__(*args)
            self.marks: list[list[Any]] = []  # of each step: its begin, the gradients' norm, its end

        def train_step(self, data_iterator):
            self._mark(first=True)
            super().train_step(data_iterator)
            self._mark()
            measured, all_measured = self.step - plan.warm, plan.steps * plan.rounds
            if 0 <= measured <= all_measured and measured % plan.steps == 0:
                self._hand_over()
            if plan.profiled:
                self._profile(measured - all_measured)

        def _clip(self):
            self._mark()
            return super()._clip()

        def _mark(self, first=False):
            if first:
                self.marks.append([])
            event = torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else HostEvent()
            event.record()
            self.marks[-1].append(event)

        def _hand_over(self):
            on_gpu = torch.cuda.is_available()
            if on_gpu:
                torch.cuda.synchronize()
            now, metrics = time.perf_counter(), self.metrics_processor
            seconds = (now - getattr(self, "begin", now)) / plan.steps
            tokens = self.job_config.training.local_batch_size * self.gradient_accumulation_steps
            parts = [[a.elapsed_time(b) for a, b in zip(m, m[1:], strict=False)] for m in self.marks]
            link.send(
                {
                    "step_ms": 1e3 * seconds,
                    "backward_ms": statistics.mean(part[0] for part in parts),
                    "optimizer_ms": statistics.mean(part[-1] for part in parts),
                    "tokens": tokens * self.job_config.training.seq_len,
                    "flops_per_token": metrics.num_flops_per_token,
                    "peak_flops": metrics.gpu_peak_flops,
                    "layers": self.model_args.n_layers,
                    "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
                    "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else 0.0,
                }
            )
            self.marks.clear()
            link.recv()
            self.begin = time.perf_counter()

        def _profile(self, steps):
            if steps == 0:
                activities = torch.profiler.ProfilerActivity
                seen = activities.CUDA if torch.cuda.is_available() else activities.CPU
                self.profiler = torch.profiler.profile(activities=[seen])
                self.profiler.start()
            elif steps == plan.profiled:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                self.profiler.stop()
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "trace.json"
                    self.profiler.export_chrome_trace(str(path))
                    type(self).busy_pct = busy_pct_of(path, steps)

    return Measured


def work(link: Connection, options: list[str], log: str, plan: Plan) -> None:
    """Be one job: import, wait, build and train, with the console in a file."""
    console = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(console, 1)
    os.dup2(console, 2)
    sys.argv = [sys.argv[0], *options]
    import torch

    from momoe_titan.train import describe_cpu, set_single_process_defaults

    set_single_process_defaults()
    with contextlib.nullcontext() if torch.cuda.is_available() else describe_cpu():
        from momoe_titan.components import trainer
    from momoe_titan.model.flavors import flavors

    if plan.layers is not None:
        for args in flavors.data.values():
            args.n_layers = plan.layers
    link.send("imported")
    link.recv()
    if plan.memory_gib is not None:
        share = plan.memory_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    error, measured = None, measured_trainer(trainer.Trainer, link, plan)
    try:
        with mock.patch.object(trainer, "Trainer", measured):
            trainer.train(options)
    except torch.OutOfMemoryError as e:
        error = f"out of memory: {str(e).splitlines()[0]}"
    except BaseException as e:  # of any kind: another process tells of it
        traceback.print_exc()
        error = f"{type(e).__name__}: {e}"
    link.send({"error": error, "busy_pct": measured.busy_pct})
    sys.stdout.flush()
    os._exit(0)


class Job:
    """A job's process, seen from the one that gives the turns.

    Args:
        options: of the job and of its plan.
        log: file for its console.
        plan: where the options say nothing else.

    Attributes:
        rounds: what was measured in each.
        error: why the job ended early, or None.
        busy_pct: of the steps under a profiler, or None.
    """

    busy_pct: float | None = None

    def __init__(self, name: str, options: list[str], log: Path, plan: Plan):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for field in ("warm", "steps", "rounds", "layers", "profiled"):
            parser.add_argument(f"--{field}", type=int)
        parser.add_argument("--memory_gib", type=float)
        parser.add_argument("--group")
        own, options = parser.parse_known_args(options)
        self.plan = replace(plan, **{field: value for field, value in vars(own).items() if value is not None})
        options += ["--training.steps", str(self.plan.warm + self.plan.steps * self.plan.rounds + self.plan.profiled)]
        context = multiprocessing.get_context("spawn")
        self.name, self.rounds, self.error = name, [], None
        self.link, other = context.Pipe()
        # Not a daemon, which could not compile kernels ahead in processes of its own.
        self.process = context.Process(target=work, args=(other, options, str(log), self.plan))
        self.process.start()
        other.close()

    def hear(self) -> dict[str, Any]:
        """The next message; of a job that has ended, why."""
        try:
            message = self.link.recv()
        except EOFError:
            message = {"error": f"the process ended with {self.process.exitcode}"}
        if isinstance(message, dict) and message.get("error") is not None:
            self.error = message["error"]
        return message

    def go(self) -> None:
        self.link.send("go")

    def row(self) -> dict[str, Any]:
        """The results as one row of a table."""
        if not self.rounds:
            return {"run": self.name, "error": self.error or "no round was measured"}
        last, ms = self.rounds[-1], statistics.median(r["step_ms"] for r in self.rounds)
        speed = 1e3 * last["tokens"] / ms
        row = {
            "run": self.name,
            "layers": last["layers"],
            "tokens": last["tokens"],
            "step_ms": [round(r["step_ms"], 2) for r in self.rounds],
            "backward_ms": round(statistics.median(r["backward_ms"] for r in self.rounds), 2),
            "optimizer_ms": round(statistics.median(r["optimizer_ms"] for r in self.rounds), 2),
            "tokens_per_s": round(speed),
            "flops_per_token": last["flops_per_token"],
            "mfu": round(100 * last["flops_per_token"] * speed / last["peak_flops"], 1),
            "allocated_gib": round(last["allocated_gib"], 2),
            "reserved_gib": round(last["reserved_gib"], 2),
        }
        if self.busy_pct is not None:
            row["busy_pct"] = round(self.busy_pct, 2)
        return row if self.error is None else row | {"error": self.error}


def take_turns(jobs: list[Job]) -> None:
    """Have the jobs built, and give them their turns, one group after another."""
    for job in jobs:
        job.hear()  # has imported
    for _, members in itertools.groupby(jobs, key=lambda job: job.plan.group):
        group = list(members)
        for job in group:
            job.go()
        for job in group:
            job.hear()  # is warm
        for turn in range(max(job.plan.rounds for job in group)):
            for job in group:
                if job.error is None and turn < job.plan.rounds:
                    job.go()
                    message = job.hear()
                    if "step_ms" in message:
                        job.rounds.append(message)
        for job in group:
            if job.error is None and job.plan.profiled:
                job.go()
                job.busy_pct = job.hear().get("busy_pct")
        last = [job for job in group if job.error is None and not job.plan.profiled]
        for job in last:
            job.go()
        for job in last:
            job.hear()
        for job in group:
            job.process.join(60)
            print(json.dumps(job.row()), flush=True)


def measure(runs: Mapping[str, list[str]], plan: Plan, one_by_one: bool, logs: Path) -> list[dict[str, Any]]:
    """The rows of these jobs, whose options are given by name. What SIGTERM interrupts is a row that says so.

    Args:
        one_by_one: a group for each job.
        logs: folder for the console of each job.
    """

    def stop(*signum):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt("out of time")

    signal.signal(signal.SIGTERM, stop)
    jobs = []
    for number, (name, options) in enumerate(runs.items()):
        folder = logs / f"job{number}"
        folder.mkdir(parents=True, exist_ok=True)
        of_job = replace(plan, group=name) if one_by_one else plan
        jobs.append(Job(name, ["--job.dump_folder", str(folder), *options], folder / "log.txt", of_job))
    try:
        take_turns(jobs)
    except KeyboardInterrupt as e:
        print(f"interrupted: {e}", flush=True)
    finally:
        for job in jobs:
            if job.process.is_alive():
                job.error = job.error or "interrupted"
                job.process.kill()
    return [job.row() for job in jobs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `measured`, those of every job, and the file of the results."""
    parser.add_argument("--out", required=True, help="JSON file for the rows")
    parser.add_argument("--warm", type=int, default=10, help="steps before the first turn")
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each job")
    parser.add_argument("--one_by_one", action="store_true", help="one job on the GPU at a time")
    parser.add_argument("--memory_gib", type=float, help="that PyTorch may reserve, for a smaller GPU")
    parser.add_argument("--profiled", type=int, default=0, help="steps of each job under a profiler, after its turns")
    parser.add_argument("--logs", type=Path, default=Path("."), help="folder for the console of each job")
    parser.add_argument("options", nargs="*", help="after --: of every job")


def measured(runs: Mapping[str, list[str]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of these jobs, as the options say."""
    plan = Plan(args.warm, args.steps, args.rounds, args.memory_gib, profiled=args.profiled)
    return measure(runs, plan, args.one_by_one, args.logs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_named_runs(parser)
    add_arguments(parser)
    args = parser.parse_args()
    runs = {name: [*args.options, *own] for name, own in named_runs(parser, args.run).items()}
    rows = measured(runs, args)
    Path(args.out).write_text(json.dumps({"rows": rows}, indent=1))


if __name__ == "__main__":
    main()
