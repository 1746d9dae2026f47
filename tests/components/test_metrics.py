"""What a training step logs, where, and for how many copies from the device."""

import contextlib
import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util
from torchtitan.config import JobConfig

from momoe_titan.components import metrics
from momoe_titan.components.validation import TextValidator
from momoe_titan.kernels import compile_count as counting
from momoe_titan.moe.expert_stats import want_entropy
from tests.support.tiny import batch, build, loss_of, moes, optimizers_for, tiny_args

ROOT = Path(__file__).parents[2]


class Recorder:
    """Stands where the TensorBoard logger would."""

    def __init__(self):
        self.steps = {}

    def log(self, values, step):
        self.steps[step] = values


def dims(**fields):
    return SimpleNamespace(**{"pp_enabled": False, "non_data_parallel_size": 1, "cp": 1, "tp": 1, **fields})


@pytest.fixture
def processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    built = metrics.build_momoe_metrics_processor(JobConfig(), dims())
    built.logger = Recorder()
    built.num_flops_per_token = 100
    yield built
    want_entropy(False)


def with_model(processor, **fields):
    """The tiny model's two MoE layers, with counts as if a step were over."""
    model = build(tiny_args(**fields))
    processor.model_parts = [model]
    processor.optimizers = optimizers_for(model)
    return model


def log_step(processor, step=1):
    processor.ntokens_since_last_log = 64
    processor.data_loading_times.append(0.001)
    processor.should_log(step)
    processor.log(step, 2.0, 3.0, 0.5, {"lr": 0.1})
    return processor.logger.steps[step]


def test_cpu_step_names_process_memory_and_no_gpu(processor, caplog):
    caplog.set_level("INFO")
    values = log_step(processor)
    assert values["loss_metrics/global_avg_loss"] == 2.0 and values["lr"] == 0.1
    assert values["throughput(tps)"] > 0 and values["tflops"] > 0
    memory = {name for name in values if name.startswith("memory/")}
    assert memory == {
        "memory/process_rss(GiB)",
        "memory/process_rss(%)",
        "memory/process_peak_rss(GiB)",
        "memory/process_peak_rss(%)",
        "memory/worst_rank",
        "memory/worst_rank_rss(GiB)",
        "memory/worst_rank_peak_rss(GiB)",
        "memory/capacity(GiB)",
    }
    assert not any("mfu" in name for name in values)
    assert processor.totals.memory_name == "process memory" and "process memory: " in caplog.text
    assert processor.ntokens_since_last_log == 0 and processor.data_loading_times == []
    # a step without a data loading time, as after a resume, is not a division by zero
    processor.log(2, 2.0, 3.0, 0.5)


def test_cpu_validation(processor, caplog):
    processor.ntokens_since_last_log = 64
    with caplog.at_level("INFO"):
        processor.log_validation(1.5, 7)
    assert "loss:  1.5000" in caplog.text and "perplexity: 4.5 " in caplog.text
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


