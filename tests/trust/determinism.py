"""The same seed gives the same bits: trains the debug model several times and compares the losses of all steps.

    python -m tests.trust.determinism --steps 200            # all jobs on one GPU, side by side
    python -m tests.trust.determinism --steps 200 --gpus 2   # and two on two GPUs each
    python -m tests.trust.determinism --steps 20 --tiny      # a small model, for CPUs

Twice, with activation checkpointing, and stopped in the middle and resumed: all of these eager, and equal. Compiled
jobs equal compiled ones.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.trust import jobs

EAGER, COMPILED = ("--compile.no-enable",), ("--compile.enable",)
SAME = "--debug.deterministic", "--debug.seed=7", "--metrics.log_freq=1"
CHECKPOINTS = "--checkpoint.enable", "--checkpoint.no-last_save_model_only"
# name: (options, name of the job it equals)
RUNS: dict[str, tuple[tuple[str, ...], str]] = {
    "eager": (EAGER, ""),
    "eager, again": (EAGER, "eager"),
    "eager, full checkpointing": ((*EAGER, "--activation_checkpoint.mode=full"), "eager"),
    "eager, 37 percent saved": ((*EAGER, "--momoe.save_percent=37"), "eager"),
    "eager, resumed": ((*EAGER, *CHECKPOINTS), "eager"),
    "compiled": (COMPILED, ""),
    "compiled, again": (COMPILED, "compiled"),
    "compiled, resumed": ((*COMPILED, *CHECKPOINTS), "compiled"),
}
TWO_GPUS = {"two GPUs": (EAGER, ""), "two GPUs, again": (EAGER, "two GPUs")}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="names of jobs")
    parser.add_argument("--tiny", action="store_true", help="a model small enough for CPUs")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    out = args.out or Path(tempfile.mkdtemp())
    runs = {**RUNS, **(TWO_GPUS if args.gpus > 1 else {})}
    runs = {name: run for name, run in runs.items() if not args.only or name in args.only}
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] if args.gpus == 1 else "0"
    options = [*SAME, *(jobs.TINY if args.tiny else ()), f"--lr_scheduler.total_steps={args.steps}"]

    def start(i: int, name: str, steps: int):
        two = name in TWO_GPUS
        where = {"ranks": 2, "port": 29600 + i} if two else {"device": device}
        # a checkpoint at its last step is what the first part leaves
        interval = (f"--checkpoint.interval={args.steps // 2}",) if "resumed" in name else ()
        more = (*options, *runs[name][0], *interval, f"--training.steps={steps}")
        return jobs.start(out / name.replace(" ", "-").replace(",", ""), *more, **where)

    begin = time.monotonic()
    halves = {name: start(i, name, args.steps // 2) for i, name in enumerate(runs) if "resumed" in name}
    whole = {name: start(i, name, args.steps) for i, name in enumerate(runs) if "resumed" not in name}
    failed = 0
    for i, (name, process) in enumerate(halves.items()):
        failed += process.wait() != 0
        whole[name] = start(20 + i, name, args.steps)
    losses = {}
    for name, process in whole.items():
        failed += process.wait() != 0
        losses[name] = jobs.scalars(out / name.replace(" ", "-").replace(",", ""))
    for name, (_, equals) in runs.items():
        steps = len(losses[name])
        failed += steps != args.steps
        last = losses[name].get(args.steps, float("nan"))
        if not equals or equals not in losses:
            print(f"{name}: {steps} steps, last loss {last:.6f}")
            continue
        other = [step for step, loss in losses[equals].items() if losses[name].get(step) != loss]
        failed += bool(other)
        verdict = f"other at {len(other)} steps, first {min(other)}" if other else "equal to the bit"
        print(f"{name}: {steps} steps, last loss {last:.6f}, {verdict} ({equals})")
    print(f"{failed} failed, {time.monotonic() - begin:.0f} s; logs in {out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
