"""What a training step logs, where, and for how many copies from the device."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchtitan.config import JobConfig

from momoe_titan.kernels import compile_count as counting
from momoe_titan.model import metrics

ROOT = Path(__file__).parents[2]


class Recorder:
    """Stands where the TensorBoard logger would."""

    def __init__(self):
        self.steps = {}

    def log(self, values, step):
        self.steps[step] = values


class Balancer:
    def latest_metrics(self):
        return {
            "moe/maxvio_batch_mean": torch.tensor(0.25),
            "moe/dropped_tokens": torch.tensor(0, dtype=torch.int64),
            "counts_LE": torch.ones(2, 4, dtype=torch.int64),
        }


@pytest.fixture
def processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built = metrics.build_momoe_metrics_processor(
        JobConfig(), SimpleNamespace(pp_enabled=False, non_data_parallel_size=1)
    )
    built.logger = Recorder()
    built.num_flops_per_token = 100
    return built


def log_step(processor, step=1):
    processor.ntokens_since_last_log = 64
    processor.data_loading_times.append(0.001)
    processor.log(step, 2.0, 3.0, 0.5, {"lr": 0.1})
    return processor.logger.steps[step]


def test_cpu_step_names_process_memory_and_no_gpu(processor):
    values = log_step(processor)
    assert values["loss_metrics/global_avg_loss"] == 2.0 and values["lr"] == 0.1
    assert values["throughput(tps)"] > 0 and values["tflops"] > 0
    memory = {name for name in values if name.startswith("memory/")}
    assert memory == {
        "memory/process_rss(GiB)",
        "memory/process_rss(%)",
        "memory/process_peak_rss(GiB)",
        "memory/process_peak_rss(%)",
    }
    assert not any("mfu" in name for name in values)
    assert processor.ntokens_since_last_log == 0 and processor.data_loading_times == []
    # a step without a data loading time, as after a resume, is not a division by zero
    processor.log(2, 2.0, 3.0, 0.5)


def test_cpu_validation(processor):
    processor.ntokens_since_last_log = 64
    processor.log_validation(1.5, 7)
    values = processor.logger.steps[7]
    assert values["validation_metrics/loss"] == 1.5
    assert values["validation_metrics/memory/process_rss(GiB)"] > 0
    assert not any("reserved" in name or "active" in name for name in values)


def test_process_memory_follows_the_process():
    monitor = metrics.ProcessMemoryMonitor()
    before = monitor.get_peak_stats()
    assert 0 < before.rss_gib <= before.peak_rss_gib < monitor.device_capacity_gib
    ballast = torch.ones(64 * 2**20 // 4)
    after = monitor.get_peak_stats()
    assert after.peak_rss_gib >= before.rss_gib + 0.05 and ballast.numel()
    assert after.max_reserved_gib == after.peak_rss_gib, "read by TorchTitan's Trainer"
    assert monitor.device_name


def test_balance_is_logged_from_the_optimizer_hook(processor):
    assert "moe/maxvio_batch_mean" not in log_step(processor)
    processor.optimizers = SimpleNamespace(load_balancer=Balancer())
    values = log_step(processor, 2)
    assert values["moe/maxvio_batch_mean"] == 0.25 and values["moe/dropped_tokens"] == 0
    assert values["moe/kernel_compiles"] == counting.compile_count()
    assert "counts_LE" not in values


def test_gpu_step_keeps_titans_scalars(monkeypatch):
    """With a GPU it is TorchTitan's own log, and ours beside it."""

    class GpuMonitor:
        device_name = "NVIDIA H100 80GB HBM3"

        def get_peak_stats(self):
            return metrics.titan.DeviceMemStats(1.0, 2.0, 3.0, 4.0, 0, 0)

        def reset_peak_stats(self):
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(metrics.titan, "build_device_memory_monitor", GpuMonitor)
    built = metrics.build_momoe_metrics_processor(
        JobConfig(), SimpleNamespace(pp_enabled=False, non_data_parallel_size=1)
    )
    built.logger = Recorder()
    built.num_flops_per_token = 100
    built.optimizers = SimpleNamespace(load_balancer=Balancer())
    values = log_step(built)
    assert values["memory/max_reserved(GiB)"] == 3.0 and "mfu(%)" in values
    assert values["moe/maxvio_batch_mean"] == 0.25 and "moe/kernel_compiles" in values
    assert not any("rss" in name for name in values)
    built.ntokens_since_last_log = 64
    built.log_validation(1.5, 2)
    assert built.logger.steps[2]["validation_metrics/loss"] == 1.5


def test_scalars_come_in_one_copy(monkeypatch):
    copies = []
    for name in ("tolist", "item", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, f=original, n=name: copies.append(n) or f(*a)
        )
    big = 2**40 + 1
    values = {f"moe/{i}": torch.tensor(big + i) for i in range(6)} | {"x": torch.tensor(0.5)}
    assert metrics.host_scalars(values) == {f"moe/{i}": big + i for i in range(6)} | {"x": 0.5}
    assert copies == ["tolist"]
    assert metrics.host_scalars({}) == {}


def test_tensorboard_file_is_written(processor, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torchtitan.components.metrics import TensorBoardLogger

    processor.logger = TensorBoardLogger(str(tmp_path))
    processor.optimizers = SimpleNamespace(load_balancer=Balancer())
    processor.ntokens_since_last_log = 64
    processor.log(3, 2.0, 3.0, 0.5)
    processor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    assert {"moe/maxvio_batch_mean", "moe/kernel_compiles", "memory/process_rss(GiB)"} <= set(tags)
    assert events.Scalars("moe/maxvio_batch_mean")[0].value == 0.25


COUNT_IN_A_FRESH_PROCESS = """
import sys
from triton import knobs
calls = []
knobs.compilation.listener = lambda **kwargs: calls.append(kwargs)
from momoe_titan.kernels import compile_count as counting
assert counting.install() and counting.install()
event = dict(src=None, metadata={}, metadata_group={}, times=None)
knobs.compilation.listener(**event, cache_hit=False)
knobs.compilation.listener(**event, cache_hit=True)
assert (counting.compile_count(), counting.cache_load_count()) == (1, 1)
assert len(calls) == 2, "the listener that was there is still called, once per event"
"""


COUNT_WITHOUT_TRITON = """
import importlib.util, sys
sys.modules["triton"] = None
spec = importlib.util.spec_from_file_location("counting", "momoe_titan/kernels/compile_count.py")
counting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(counting)
assert not counting.install() and counting.compile_count() == 0
"""


@pytest.mark.parametrize("code", [COUNT_IN_A_FRESH_PROCESS, COUNT_WITHOUT_TRITON])
def test_kernel_compiles_are_counted(code):
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