def test_balance_and_memory_of_all_layers(processor):
    """Tokens per expert (3 layers, the last with balancing off): MaxVio is (max - mean) / mean."""
    model = with_model(processor, n_layers=4, save_percent=[0, 50, 100], load_balance_off_layers=[3])
    assert "moe/maxvio_batch_mean" not in log_step(processor)
    counts = [[30, 10, 10, 0, 0], [10] * 5, [50, 0, 0, 0, 0]]
    for moe, counts_E in zip(moes(model), counts, strict=True):
        moe.tokens_per_expert.copy_(torch.tensor(counts_E))
    processor.optimizers.step()
    values = log_step(processor, 2)
    expected = {
        "moe/maxvio_batch_mean": (2 + 0 + 4) / 3,
        "moe/maxvio_batch_max": 4,
        "moe_maxvio/layer_01": 2,
        "moe_maxvio/layer_02": 0,
        "moe_maxvio/layer_03": 4,
        "moe/dead_experts": 2 + 4,
        "moe/bias_min": -0.01,
        "moe/bias_max": 0.01,
        "moe/dropped_tokens": 0,
        "moe/save_percent": 50,
        "moe/kernel_compiles": counting.compile_count(),
        "memory/worst_rank": 0,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    # two of three layers' worth of z in bfloat16: rows of 2 experts, 2F = 20 wide
    tokens = processor.job_config.training.local_batch_size * processor.job_config.training.seq_len
    assert values["memory/experts_kept(GiB)"] * 2**30 == pytest.approx(1.5 * tokens * 2 * 20 * 2)
    processor.optimizers.step()  # a step without tokens
    assert log_step(processor, 3)["moe/maxvio_batch_max"] == 0


def test_router_entropy_is_recorded_at_log_steps(processor):
    """Equal scores are an entropy of 1; only forwards of the step that is logged count."""
    processor.job_config.metrics.log_freq = 2
    model = with_model(processor)
    routers = [moe.router for moe in moes(model)]

    def step(i, scale):
        for router in routers:
            torch.nn.init.normal_(router.gate.weight, std=scale)
        loss_of(model, *batch(i)).backward()
        processor.optimizers.step()
        return processor.should_log(i)

    assert step(1, 0.0)
    processor.log(1, 2.0, 3.0, 0.5)
    assert processor.logger.steps[1]["moe/router_entropy_min"] == pytest.approx(1, abs=1e-6)
    assert step(2, 100.0)
    processor.log(2, 2.0, 3.0, 0.5)
    decided = processor.logger.steps[2]["moe/router_entropy_mean"]
    assert 0 < decided < 0.95
    assert not step(3, 100.0)
    assert not any(router.entropy_and_tokens.any() for router in routers), "not a log step"
    model.eval()(batch(0)[0])
    model.train()
    assert step(4, 0.0)
    processor.log(4, 2.0, 3.0, 0.5)
    assert processor.logger.steps[4]["moe/router_entropy_min"] == pytest.approx(1, abs=1e-6)


def test_router_losses_are_logged_unweighted_where_a_job_has_them(processor):
    args = tiny_args(aux_loss_weight=0.01, aux_loss_scope="batch", router_z_loss_weight=0.001)
    processor.model_args = args
    model = with_model(processor, aux_loss_weight=0.01, aux_loss_scope="batch", router_z_loss_weight=0.001)
    for moe in moes(model):
        torch.nn.init.zeros_(moe.router.gate.weight)  # each expert's mean score is alike, whoever is chosen
    loss_of(model, *batch(1)).backward()
    processor.optimizers.step()
    values = log_step(processor)
    assert values["moe/aux_loss_mean"] == pytest.approx(1)
    assert values["moe/router_z_loss_mean"] == pytest.approx(math.log(args.moe_args.num_experts) ** 2)
    assert not any(moe.router.loss_sums.any() for moe in moes(model)), "the next log starts anew"
    processor.model_args = tiny_args()
    assert not [tag for tag in log_step(processor, 2) if "loss" in tag and tag.startswith("moe/")]


@pytest.mark.parametrize("losses", [{}, {"aux_loss_weight": 0.01, "router_z_loss_weight": 0.001}])
def test_recording_entropy_compiles_nothing_anew(losses):
    (layer, _) = moes(build(tiny_args(**losses)))
    router, x_TD = layer.router, torch.randn(6, 24)
    torch._dynamo.reset()
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for wanted, tokens in ((False, 0), (True, 6), (False, 6), (True, 12)):  # in all so far
            want_entropy(wanted)
            compiled(x_TD)[0].sum().backward()
            assert router.entropy_and_tokens[1] == tokens
    want_entropy(False)


def test_a_first_step_that_is_not_logged_leaves_no_entropy(processor):
    """As after a resume: what the routers recorded of step 41 is not mixed into step 50's."""
    model = with_model(processor)
    loss_of(model, *batch(0)).backward()
    assert all(moe.router.entropy_and_tokens[1] > 0 for moe in moes(model))
    assert not processor.should_log(41)
    assert not any(moe.router.entropy_and_tokens.any() for moe in moes(model))


def test_non_finite_steps_and_resumes_are_counted(processor, tmp_path):
    processor.job_config.job.dump_folder = str(tmp_path)
    for start in ("20260101-0000", "20260102-0000", "20260103-0000"):
        (tmp_path / "tb" / start).mkdir(parents=True)
        (tmp_path / "tb" / start / "events.out.tfevents.1.host").touch()
    assert processor.should_log(40)
    processor.log(40, 2.0, 3.0, float("nan"))
    processor.log(50, float("inf"), 3.0, 1.0)
    processor.log(60, 2.0, 3.0, 1.0)
    assert processor.logger.steps[60]["health/non_finite"] == 2
    assert processor.logger.steps[60]["health/resumes"] == 2


def test_skipped_steps_are_counted_and_told(processor, caplog):
    model = with_model(processor)
    processor.optimizers = optimizers_for(model, implementation="fused")
    for step, value in enumerate((0.0, float("nan"), float("nan"), 0.0)):
        loss_of(model, *batch(step)).backward()
        model.output.weight.grad[0, 0] += value
        processor.optimizers.step()
        processor.optimizers.zero_grad()
        assert log_step(processor)["health/skipped_steps"] == (0, 1, 2, 2)[step]
    assert caplog.text.count("1 optimizer steps were NOT TAKEN") == 2


def test_the_configuration_of_a_run_is_recorded_field_by_field():
    config = JobConfig()
    config.training.steps, config.optimizer.lr = 7, math.inf
    config.experimental.custom_args_module = {"own": {"field": 3}}
    flat = metrics.flat_config(config)
    assert flat["training.steps"] == 7 and flat["metrics.log_freq"] == config.metrics.log_freq
    assert flat["optimizer.lr"] == "inf"  # which JSON cannot hold
    assert flat["experimental.custom_args_module.own"] == {"field": 3}
    json.dumps(flat, allow_nan=False)


def test_time_per_step_counts_the_steps(processor, monkeypatch):
    now = processor.time_last_log
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now + 6)
    for step in (8, 9, 10):
        processor.should_log(step)
    processor.ntokens_since_last_log = 60
    processor.log(10, 2.0, 3.0, 0.5)
    values = processor.logger.steps[10]
    assert values["time_metrics/step(s)"] == 2 and values["throughput(tps)"] == 10
    assert values["tflops"] == pytest.approx(10 * processor.num_flops_per_token / 1e12)


