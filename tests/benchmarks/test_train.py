import subprocess

import pytest
from torch.utils.tensorboard import SummaryWriter

from benchmarks import train as bench_train
from tests.support import commands


def write_run(folder, losses, speeds, **others):
    with SummaryWriter(str(folder / "tb")) as writer:
        for step, (loss, speed) in enumerate(zip(losses, speeds, strict=True), start=1):
            writer.add_scalar("loss_metrics/global_avg_loss", loss, step)
            writer.add_scalar("throughput(tps)", speed, step)
            for tag, values in others.items():
                writer.add_scalar(
                    {"gpu": bench_train.MEMORY[0], "maxvio": "moe/maxvio_batch_mean"}[tag], values[step - 1], step
                )
    return bench_train.read_scalars(folder)


def test_rows_compare_with_the_first_run(tmp_path):
    first = write_run(
        tmp_path / "a", [8.0, 4.0, 2.0, 1.0], [1, 100, 300, 200], gpu=[3.0, 5.0, 4.0, 4.0], maxvio=[2.0, 1.0, 0.5, 0.25]
    )
    second = write_run(tmp_path / "b", [8.0, 4.4, 2.0, 1.1], [1, 10, 30, 20])
    rows = bench_train.summarise({"ours": first, "other": second})
    assert [row["apart"] for row in rows] == pytest.approx([0, 0.1], abs=1e-6)
    assert [row["tokens_per_s"] for row in rows] == [250, 25]  # of the second half
    assert rows[0]["memory_gib"] == 5.0 and rows[1]["memory_gib"] is None
    text = bench_train.table(rows).splitlines()
    assert text[2] == "| ours | 8.0000 -> 1.0000 (step 4) | 0.0e+00 | 250 | 5.00 | 2.00 -> 0.25 |"
    assert text[3] == "| other | 8.0000 -> 1.1000 (step 4) | 1.0e-01 | 25 |  |  |"


def test_a_run_without_tensorboard_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no TensorBoard file under .* is metrics.enable_tensorboard on"):
        bench_train.read_scalars(tmp_path)


def test_a_failing_run_shows_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", commands.Popen)
    with pytest.raises(RuntimeError, match="ended with 2:(.|\n)*momoe.save_percent must be a number"):
        bench_train.train("train_configs/debug_model.toml", ["--momoe.save_percent", "101"], 1, tmp_path)
