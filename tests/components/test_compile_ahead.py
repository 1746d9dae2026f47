"""Kernels compiled before a job's first step: those that its layers launch; the first launch waits for them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import momoe_titan.register  # noqa: F401 - the model of the jobs below
from momoe_titan.components.compile_ahead import compile_kernels_ahead, layer_kernels, step_kernels
from momoe_titan.config.reading import read_job
from momoe_titan.kernels import compile_ahead, gpu, launch, versions
from tests.support import commands

ROOT = Path(__file__).resolve().parents[2]
ROUTER_ONLY = """
import torch
from momoe_titan.kernels import compile_ahead, gpu
layer = compile_ahead.LayerKernels(64, 64, 64, 4, 2, torch.bfloat16, 0.0, True, ("sigmoid", True, 1.0, True), True, 64)
step = compile_ahead.StepKernels(layer, 2, 2, torch.float32, torch.bfloat16, torch.bfloat16, (0.9, 0.95))
seen = []
parts = lambda: (layer.router(), layer.loss(), step.update(), step.balance())
compile_ahead.compile_here(parts, gpu.PlannedGpu((9, 0)), lambda compiled: seen.append(compiled.metadata.name))
print(*sorted(seen))
"""


HASHES = """
from momoe_titan.kernels.compile_ahead import hash_kernels
from momoe_titan.kernels.hopper import kernels
{first}
print(kernels.weight_grad_kernel.cache_key)
"""


class Kernel:
    """What `launch` sees of a kernel."""

    def __init__(self):
        self.calls = []

    def warmup(self, *args, grid, **options):
        self.calls.append((args, grid, options))

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append("launched")


@pytest.mark.parametrize(
    "options, expected",
    [
        (
            ["--compile.no-enable"],
            {"save_percent": 100.0, "compiled": False, "counts_margins": True, "dtype": torch.bfloat16},
        ),
        ([], {"num_classes": 32768}),
        (["--momoe.loss_chunk_mib", "0"], {"num_classes": 0}),
        (["--momoe.save_percent", "auto", "--compile.enable"], {"save_percent": 50.0, "compiled": True}),
        (["--momoe.load_balance_rule", "sign"], {"counts_margins": False}),
        (["--momoe.backend", "torchtitan"], None),
        (["--parallelism.tensor_parallel_degree", "2"], None),
    ],
)
def test_knows_what_a_job_launches(options, expected):
    batch = "--training.local_batch_size", "8", "--training.seq_len", "2048", "--momoe.save_percent", "100"
    batch = batch[:-2] if "auto" in options else batch
    layer = layer_kernels(read_job(["--job.config_file", str(ROOT / "train_configs/500m.toml"), *batch, *options]))
    if expected is None:
        assert layer is None
        return
    sizes = layer.num_tokens, layer.d_model, layer.ffn, layer.num_experts, layer.top_k
    assert sizes == (8 * 2048, 768, 512, 32, 4)
    assert {name: getattr(layer, name) for name in expected} == expected


@pytest.mark.parametrize(
    "options, gpu_there, local_rank, starts",
    [
        ([], True, "0", True),
        ([], True, None, True),
        ([], True, "1", False),
        ([], False, "0", False),
        (["--momoe.backend", "torchtitan"], True, "0", False),
    ],
)
def test_the_first_rank_of_a_machine_with_gpus_begins(monkeypatch, options, gpu_there, local_rank, starts):
    job, started = read_job(["--job.config_file", str(ROOT / "train_configs/500m.toml"), *options]), []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = SimpleNamespace(major=9, minor=0, multi_processor_count=66)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(compile_ahead, "start", lambda *args: started.append(args))
    compile_kernels_ahead(job)
    layer = layer_kernels(job)
    assert started == ([(layer, step_kernels(job, layer, 2), gpu.PlannedGpu((9, 0), 66))] if starts else [])


def test_a_planned_gpu_compiles_only_where_it_is_asked_to():
    kernel = Kernel()
    with gpu.plan_for(gpu.PlannedGpu((9, 0))):
        launch.launch(kernel, (1,), 3, E=4)
        with launch.compiling_ahead():
            launch.launch(kernel, (2,), 3, E=4)
            launch.launch(kernel, (0,), 3, E=4)
        launch.launch(kernel, (1,), 3, E=4)
    assert kernel.calls == [((3,), (2,), {"E": 4})]


def test_the_first_launch_waits_once():
    kernel = Kernel()
    launch.before_compiling(lambda: kernel.calls.append("waited"))
    for _ in range(2):
        launch.launch(kernel, (1,))
    assert kernel.calls == ["waited", "launched", "launched"]


def test_a_kernel_compiled_alone_has_the_name_that_a_step_looks_for():
    in_a_step = "kernels.up_proj_kernel.cache_key, kernels.rows_kernel.cache_key"
    hashed = [commands.run("-c", HASHES.format(first=first)) for first in ("hash_kernels()", in_a_step)]
    names = {done.stdout for done in hashed}
    assert len(names) == 1 and len(names.pop()) > 64, hashed


def test_compiles_without_a_gpu(tmp_path):
    shown = commands.run("-c", ROUTER_ONLY, env=commands.environment(TRITON_CACHE_DIR=str(tmp_path)))
    compiled = {file.stem for file in tmp_path.rglob("*.cubin")}
    assert compiled == {
        "_route_kernel",
        "_route_backward_kernel",
        "_parts_kernel",
        "_entropy_kernel",
        "_add_entropy_kernel",
        "_cross_entropy_kernel",
        "_count_margins_kernel",
        "_add_tokens_kernel",
        "_square_sums_kernel",
        "_count_steps_kernel",
        "_adamw_kernel",
        "_collect_kernel",
        "_quantiles_kernel",
        "_move_kernel",
        "_mean_logits_kernel",
        "_follow_kernel",
    }
    assert set(shown.stdout.split()) == compiled, shown.stderr


@pytest.mark.parametrize(
    "options, ranks, dtypes",
    [
        ([], 1, (torch.float32, torch.bfloat16, torch.bfloat16)),
        (["--training.global_batch_size", "32"], 1, (torch.float32, torch.float32, torch.bfloat16)),
        (["--momoe.mixed_precision", "autocast"], 1, (torch.float32, torch.float32, None)),
        ([], 2, (torch.float32, torch.float32, None)),
        (["--optimizer.implementation", "for-loop"], 1, (torch.float32, torch.float32, torch.bfloat16)),
        (["--momoe.load_balance_off_layers", "0", "3"], 1, (torch.float32, torch.bfloat16, torch.bfloat16)),
    ],
)
def test_knows_what_the_optimizer_s_kernels_get(options, ranks, dtypes):
    job = read_job(["--job.config_file", str(ROOT / "train_configs/500m.toml"), *options])
    step = step_kernels(job, layer_kernels(job), ranks)
    assert (step.parameter, step.gradient, step.copy) == dtypes
    assert step.betas == (None if "for-loop" in options else (0.9, 0.95))
    assert (step.num_layers, step.num_balanced) == (12, 10 if "0" in options else 12)


def test_one_launcher_is_built_for_each_kernel_where_triton_has_no_common_one(monkeypatch):
    built = []
    compiled = SimpleNamespace(src="source", metadata="metadata")
    monkeypatch.setattr(versions, "signature_launcher", None)
    compile_ahead.build_launcher(compiled)
    assert built == []
    monkeypatch.setattr(versions, "signature_launcher", lambda *args: built.append(args))
    compile_ahead.build_launcher(compiled)
    assert built == [("source", "metadata")]
    monkeypatch.setattr(versions, "signature_launcher", lambda *args: 1 / 0)  # cannot be: the first launch says why
    compile_ahead.build_launcher(compiled)