def test_an_interval_begins_anew_after_a_validation(processor, monkeypatch):
    """Neither the time of a validation nor its tokens count for the steps behind it."""
    now = processor.time_last_log
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now + 100)
    processor.should_log(1)
    processor.ntokens_since_last_log = 5000
    processor.data_loading_times.append(50.0)
    processor.log_validation(2.0, step=1)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now + 106)
    for step in (2, 3, 4):
        processor.should_log(step)
    processor.ntokens_since_last_log += 60
    processor.data_loading_times.append(3.0)
    processor.log(4, 2.0, 3.0, 0.5)
    values = processor.logger.steps[4]
    assert values["time_metrics/step(s)"] == 2 and values["throughput(tps)"] == 10
    assert values["time_metrics/data_loading(%)"] == 50


def test_gpu_step_keeps_titans_scalars(monkeypatch, caplog):
    """With a GPU it is TorchTitan's own log with our line, and ours beside it."""
    caplog.set_level("INFO")

    class GpuMonitor:
        device_name = "NVIDIA H100 80GB HBM3"
        device_capacity_gib = 80.0

        def get_peak_stats(self):
            metrics.logger.warning("1 CUDA memory allocation retries.")
            return metrics.titan.DeviceMemStats(1.0, 2.0, 3.0, 4.0, 1, 0)

        def reset_peak_stats(self):
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(metrics.titan, "build_device_memory_monitor", GpuMonitor)
    built = metrics.build_momoe_metrics_processor(JobConfig(), dims())
    built.logger = Recorder()
    built.num_flops_per_token = 1e9
    # The state of the ranks is reduced on the device, which is not there.
    cpu = torch.device("cpu")
    monkeypatch.setattr(metrics.torch, "device", lambda name: cpu)
    values = log_step(built)
    assert values["memory/max_reserved(GiB)"] == 3.0 and "mfu(%)" in values
    assert values["memory/worst_rank_reserved(GiB)"] == 3.0 and "moe/kernel_compiles" in values
    assert values["memory/capacity(GiB)"] == 80.0 and values["health/alloc_retries"] == 1
    assert not any("rss" in name for name in values)
    lines = [r.getMessage() for r in caplog.records]
    assert sum("step:" in line for line in lines) == 1 and "done: 1/10000" in lines[-1]
    assert "mfu: " in lines[-1] and "memory:  3.00GiB(3.8%)" in lines[-1] and "process" not in lines[-1]
    assert built.totals.memory_name == "memory"
    assert sum("retries" in line for line in lines) == 1


