"""Short runs of the whole program on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
# Some seconds a run: the debug model on short sequences.
SMALL = [
    "--training.seq_len=64",
    "--training.local_batch_size=4",
    "--metrics.log_freq=1",
    "--metrics.disable_color_printing",
    "--validation.seq_len=64",
    "--validation.local_batch_size=4",
    "--validation.steps=2",
    "--lr_scheduler.warmup_steps=4",
]


def train(out: Path, *options: str, processes: int = 1, on_gpu: bool = False) -> str:
    """Run debug_model.toml with options to its end; returns what it printed."""
    start = ["-m", "momoe_titan.train"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        start += ["--local-ranks-filter=0", "--tee=3", "-m", "momoe_titan.train"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    env.pop("TRITON_INTERPRET", None)
    if not on_gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run(
        [sys.executable, *start, "--job.config_file", "train_configs/debug_model.toml"]
        + ["--job.dump_folder", str(out), *SMALL, *options],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    return run.stdout


def losses(output: str) -> dict[int, float]:
    return {int(s): float(x) for s, x in re.findall(r" step: +(\d+) +loss: +([\d.]+)", output)}


def test_loss_falls_and_tensorboard_has_the_scalars(tmp_path):
    output = train(tmp_path, "--training.steps=25")
    logged = losses(output)
    assert sorted(n for n in logged) == list(range(1, 26))
    assert logged[1] == pytest.approx(7.62, abs=0.8)  # ln 2048, an even guess
    assert logged[25] < logged[1] - 0.6

    # Nothing pretends to be a GPU.
    assert "No GPU: training on the CPU" in output
    assert "float32 arithmetic" in output
    assert "mfu:" not in output and "CUDA" not in output and "A100" not in output

    (run,) = (tmp_path / "tb").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "loss_metrics/global_avg_loss",
        "validation_metrics/loss",
        "throughput(tps)",
        "moe/maxvio_batch_mean",
        "moe/maxvio_batch_max",
        "moe/dead_experts",
        "moe/bias_min",
        "moe/bias_max",
        "moe/dropped_tokens",
        "moe/kernel_compiles",
    } <= tags
    assert not any("mfu" in tag for tag in tags)
    values = {tag: [e.value for e in events.Scalars(tag)] for tag in tags}
    assert set(values["moe/dropped_tokens"]) == {0.0}
    assert values["moe/bias_max"][-1] > 0 > values["moe/bias_min"][-1]
    assert all(v == v for series in values.values() for v in series)  # no NaN


@pytest.mark.slow
def test_save_percent_changes_no_loss(tmp_path):
    runs = [
        losses(train(tmp_path / str(i), "--training.steps=4", "--momoe.save_percent", *percents))
        for i, percents in enumerate((["0"], ["100"], ["0", "37", "100"]))
    ]
    assert len(runs[0]) == 4
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.slow
def test_two_processes_learn(tmp_path):
    """FSDP over two processes, on the same global batch of other documents."""
    output = train(tmp_path, "--training.steps=12", "--training.local_batch_size=2", processes=2)
    logged = losses(output)
    assert sorted(logged) == list(range(1, 13))
    assert logged[12] < logged[1] - 0.3


@pytest.mark.gpu
def test_loss_falls_on_the_gpu(tmp_path):
    output = train(tmp_path, "--training.steps=25", "--momoe.backend=triton", on_gpu=True)
    logged = losses(output)
    assert logged[25] < logged[1] - 0.6
    assert torch.cuda.get_device_name() in output


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["context", "tensor"])
def test_two_gpus_share_the_sequence(tmp_path, kind):
    """Both GPUs see the data of the one, whose ring attention and sums are rounded elsewhere."""
    job = ["--training.steps=8", "--debug.seed=42", "--training.mixed_precision_param=bfloat16"]
    if kind == "tensor":  # without FSDP, TorchTitan computes in the dtype of the weights
        job[-1] = "--training.mixed_precision_param=float32"
    one = losses(train(tmp_path / "one", *job, on_gpu=True))
    degree = f"--parallelism.{kind}_parallel_degree=2"
    two = losses(train(tmp_path / "two", *job, degree, processes=2, on_gpu=True))
    assert two == pytest.approx(one, rel=1e-2)
