"""Training jobs that the scripts of this folder start, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
LOSS = "loss_metrics/global_avg_loss"
TINY = (  # a model that takes a step in milliseconds
    *("--model.flavor=tiny", "--experimental.custom_import=tests.support.tiny_flavor", "--training.seq_len=32"),
    *("--validation.seq_len=32", "--training.local_batch_size=2", "--validation.local_batch_size=2"),
)


def command(out: Path, *options: str, ranks: int = 1, port: int = 0, config: str = "debug_model.toml") -> list[str]:
    """The job of a file in train_configs, with its files in `out`."""
    job = [
        *("-m", "momoe_titan.train", "--job.config_file", f"train_configs/{config}"),
        *("--job.dump_folder", str(out), "--metrics.disable_color_printing", *options),
    ]
    if ranks == 1:
        return [sys.executable, *job]
    launch = "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(port)
    return [sys.executable, *launch, *job]


def start(out: Path, *options: str, device: str = "", **how: Any) -> subprocess.Popen:
    """Start it; what it says goes to a file in `out`. `device` is the GPU to use, or all that are visible.

    `how`: see `command`.
    """
    out.mkdir(parents=True, exist_ok=True)
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
    with open(out / "log.txt", "a") as log:
        line = command(out, *options, **how)
        return subprocess.Popen(line, cwd=ROOT, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def scalars(out: Path, tag: str = LOSS) -> dict[int, float]:
    """A scalar of all starts of a job by step; a later start's value wins."""
    found: dict[int, float] = {}
    for run in sorted(path.parent for path in out.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        if tag in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars(tag)}
    return found