def test_each_log_step_has_its_own_peaks(monkeypatch):
    """Also where each step is one, whose memory the host has allocated before it logs the step before."""

    class GpuMonitor:
        device_name, device_capacity_gib, peak = "NVIDIA H100 80GB HBM3", 80.0, 0.0

        def get_peak_stats(self):
            return metrics.titan.DeviceMemStats(self.peak, 2.0, self.peak, 4.0, 0, 0)

        def reset_peak_stats(self):
            self.peak = 1.0  # what stays between steps

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(metrics.titan, "build_device_memory_monitor", GpuMonitor)
    built = metrics.build_momoe_metrics_processor(JobConfig(), dims())
    built.logger, built.num_flops_per_token = Recorder(), 1e9
    cpu = torch.device("cpu")
    monkeypatch.setattr(metrics.torch, "device", lambda name: cpu)
    monkeypatch.setattr(metrics, "to_host", lambda numbers: numbers.tolist)
    numbers = metrics.StepNumbers(*(torch.tensor(value) for value in (2.0, 3.0, 0.5, 700)))
    for step in (1, 2, 3):
        built.should_log(step)
        built.data_loading_times.append(0.1)
        # steps that need less than those before
        built.device_memory_monitor.peak = max(built.device_memory_monitor.peak, 40.0 - 10 * step)
        built.finish_log()
        built.start_log(step, numbers, lr=0.1)
    built.finish_log()
    for name in ("memory/max_active(GiB)", "memory/worst_rank_active(GiB)", "memory/worst_rank_reserved(GiB)"):
        assert [built.logger.steps[step][name] for step in (1, 2, 3)] == [30, 20, 10], name
    want_entropy(False)
    assert metrics.logger.filters == []
    built.ntokens_since_last_log = 64
    built.log_validation(1.5, 2)
    assert built.logger.steps[2]["validation_metrics/loss"] == 1.5


