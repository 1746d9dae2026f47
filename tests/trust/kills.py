"""A job that is killed (kill -9) again and again at random moments has the losses of one that was left alone.

    python -m tests.trust.kills --steps 600 --kills 20

The moments are spread over the whole job: in steps, in saves, in validations, and while it starts. Loss and norm of the
gradients of each step are compared to all digits that the log has, and the weights of the last checkpoint to the bit.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.trust import jobs

JOB = (
    *("--checkpoint.enable", "--checkpoint.interval=10", "--checkpoint.keep_latest_k=2", "--metrics.log_freq=1"),
    *("--checkpoint.no-last_save_model_only", "--validation.freq=50", "--validation.steps=1", "--debug.seed=7"),
)
STEP = re.compile(r"step: +(\d+) +loss: +(\S+) +grad_norm: +(\S+)")


def logged(out: Path) -> dict[int, tuple[str, str]]:
    """Loss and norm of each step, as it was told last."""
    return {int(step): (loss, norm) for step, loss, norm in STEP.findall((out / "log.txt").read_text())}


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    file = out / "weights.pt"
    dcp_to_torch_save(out / "checkpoint" / f"step-{step}", file)
    found: dict[str, torch.Tensor] = {}

    def take(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                take(f"{name}.{key}", inner)
        elif isinstance(value, torch.Tensor):
            found[name] = value

    take("", torch.load(file, weights_only=False))
    return found


def killed_at(process: subprocess.Popen, out: Path, step: int, seconds: float) -> bool:
    """Kill it a while after it has logged a step. False: it had ended before."""
    while process.poll() is None and max(logged(out), default=0) < step:
        time.sleep(0.02)
    time.sleep(seconds)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return not ended


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    out, begin = args.out or Path(tempfile.mkdtemp()), time.monotonic()
    options = [*jobs.TINY, *JOB, f"--training.steps={args.steps}"]
    alone = jobs.start(out / "alone", *options)
    draw = random.Random(args.seed)
    moments, kills = sorted(draw.sample(range(1, args.steps), args.kills)), 0
    killed = out / "killed"
    for moment in moments:
        process = jobs.start(killed, *options)
        kills += killed_at(process, killed, moment, draw.random() / 5)
    status = [jobs.start(killed, *options).wait(), alone.wait()]
    told, want = logged(killed), logged(out / "alone")
    other = [step for step in range(1, args.steps + 1) if told.get(step) != want.get(step)]
    of_killed, of_alone = weights(killed, args.steps), weights(out / "alone", args.steps)
    unlike = [name for name, value in of_alone.items() if not torch.equal(value, of_killed[name])]
    failed = bool(other or unlike or any(status) or kills != args.kills or len(want) != args.steps or not of_alone)
    print(
        f"{args.steps} steps, {kills} kills behind steps {moments}, status {status}: other losses at {len(other)} steps"
        f"{f', first {other[0]}' if other else ''}, {len(unlike)} of {len(of_alone)} tensors of the last checkpoint "
        f"differ, {time.monotonic() - begin:.0f} s; {out}"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
