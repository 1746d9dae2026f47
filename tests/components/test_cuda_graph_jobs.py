"""Whole jobs on a GPU whose steps run from CUDA graphs: their losses are those of the same job without."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import commands

ROOT = Path(__file__).resolve().parents[2]
JOB = [
    *("-m", "momoe_titan.train", "--job.config_file", "train_configs/debug_model.toml", "--debug.seed=42"),
    *("--training.seq_len=64", "--training.local_batch_size=4", "--training.steps=14", "--lr_scheduler.warmup_steps=4"),
    *("--metrics.log_freq=1", "--metrics.disable_color_printing", "--checkpoint.no-enable", "--momoe.backend=triton"),
    *("--validation.seq_len=64", "--validation.local_batch_size=4", "--validation.steps=2", "--validation.freq=5"),
]
CHECKPOINTING = ["--activation_checkpoint.no-preserve_rng_state", "--activation_checkpoint.mode"]
RUNS = {  # name -> options of the job from graphs, and the name of the one without that it is to equal
    "validation between replays": (["--momoe.cuda_graphs"], "without"),
    "full checkpointing": (["--momoe.cuda_graphs", *CHECKPOINTING, "full"], "without"),
    "selective checkpointing": (["--momoe.cuda_graphs", *CHECKPOINTING, "selective"], "without"),
    "full checkpointing, compiled": (
        ["--momoe.cuda_graphs", "--compile.enable", "--activation_checkpoint.mode", "full"],
        "compiled, without",
    ),
    "auto": (["--momoe.cuda_graphs", "--momoe.save_percent", "auto", "--momoe.memory_budget", "0.5"], "without"),
    "microbatches": (["--momoe.cuda_graphs", "--training.global_batch_size=12"], "microbatches, without"),
    "without": ([], None),
    "compiled, without": (["--compile.enable"], None),
    "microbatches, without": (["--training.global_batch_size=12"], None),
}


def at_once(jobs: dict[Any, list[str]], folder: Callable[[str], Path], gpus: str) -> dict[Any, str]:
    """What each of these commands of jobs printed; all run at the same time, on these GPUs, in folders of their own."""
    env = {**commands.environment(), "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", gpus)}
    started = {}
    for name, command in jobs.items():
        started[name] = subprocess.Popen(
            [*command, "--job.dump_folder", str(folder("job"))], cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    try:
        return {name: job.communicate(timeout=600)[0] for name, job in started.items()}
    finally:
        for job in started.values():
            job.kill()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    jobs = {name: [sys.executable, *JOB, *options] for name, (options, _) in RUNS.items()}
    return at_once(jobs, tmp_path_factory.mktemp, gpus="0")


def logged(output: str) -> list[tuple[str, str, float]]:
    """(what, step, loss) of each line of training and validation."""
    found = re.findall(r"(validate )?step: +(\d+) +loss: +([\d.]+)", output)
    return [(what, step, float(loss)) for what, step, loss in found]


def assert_same_losses(output: str, reference: str) -> None:
    """Of 14 steps, and of validation between them."""
    seen, expected = logged(output), logged(reference)
    assert len([what for what, _, _ in expected if not what]) == 14 and any(what for what, _, _ in expected)
    assert [line[:2] for line in seen] == [line[:2] for line in expected], output[-5000:]
    assert [loss for _, _, loss in seen] == pytest.approx([loss for _, _, loss in expected], rel=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, (_, reference) in RUNS.items() if reference])
def test_losses_are_those_without_graphs(outputs, name):
    output, reference = outputs[name], outputs[RUNS[name][1]]
    assert "CUDA graphs are off" not in output and "could not be planned" not in output, output[-5000:]
    assert_same_losses(output, reference)