def test_state_comes_in_one_copy(processor, monkeypatch):
    model = with_model(processor)
    loss_of(model, *batch(0)).backward()
    processor.optimizers.step()
    copies = []
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy", "__array__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, f=original, n=name: copies.append(n) or f(*a))
    log_step(processor)
    assert copies == ["tolist"]


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name which keeps what it is told."""
    fake = SimpleNamespace(run=object(), logged={}, init=lambda **kwargs: None, finish=lambda: None)
    fake.log = lambda values, step: fake.logged.setdefault(step, values)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_what_a_run_writes(tmp_path, monkeypatch, wandb):
    """Event files by TensorBoard's reader, and Weights & Biases with the same scalars."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    config.metrics.enable_tensorboard = config.metrics.enable_wandb = True
    config.metrics.log_freq, config.training.steps = 1, 3
    processor = metrics.build_momoe_metrics_processor(config, dims(), tiny_args())
    processor.num_flops_per_token = 100
    model = with_model(processor)
    for step in (1, 2, 3):
        loss_of(model, *batch(step)).backward()
        processor.optimizers.step()
        processor.should_log(step)
        processor.log(step, 2.0, 3.0, 0.5)
    with processor.counting_validation():
        with torch.no_grad():
            loss_of(model.eval(), *batch(3))
        processor.log_validation(1.5, 3)
    processor.close()
    want_entropy(False)

    events = EventAccumulator(str(next((tmp_path / "tb").iterdir())), {"tensors": 0}).Reload()
    tags = events.Tags()
    written = {tag: events.Scalars(tag)[0].value for tag in tags["scalars"] if "valid" not in tag}
    assert written == pytest.approx(wandb.logged[1], rel=1e-6)
    assert written["moe_maxvio/layer_01"] >= 0 and written["memory/process_rss(GiB)"] > 0

    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    # what a run is looked at for comes first
    titles = [category.title for category in layout.category]
    assert titles == ["loss", "balance", "throughput", "memory", "health"]
    charted = [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag]
    for tag in charted:
        assert any(re.search(tag, name) for name in tags["scalars"]) or tag == "^lr$", tag

    (text,) = events.Tensors("run/text_summary")
    described = json.loads(text.tensor_proto.string_val[0])
    assert described["first_step"] == 1 and described["moe_layers"] == [1, 2]
    assert described["save_percent"] == [0, 0] and described["experts_kept_at_100_gib"] > 0

    frames = events.Tensors("moe/load")
    assert [frame.step for frame in frames] == [1, 2, 3]
    load_LE = tensor_util.make_ndarray(frames[0].tensor_proto)
    assert load_LE.shape == (2, 5)
    np.testing.assert_allclose(load_LE.mean(axis=1, dtype="float32"), 1, atol=1e-3)
    assert load_LE.max() == pytest.approx(1 + written["moe/maxvio_batch_max"], rel=1e-3)
    assert len(events.Images("moe/load_per_layer_and_expert")) == 3


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


@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
def test_a_validation_has_the_balance_of_all_its_tokens(processor, backend):
    """Over all batches of the validation; training's counts and bias stay as they are."""
    model = with_model(processor, backend=backend)
    loss_of(model, *batch(0)).backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    ids = []

    def note(router, args, result):
        ids.append(result[1])

    hooks = [moe.router.register_forward_hook(note) for moe in moes(model)]
    with processor.counting_validation(), torch.no_grad():
        for seed in (1, 2):
            loss_of(model.eval(), *batch(seed))
        with processor.not_counting():  # where other ranks have batches left and this one has none
            loss_of(model, *batch(3))
        processor.log_validation(1.5, 7)
    for hook in hooks:
        hook.remove()
    per_layer = [torch.cat([a.flatten(), b.flatten()]) for a, b in zip(ids[:2], ids[2:4], strict=True)]
    counts = torch.stack([torch.bincount(layer, minlength=5) for layer in per_layer]).double()
    expected = counts.amax(1) / counts.mean(1) - 1
    values = processor.logger.steps[7]
    assert values["validation_metrics/maxvio_global_mean"] == pytest.approx(expected.mean())
    assert values["validation_metrics/maxvio_global_max"] == pytest.approx(expected.max())
    assert values["validation_metrics/dead_experts"] == (counts == 0).sum()
    assert values["validation_metrics/perplexity"] == pytest.approx(np.exp(1.5))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    # and none of it is counted once the validation is over
    with torch.no_grad(), processor.not_counting():
        loss_of(model, *batch(3))
    processor.log_validation(1.5, 8)
    assert "validation_metrics/maxvio_global_mean" not in processor.logger.steps[8]


