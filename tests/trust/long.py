"""A long job in several sittings, by our layer and by TorchTitan's: the loss on validation data ends the same.

    python -m tests.trust.long --steps 800                  # the debug model, one GPU, all jobs side by side
    python -m tests.trust.long --steps 100 --tiny           # a small model, for CPUs
    python -m tests.trust.long --config 500m.toml --steps 4000 --sittings 4
    python -m tests.trust.long --seeds 3 4 5                # three of each, over all GPUs: their means

Ours with nothing and with all kept for the backward, TorchTitan's layer, and ours in float32, from the same seeds. Each
sitting resumes from the checkpoint of the one before. Exit status 1 if a last validation loss, the mean of all seeds,
is more than 0.5% from that of TorchTitan's layer. Training makes differences in rounding larger: at the debug model's
own learning rate of 3e-3 the seeds of one layer end up to 11% apart. So the jobs have 1e-3. Give several seeds.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.trust import jobs

ARMS = {
    "stock": ("--momoe.backend=torchtitan",),
    "ours-0": ("--momoe.save_percent=0",),
    "ours-100": ("--momoe.save_percent=100",),
    "ours-float32": ("--momoe.save_percent=0", "--training.mixed_precision_param=float32"),
}
LIMIT = 0.005  # of the loss of the first arm
VALIDATIONS = 4  # in a sitting


def options(steps: int, sittings: int) -> list[str]:
    part = steps // sittings
    return [
        *("--checkpoint.enable", f"--checkpoint.interval={part}", "--checkpoint.no-last_save_model_only"),
        *("--checkpoint.keep_latest_k=2", "--metrics.log_freq=10"),
        *("--validation.enable", f"--validation.freq={part // VALIDATIONS}", "--validation.steps=10"),
        *(f"--lr_scheduler.total_steps={steps}", f"--lr_scheduler.warmup_steps={max(1, steps // 8)}"),
        "--optimizer.lr=1e-3",
    ]


def losses_in(out: Path) -> list[dict]:
    """Of each job in a folder, by step: the losses of training that were logged, and those of validation."""
    rows = []
    for folder in sorted(out.iterdir()):
        arm, _, seed = folder.name.rpartition("-")
        of_job = (sorted(jobs.scalars(folder, tag).items()) for tag in (jobs.LOSS, "validation_metrics/loss"))
        training, validation = ({step: round(loss, 5) for step, loss in losses} for losses in of_job)
        rows.append({"arm": arm, "seed": int(seed), "training": training, "validation": validation})
    return rows


def compared(rows: list[dict], arms: list[str], last: int) -> dict[str, float]:
    """How far the mean of each arm's last validation losses is from the first arm's, as a part of that one."""
    ends = {arm: [row["validation"].get(last, float("nan")) for row in rows if row["arm"] == arm] for arm in arms}
    want = statistics.fmean(ends[arms[0]])
    return {arm: statistics.fmean(losses) / want - 1 for arm, losses in ends.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--sittings", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=ARMS, help="which jobs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3])
    parser.add_argument("--json", type=Path, default=None, help="file for the losses of all steps that are logged")
    parser.add_argument("--config", default="debug_model.toml", help="of the folder train_configs")
    parser.add_argument("--tiny", action="store_true", help="a model small enough for CPUs")
    parser.add_argument("--out", type=Path, default=None)
    args, more = parser.parse_known_args(argv)  # more: options of the job
    if args.steps % (args.sittings * VALIDATIONS):
        parser.error(f"--steps is {args.steps}, must be a multiple of {args.sittings * VALIDATIONS}")
    out, begin = args.out or Path(tempfile.mkdtemp()), time.monotonic()
    same = [*(jobs.TINY if args.tiny else ()), *options(args.steps, args.sittings), *more]
    failed, all_jobs, gpus = 0, list(itertools.product(args.seeds, args.only)), torch.cuda.device_count()
    for sitting in range(1, args.sittings + 1):
        steps, running = f"--training.steps={args.steps * sitting // args.sittings}", []
        for number, (seed, arm) in enumerate(all_jobs):
            device = str(number % gpus) if gpus > 1 else ""
            options_of = *same, *ARMS[arm], f"--debug.seed={seed}", steps
            running.append(jobs.start(out / f"{arm}-{seed}", *options_of, device=device, config=args.config))
        failed += sum(process.wait() != 0 for process in running)
    rows = losses_in(out)
    if args.json is not None:
        args.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for arm, apart in compared(rows, args.only, args.steps).items():
        failed += not abs(apart) <= LIMIT
        print(f"{arm}: {apart:+.3%} at the end")
    for row in rows:
        curve = ", ".join(f"{step}: {loss:.4f}" for step, loss in row["validation"].items())
        print(f"{row['arm']}, seed {row['seed']}: validation loss {curve}")
    print(f"{failed} failed, {time.monotonic() - begin:.0f} s; tensorboard --logdir {out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
