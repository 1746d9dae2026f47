"""A long job in several sittings, by our layer and by TorchTitan's: the loss on validation data ends the same.

    python -m tests.trust.long --steps 800                  # the debug model, one GPU, all jobs side by side
    python -m tests.trust.long --steps 100 --tiny           # a small model, for CPUs
    python -m tests.trust.long --config 500m.toml --steps 4000 --sittings 4

Ours with nothing and with all kept for the backward, TorchTitan's layer, and ours in float32, from the same seed. Each
sitting resumes from the checkpoint of the one before. Exit status 1 if a last validation loss is more than 0.5% from
that of TorchTitan's layer.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

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
        *("--checkpoint.keep_latest_k=2", "--metrics.log_freq=10", "--debug.seed=3"),
        *("--validation.enable", f"--validation.freq={part // VALIDATIONS}", "--validation.steps=10"),
        *(f"--lr_scheduler.total_steps={steps}", f"--lr_scheduler.warmup_steps={max(1, steps // 20)}"),
    ]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--sittings", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(ARMS), choices=ARMS, help="which jobs")
    parser.add_argument("--config", default="debug_model.toml", help="of the folder train_configs")
    parser.add_argument("--tiny", action="store_true", help="a model small enough for CPUs")
    parser.add_argument("--out", type=Path, default=None)
    args, more = parser.parse_known_args(argv)  # more: options of the job
    if args.steps % (args.sittings * VALIDATIONS):
        parser.error(f"--steps is {args.steps}, must be a multiple of {args.sittings * VALIDATIONS}")
    out, begin = args.out or Path(tempfile.mkdtemp()), time.monotonic()
    same = [*(jobs.TINY if args.tiny else ()), *options(args.steps, args.sittings), *more]
    failed = 0
    for sitting in range(1, args.sittings + 1):
        steps = f"--training.steps={args.steps * sitting // args.sittings}"
        running = [jobs.start(out / name, *same, *ARMS[name], steps, config=args.config) for name in args.only]
        failed += sum(process.wait() != 0 for process in running)
    losses = {name: jobs.scalars(out / name, "validation_metrics/loss") for name in args.only}
    want = losses[args.only[0]].get(args.steps, float("nan"))
    for name, of_step in losses.items():
        last = of_step.get(args.steps, float("nan"))
        apart = last / want - 1
        failed += not abs(apart) <= LIMIT
        curve = ", ".join(f"{step}: {loss:.4f}" for step, loss in sorted(of_step.items()))
        print(f"{name}: {apart:+.3%} at the end; validation loss {curve}")
    print(f"{failed} failed, {time.monotonic() - begin:.0f} s; tensorboard --logdir {out}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