def test_what_is_logged_later_is_the_state_of_its_own_step(processor, monkeypatch, caplog):
    """As on a GPU, where the next step has begun before the host logs the last one."""
    model = with_model(processor)
    monkeypatch.setattr(processor, "finish_log", lambda: None)
    finish = functools.partial(metrics.MomoeMetricsProcessor.finish_log, processor)

    def step(number, counts):
        for moe in moes(model):
            moe.tokens_per_expert.copy_(torch.tensor(counts))
        processor.optimizers.step()
        processor.ntokens_since_last_log += 100 * number
        processor.data_loading_times.append(float(number))
        return processor.should_log(number)

    numbers = metrics.StepNumbers(*(torch.tensor(value) for value in (2.0, 3.0, 0.5, 700)))
    assert step(1, [30, 10, 10, 0, 0])
    processor.time_last_log = time.perf_counter() - 10
    processor.start_log(1, numbers, lr=0.1)
    processor.time_last_log = time.perf_counter() - 10
    step(2, [10] * 5)
    for number in numbers:
        number.zero_()
    assert processor.logger.steps == {}
    finish()
    values = processor.logger.steps[1]
    assert values["loss_metrics/global_avg_loss"] == 2 and values["loss_metrics/global_max_loss"] == 3
    assert values["grad_norm"] == 0.5 and values["n_tokens_seen"] == 700 and values["lr"] == 0.1
    assert values["moe/maxvio_batch_max"] == 2
    assert values["throughput(tps)"] == pytest.approx(10, rel=0.1)
    assert values["time_metrics/step(s)"] == pytest.approx(10, rel=0.1)
    assert values["time_metrics/data_loading(s)"] == 1
    assert (processor.ntokens_since_last_log, processor.data_loading_times) == (200, [2.0])
    assert processor.steps_since_last_log == 1
    finish()
    assert list(processor.logger.steps) == [1]


def test_a_validation_logs_the_step_before_it_first(processor, monkeypatch):
    """Which is still unfinished where the host is a step behind."""
    monkeypatch.setattr("torchtitan.tools.utils.device_type", "cpu")
    said = []
    processor.unfinished = lambda: said.append("step")
    validator = object.__new__(TextValidator)
    validator.metrics_processor, validator.validation_dataloader = processor, []
    validator.before_validation, validator.maybe_enable_amp = lambda: None, contextlib.nullcontext()
    processor.log_validation = lambda **given: said.append("validation")
    validator._mean = lambda sums: 1.5
    validator.validate([torch.nn.Linear(1, 1)], 1)
    assert said == ["step", "validation"] and processor.unfinished is None


@pytest.mark.gpu
def test_a_log_step_does_not_wait_for_the_gpu(monkeypatch):
    """While the GPU is busy the numbers are on their way, and the counters may go on."""
    processor = metrics.build_momoe_metrics_processor(JobConfig(), dims())
    processor.logger = Recorder()
    processor.num_flops_per_token = 100
    model = build(tiny_args(), device="cuda")
    processor.model_parts, processor.optimizers = [model], optimizers_for(model)
    for number in (1, 2):  # the first allocates pinned memory, which waits
        processor.optimizers.step()
        numbers = metrics.StepNumbers(*(torch.tensor(value, device="cuda") for value in (2.0, 3.0, 0.5, 700)))
        processor.should_log(number)
        processor.data_loading_times.append(0.1)
        busy = torch.cuda.Event()
        torch.cuda._sleep(10**9)
        busy.record()
        processor.start_log(number, numbers, lr=0.1)
        started = not busy.query()
        processor.finish_log()
        assert busy.query() and processor.logger.steps[number]["loss_metrics/global_avg_loss"] == 2
    assert started
    want_entropy(False)


def test_the_last_step_is_logged(processor):
    processor.job_config.metrics.log_freq = 5
    processor.job_config.training.steps = 8
    assert [step for step in range(1, 9) if processor.should_log(step)] == [1, 5, 8]


def test_the_loss_is_that_of_the_last_pipeline_stage(processor, monkeypatch, caplog):
    """Other stages, rank 0 among them, have a loss of -1; the line on the console is rank 0's."""
    gather = metrics.gather

    def with_another_rank(*args):
        state = gather(*args)()
        ranks = state.ranks._replace(loss=np.array([-1.0, 2.75]))
        return lambda: dataclasses.replace(state, ranks=ranks)

    monkeypatch.setattr(metrics, "gather", with_another_rank)
    with caplog.at_level("INFO"):
        processor.should_log(1)
        processor.log(1, -1.0, -1.0, 0.5)
    assert "loss:  2.75000" in caplog.text
    assert processor.totals.loss == 2.75
