"""The plan of a whole job: against the built model, and by its own rules."""

import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.config import JobConfig
from torchtitan.distributed import parallel_dims
from torchtitan.models.llama3.infra import parallelize as llama3
from torchtitan.tools.logging import logger

import momoe_titan.register  # noqa: F401
from benchmarks import check_plan
from momoe_titan.components.auto_save_percent import plan_in_child
from momoe_titan.config.section import Momoe
from momoe_titan.kernels.gpu import Load, PlannedGpu
from momoe_titan.memory.activation_eviction import ActivationBudget
from momoe_titan.memory.allocator import block_bytes
from momoe_titan.memory.plan import CUBLAS_BYTES, GIB, MemoryPlan, Moment, budget_bytes, context_bytes
from momoe_titan.model import MomoeLlama, flavors
from momoe_titan.plan import __main__ as command_line
from momoe_titan.plan import job as plan_job
from momoe_titan.plan.job import (
    BUCKETS,
    NARROW_WEIGHTS,
    OPTIMIZER,
    PARAMETERS,
    GradientBuckets,
    trace_job,
    trace_training,
)
from momoe_titan.plan.trace import GRADIENTS
from momoe_titan.save_percent import num_saved_rows
from tests.support import commands
from tests.support.forks import in_forks, in_gloo_forks

pytestmark = pytest.mark.usefixtures("hopper_kernels_under_any_release")

BATCH, SEQ = 4, 128
H100 = PlannedGpu((9, 0))
NO_MESH = SimpleNamespace(
    get_optional_mesh=lambda name: None,
    dp_replicate=1,
    dp_shard=1,
    **{f"{name}_enabled": False for name in ("fsdp", "dp", "dp_cp", "dp_replicate", "tp", "pp", "cp", "ep")},
)


def job(ac: str = "none", **momoe) -> JobConfig:
    config = JobConfig()
    config.momoe = Momoe(**momoe)
    config.model.name, config.model.flavor = "momoe_llama", "debugmodel"
    config.training.local_batch_size, config.training.seq_len = BATCH, SEQ
    config.activation_checkpoint.mode = ac
    return config


@functools.cache
def planned(ac: str) -> MemoryPlan:
    """At 100, which tells what any save_percent takes."""
    return trace_training(job(ac, save_percent=100.0), NO_MESH, H100)


@pytest.fixture(scope="module")
def plan() -> MemoryPlan:
    return planned("none")


@pytest.fixture(scope="module")
def model() -> MomoeLlama:
    args = flavors["debugmodel"]
    args.update_from_config(job())
    with torch.device("meta"):
        return MomoeLlama(args)


def test_parameters_and_optimizer_state_are_the_models(plan, model):
    assert plan.num_parameters == sum(p.numel() for p in model.parameters())
    parameters = [block_bytes(p.nbytes) for p in model.parameters()]
    buffers = [block_bytes(b.nbytes) for b in model.buffers()]
    # fused AdamW: two moments and a step number each
    for moment in plan.moments:
        assert moment.parts[PARAMETERS] == sum(parameters) + sum(buffers)
        assert moment.parts[OPTIMIZER] == 2 * sum(parameters) + block_bytes(4) * len(parameters)
    assert plan.peak(0, "optimizer") == plan.peak(100, "optimizer")


def test_tied_embeddings_are_planned_as_one_weight(plan, model, monkeypatch):
    """As in the model that is trained: one parameter, one gradient, one state of the optimizer."""
    monkeypatch.setitem(flavors, "debugmodel", replace(flavors["debugmodel"], tie_word_embeddings=True))
    tied = trace_training(job(save_percent=100.0), NO_MESH, H100)
    one = model.tok_embeddings.weight
    assert plan.num_parameters - tied.num_parameters == one.numel()
    whole, with_one = (max((m for m in p.moments if m.phase == "clip"), key=lambda m: m.base) for p in (plan, tied))
    assert whole.parts[PARAMETERS] - with_one.parts[PARAMETERS] == block_bytes(one.nbytes)
    assert whole.parts[OPTIMIZER] - with_one.parts[OPTIMIZER] == 2 * block_bytes(one.nbytes) + block_bytes(4)
    narrow = block_bytes(2 * one.numel())  # its copy to compute with
    assert whole.base - with_one.base == 4 * block_bytes(one.nbytes) + narrow + block_bytes(4)  # its gradient too


def test_a_shared_parameter_stays_one_under_fsdp():
    assert in_forks(1, lambda rank: _stays_one_under_fsdp())


def _stays_one_under_fsdp() -> None:
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model[1][0].weight = model[0].weight
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    with plan_job.shared_parameters(model):
        model.to_empty(device="cpu")
    assert model[1][0].weight is model[0].weight
    assert [p.device.type for p in model.parameters()] == ["cpu"] * 3


@pytest.mark.parametrize("save_percent", [[0.0], [37.0], [100.0], [0.0, 100.0, 12.5]])
def test_saved_z_is_what_the_op_saves(plan, model, save_percent):
    args = model.model_args
    rows, row_bytes = BATCH * SEQ * args.moe_args.top_k, 2 * args.moe_hidden_dim * 2
    percents = save_percent * 3 if len(save_percent) == 1 else save_percent
    exact = sum(num_saved_rows(rows, p) * row_bytes for p in percents)
    assert exact <= plan.saved_z(save_percent) < exact + 3 * (row_bytes + 512)


def test_traced_at_any_save_percent_the_plan_is_the_same(plan):
    """One trace tells all: at 50 it foresees what a trace at 50 finds."""
    at_50 = trace_training(job(save_percent=50.0), NO_MESH, H100)
    assert at_50.active(100) == plan.active(50)
    assert at_50.reserved(100) == plan.reserved(50)


def traced_arguments(monkeypatch, place: int) -> list:
    """What `trace_training` gets there from `trace_job`, which traces nothing."""
    used = []

    def traced(*args):
        used.append(args[place])
        return MemoryPlan([], [], {}, 0)

    monkeypatch.setattr(plan_job, "trace_training", traced)
    monkeypatch.setattr(plan_job, "_parallel_dims", lambda *args: None)
    return used


@pytest.mark.parametrize("compiled, degree, beside", [(False, 1, False), (True, 1, True), (True, 2, False)])
def test_a_compiled_job_is_planned_with_dz_beside_z(compiled, degree, beside, monkeypatch):
    """Under expert parallelism the experts are not compiled."""
    used = traced_arguments(monkeypatch, 2)
    config = job()
    config.compile.enable, config.parallelism.expert_parallel_degree = compiled, degree
    notes = plan_job.trace_job(config, degree).notes
    assert used == [PlannedGpu((9, 0), compiled=beside)]
    assert len(notes) == compiled


@pytest.mark.parametrize(
    "enable, components, fused", [(True, ["loss"], True), (True, ["model"], False), (False, ["loss"], False)]
)
def test_the_loss_is_planned_as_it_is_compiled(enable, components, fused, monkeypatch):
    used = traced_arguments(monkeypatch, 4)
    config = job()
    config.compile.enable, config.compile.components = enable, components
    plan_job.trace_job(config)
    assert used == [fused]


def test_a_compiled_loss_keeps_the_logits_and_writes_one_gradient():
    """As measured on an H200 (docs/performance.md, "The loss"); without torch.compile it is several times as much."""
    config = job(save_percent=100.0, loss_chunk_mib=0)
    config.model.flavor, config.training.local_batch_size = "debugmodel", 8 * BATCH
    config.momoe.vocab_size = 16_384
    logits = 8 * BATCH * SEQ * config.momoe.vocab_size * 2
    costs = plan_job.StepCost(8), plan_job.StepCost(8)
    eager = trace_training(config, NO_MESH, H100, costs[0])
    fused = trace_training(config, NO_MESH, H100, costs[1], True)
    assert fused.kept["output and loss"] == logits and fused.kept["loss"] <= 512 < 2 * logits <= eager.kept["loss"]
    moment = fused.peak_moment(100)
    assert moment.phase == "backward" and moment.parts["temporary, backward"] == pytest.approx(logits, rel=0.02)
    assert eager.peak(100, "backward") - fused.peak(100, "backward") > 3.9 * logits
    traffic = [cost.work[True, "elementwise"].num_bytes for cost in costs]
    assert traffic[0] - traffic[1] > 10 * logits  # three passes of two bytes in place of eighteen
    assert fused.num_parameters == eager.num_parameters


@pytest.mark.parametrize(
    "degree, dispatch, growing", [(2, "auto", False), (2, "chosen_ranks", True), (4, "auto", True)]
)
def test_memory_grows_with_the_routing_where_tokens_go_to_chosen_ranks(degree, dispatch, growing, monkeypatch):
    loads = []

    def traced(config, dims, gpu, *args):
        loads.append(gpu.load)
        return MemoryPlan(["0"], [], {}, 0, layer_growth={}, layer_kept={"0": 0})

    monkeypatch.setattr(plan_job, "trace_training", traced)
    monkeypatch.setattr(plan_job, "_parallel_dims", lambda *args: None)
    monkeypatch.setattr(MemoryPlan, "with_growth", lambda plan, *args: plan)
    config = job(save_percent="auto", expert_dispatch=dispatch)
    config.parallelism.expert_parallel_degree = degree
    plan_job.trace_job(config, degree)
    more = [Load(degree, 1), Load(degree, degree)]
    assert loads == [Load(), *more] if growing else loads == [Load()]


@pytest.mark.parametrize("fields, captures", [({"cuda_graphs": True}, True), ({}, False)])
def test_a_graph_is_planned_where_one_is_captured(fields, captures, monkeypatch):
    monkeypatch.setattr(plan_job, "trace_training", lambda *args: MemoryPlan([], [], {}, 0))
    monkeypatch.setattr(plan_job, "_parallel_dims", lambda *args: None)
    assert plan_job.trace_job(job(**fields)).from_graph is captures


def test_what_a_graph_leaves_are_the_gradients(plan, model):
    alive = {}
    for number, num_bytes, _ in plan.events[slice(*plan.step)]:
        alive[number] = num_bytes
    rounded = sum(block_bytes(2 * p.numel()) for p in model.parameters())  # bfloat16
    assert rounded <= sum(alive.values()) < 1.2 * rounded
    assert replace(plan, from_graph=True).reserved(0) > plan.reserved(0)


def test_a_job_with_document_masks_is_planned_without_them(monkeypatch):
    """A trace has no documents; the plan says what it left out."""
    masked = []

    def traced(config, *args):
        masked.append(config.momoe.document_mask)
        return MemoryPlan([], [], {}, 0)

    monkeypatch.setattr(plan_job, "trace_training", traced)
    monkeypatch.setattr(plan_job, "_parallel_dims", lambda *args: None)
    config = job(document_mask=True)
    (note,) = plan_job.trace_job(config).notes
    assert masked == [False] and config.momoe.document_mask and "momoe.document_mask" in note


def test_clipping_begins_where_the_gradients_are_clipped(plan, model):
    """With nothing of the forward alive: not even the loss, which is let go when autograd begins."""
    weights = sum(block_bytes(2 * p.numel()) for p in model.parameters())  # to compute with, bfloat16
    # bfloat16 too, but for the memory in which the loss adds up that of the output layer
    gradients = weights + block_bytes(model.output.weight.nbytes) // 2
    clip = max((m for m in plan.moments if m.phase == "clip"), key=lambda m: m.base)
    assert clip.parts[GRADIENTS] == gradients and clip.parts[NARROW_WEIGHTS] == weights and not clip.z
    rest = clip.base - gradients - weights - clip.parts[PARAMETERS] - clip.parts[OPTIMIZER]
    assert 0 < rest < gradients / 10
    assert plan.peak(0, "clip") == plan.peak(100, "clip") < plan.peak(0, "backward")


@pytest.mark.parametrize("ac", ["none", "full", "selective"])
def test_memory_grows_with_save_percent(ac):
    plan = planned(ac)
    active = [plan.active(p) for p in range(0, 101, 10)]
    assert active == sorted(active)
    assert active[0] + plan.saved_z(100) >= active[-1]
    assert all(plan.reserved(p) >= plan.active(p) for p in (0, 50, 100))
    assert plan.reserved(100, plan.reserved(100)) is not None
    assert plan.reserved(100, plan.active(100) // 2) is None


def test_checkpointing_keeps_less():
    none, full = planned("none"), planned("full")
    for part in ("attention", "norms", "shared experts"):
        assert full.kept.get(part, 0) < none.kept[part] / 2


def made_up(base=1000, after=1020) -> MemoryPlan:
    """Four layers whose z is 100 blocks each: a percent of one layer is one block. The step peaks
    with all z alive, or when the last layer's are gone."""
    z = [(str(i), 100 * 512) for i in range(4)]
    moments = [Moment("loss", z, base * 512, {}), Moment("backward", z[:-1], after * 512, {})]
    return MemoryPlan([layer for layer, _ in z], moments, kept={}, num_parameters=1, slack=7 * 512)


def blocks(num_bytes: int) -> int:
    return (num_bytes - CUBLAS_BYTES) // 512


def test_the_peak_is_the_highest_moment():
    plan = made_up()
    assert [blocks(plan.active(p)) for p in (0, 50, [0, 0, 0, 10], 100)] == [1020, 1200, 1020, 1400]
    assert plan.peak_moment(0).phase == "backward" and plan.peak_moment(100).phase == "loss"
    with pytest.raises(ValueError, match="save_percent has 2 numbers, must have 1 or one per MoE layer, 4"):
        plan.active([1, 2])


@pytest.mark.parametrize("room", [1026, 1027, 1028, 1100, 1107, 1108, 1300, 1406])
def test_fill_is_the_largest_that_fits(room):
    plan, budget = made_up(after=1020), room * 512 + CUBLAS_BYTES
    choice = plan.fill(budget)
    assert choice == sorted(choice) and sum(0 < c < 100 for c in choice) <= 1  # the last layers first
    taken = blocks(plan.active(choice) + plan.slack)
    assert taken == max(room, 1027)  # to the block; 0 takes 1027


def test_nothing_is_kept_where_nothing_fits():
    assert made_up().fill(0) == [0.0] * 4
    assert made_up().fill(10**9) == [100.0] * 4


def uneven(reserved: dict[float, int]) -> MemoryPlan:
    """What is reserved by the mean of save_percent over two layers; 100 where nothing is said."""
    plan = MemoryPlan(["0", "1"], [], kept={}, num_parameters=1)
    plan.fill = lambda room: [0.0, 41.0]
    plan.reserved = lambda choice: reserved.get(sum(choice) / 2, 100)
    return plan


@pytest.mark.parametrize(
    "reserved, expected",
    [
        ({0: 60, 20.5: 40, 100: 70}, ([0, 41], 40)),
        ({0: 60, 20.5: 40, 25: 50, 50: 51}, ([25, 25], 50)),  # 0 takes more
        ({0: 50, 20.5: 60}, ([0, 0], 50)),
        ({0: 60, 20.5: 58, 75: 55, 100: 70}, ([75, 75], 55)),  # nothing fits: the least
    ],
)
def test_the_command_line_goes_by_what_is_reserved(reserved, expected):
    assert command_line.largest_that_fits(uneven(reserved), 50) == expected
    assert command_line.largest_that_fits(MemoryPlan([], [Moment("loss", [], 7, {})], {}, 1), 0)[0] == []


def shown(fits: dict, budget: int) -> str:
    return command_line.text(
        {
            "model": "m",
            "num_parameters": 1,
            "world_size": 1,
            "gpu": "H100 with 79 GiB",
            "layout": "no parallelism",
            "tried": [{"options": "--training.local_batch_size 1", "save_percent": [25.0], "total": GIB, "fits": True}],
            "local_batch": [1, 1],
            "budget": budget * GIB,
            "budget_from": command_line.budget_from(0.2, 80),
            "context": 0,
        }
        | {"rows": [], "fits": fits, "time": {}, "notes": []}
    )


def test_what_fits_in_words():
    text = shown({"save_percent": [25.0, 25.0], "total": 15 * GIB}, 16)
    assert "largest that fits: save_percent 25 in every layer, 15.0 GiB in total" in text and "by layer" not in text
    assert "budget 16.0 = momoe.memory_budget 0.2 x 80" in text
    of_layers = shown({"save_percent": [0.0, 41.0], "total": 15 * GIB}, 16)
    assert "save_percent 20 on average" in of_layers and "by layer: 0 41" in of_layers
    assert command_line.budget_from(70, 80) == "momoe.memory_budget 70"
    assert "what to try" not in text and "assumed: H100 with 79 GiB, for each rank; no parallelism" in text
    text = shown({"save_percent": [25.0], "total": 17 * GIB}, 16)
    assert "does not fit: the least, save_percent 25, takes 17.0" in text
    assert "what to try, as planned:\n  --training.local_batch_size 1: fits with save_percent 25, 1.0 GiB" in text


@pytest.mark.parametrize("options, memory", [("", 79), ("--gpu h200", 139), ("--gpu h200 --gpu_memory_gib 20", 20)])
def test_the_memory_is_that_of_the_gpu(options, memory):
    args, _ = command_line.build_parser().parse_known_args(options.split())
    assert command_line.gpu_memory_gib(args) == memory


def test_layout_in_words():
    config = JobConfig()
    assert command_line.layout(config, 1) == "no parallelism"
    config.parallelism.tensor_parallel_degree, config.parallelism.expert_parallel_degree = 2, 4
    assert command_line.layout(config, 16) == "FSDP 8, tensor parallel 2, of them expert parallel 4"


def test_what_to_try_where_nothing_fits():
    config = JobConfig()
    config.training.local_batch_size, config.activation_checkpoint.mode = 8, "none"
    half, full = {"training.local_batch_size": 4}, {"activation_checkpoint.mode": "full"}
    assert command_line.others_to_try(config, 2) == [(half, 2), (full, 2), ({}, 4), ({**half, **full}, 4)]
    config.training.local_batch_size, config.activation_checkpoint.mode = 1, "full"
    config.parallelism.data_parallel_shard_degree = 2
    assert command_line.others_to_try(config, 2) == []


def test_a_long_plan_says_so(monkeypatch, capfd):
    monkeypatch.setattr(command_line, "PATIENCE", 0.05)
    with command_line.progress():
        time.sleep(0.5)
    assert capfd.readouterr().err == "planning: two steps of the job on tensors without memory ...\n"
    monkeypatch.setattr(command_line, "PATIENCE", 60.0)
    with command_line.progress():
        pass
    assert capfd.readouterr().err == ""


def test_a_plan_survives_json(plan):
    again = MemoryPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.active([0, 50, 100]) == plan.active([0, 50, 100])
    budget = plan.active(50) + plan.slack
    assert again.fill(budget) == plan.fill(budget)


def test_budget():
    assert budget_bytes(0.5, 80 * GIB) == 40 * GIB
    assert budget_bytes(1, 80 * GIB) == 80 * GIB
    assert budget_bytes(70.0, 80 * GIB) == 70 * GIB


@pytest.fixture
def predict():
    """What the command line says of the debug model."""
    level = logger.level

    def predict(*options: str) -> dict:
        args, job_args = command_line.build_parser().parse_known_args(options)
        return command_line.predict(
            args, command_line.read_job(args, ["--job.config_file", "train_configs/debug_model.toml", *job_args])
        )

    yield predict
    logger.setLevel(level)


PIPELINE = "--time --parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_microbatch_size 0"
DDP = "--parallelism.data_parallel_replicate_degree 2 --parallelism.data_parallel_shard_degree 1"


@pytest.mark.parametrize(
    "options, message",
    [
        ("--model.flavor 500m", "model.flavor '500m' is none of 'debugmodel', "),
        ("--model.name none", "model.name 'none'"),
        ("--training.local_batch_size 0", "training.local_batch_size is 0, must be at least 1"),
        ("--momoe.save_percent 50 50", "momoe.save_percent has 2 numbers"),
        ("--parallelism.tensor_parallel_degree 2", "must be the number of processes, 1"),
        ("--parallelism.expert_parallel_degree 2", "parallelism.expert_parallel_degree is 2, must be 1 without FSDP"),
        (
            "--world_size 8 --training.global_batch_size 100",
            "training.global_batch_size is 100, must be -1 or a multiple of 64",
        ),
        (
            f"--world_size 4 {DDP} --parallelism.tensor_parallel_degree 2",
            "data_parallel_replicate_degree is 2 with .* compose",
        ),
        ("--world_size 2 --training.enable_cpu_offload", "training.enable_cpu_offload is True"),
        (f"--world_size 2 {PIPELINE}", "parallelism.pipeline_parallel_microbatch_size is 0, must divide"),
        (f"--world_size 3 {PIPELINE}", "must be the number of processes, 3"),
        ("--experimental.custom_import no.module", "experimental.custom_import 'no.module': No module"),
        ("--world_size 0", "--world_size is 0, must be finite and above 0"),
        ("--gpu_memory_gib inf", "--gpu_memory_gib is inf, must be finite and above 0"),
        ("--gpu_memory_gib nan", "--gpu_memory_gib is nan"),
        ("--nvlink inf", "--nvlink is inf"),
        ("--context_gib -5", "--context_gib is -5.0, must be finite and at least 0"),
        ("--context_gib nan", "--context_gib is nan"),
        ("--overlap -1", "--overlap is -1.0, must be from 0 to 1"),
        ("--overlap 2", "--overlap is 2.0"),
        ("--capability x", "--capability is 'x', must be two numbers as in 9.0"),
        ("--capability 9", "--capability is '9'"),
    ],
)
def test_what_is_refused(predict, options, message):
    environment = dict(os.environ)
    with pytest.raises(ValueError, match=message):
        predict(*options.split())
    assert environment == dict(os.environ)


@pytest.mark.parametrize(
    "failure, status, last",
    [
        (ValueError("a.field is 1"), 2, "momoe_titan.plan: error: a.field is 1"),
        (OSError("no file"), 2, "momoe_titan.plan: error: no file"),
        (
            RuntimeError("no data\nIf you are using Caffe2"),
            1,
            "momoe_titan.plan: error: the job cannot be traced: RuntimeError: no data",
        ),
        (AssertionError(), 1, "momoe_titan.plan: error: the job cannot be traced: AssertionError"),
    ],
)
def test_the_reason_comes_last(failure, status, last, monkeypatch, capsys):
    def fail(*args):
        raise failure

    monkeypatch.setattr("momoe_titan.train.describe_cpu", contextlib.nullcontext)
    monkeypatch.setattr(command_line, "read_job", fail)
    monkeypatch.setattr(sys, "argv", ["plan"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as exit_:
        command_line.main()
    said = capsys.readouterr().err
    assert exit_.value.code == status and said.splitlines()[-1] == last
    assert ("Traceback" in said) == (status == 1)


def _is_planned(options: str) -> None:
    parallel_dims.device_type = "cpu"
    args, job_args = command_line.build_parser().parse_known_args(options.split())
    config = command_line.read_job(args, ["--job.config_file", "train_configs/debug_model.toml", *job_args])
    assert command_line.predict(args, config)["rows"][0]["max_active"] > GIB / 8


@pytest.mark.parametrize(
    "options",
    [
        "--momoe.check_ids",
        "--training.seq_len 128",  # validation's is longer
        "--world_size 2 --parallelism.expert_parallel_degree 2 --momoe.backend torchtitan",
    ],
)
def test_what_only_training_or_a_cpu_cannot_do_is_planned(options):
    assert in_forks(1, lambda rank: _is_planned(options))


def test_runs_of_bench_memory_had_no_validation(monkeypatch):
    configs = []
    monkeypatch.setattr(plan_job, "trace_job", configs.append)
    level = logger.level
    check_plan.predict("train_configs/debug_model.toml", ["--training.seq_len", "128"], "momoe", "full")
    logger.setLevel(level)
    assert not configs[0].validation.enable and configs[0].training.seq_len == 128


def _ddp_takes_the_gradients_once_more() -> None:
    parallel_dims.device_type = "cpu"
    config = job()
    config.parallelism.data_parallel_replicate_degree, config.parallelism.data_parallel_shard_degree = 2, 1
    cost = plan_job.StepCost(8)
    alone = trace_training(job(save_percent=100.0, mixed_precision="autocast"), NO_MESH, H100)
    plan = trace_job(config, 2, cost=cost)
    gradients = 4 * plan.num_parameters
    for moment in plan.moments:
        assert gradients <= moment.parts[BUCKETS] < gradients + 512 * 10
    for percent in (0, 100):
        assert abs(plan.active(percent) - alone.active(percent) - gradients) < 512 * 10
    sent = cost.sent[True, "all-reduce", False, False]
    assert sent.num_bytes == gradients  # 2 times, half of it to the other rank


def test_ddp_takes_the_gradients_once_more():
    assert in_forks(1, lambda rank: _ddp_takes_the_gradients_once_more())


def _buckets_are_the_reducers() -> None:
    def model() -> nn.Module:
        return nn.Sequential(*(nn.Linear(300, 300 + i % 2 * 200, bias=False) for i in range(2)), nn.Linear(500, 700))

    real, mesh = model(), init_device_mesh("cpu", (1,))
    ours = GradientBuckets(mesh.get_group(), 1 << 20)
    ours.allocate(model())
    replicate(real, device_mesh=mesh, bucket_cap_mb=1)
    for _ in range(3):  # buckets are made anew in the second step, and are told of in the third
        real(torch.ones(4, 300)).sum().backward()
    reducer = replicate.state(real)._ddp._get_ddp_logging_data()
    assert reducer["rebuilt_bucket_sizes"] == ", ".join(str(t.nbytes) for t in ours.tensors)
    assert not reducer["gradient_as_bucket_view"]


def test_the_buckets_are_as_large_as_torchtitan_asks_for(monkeypatch):
    asked = []
    monkeypatch.setattr(llama3, "replicate", lambda model, device_mesh, bucket_cap_mb: asked.append(bucket_cap_mb))
    llama3.apply_ddp(nn.Linear(1, 1), None, enable_compile=False)
    assert asked == [plan_job.DDP_BUCKET_BYTES >> 20]


def test_buckets_are_those_of_the_reducer(tmp_path):
    assert in_gloo_forks(1, tmp_path / "store", _buckets_are_the_reducers)


def run(*options: str, **more) -> subprocess.CompletedProcess:
    return commands.run(
        "-m", "momoe_titan.plan", "--job.config_file", "train_configs/debug_model.toml", *options, **more
    )


def _growth_is_exact() -> None:
    parallel_dims.device_type = "cpu"
    config = job(save_percent="auto")
    config.parallelism.expert_parallel_degree = 4
    config.activation_checkpoint.mode, config.activation_checkpoint.selective_ac_option = "selective", "2"
    plan = plan_job.trace_job(config, 4)
    again = MemoryPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    config.momoe.save_percent = [100.0]
    layers = [SimpleNamespace(save_percent=percent, n=i) for i, percent in enumerate((50, 0, 100))]
    for tokens, slots in ((1, 1), (2, 2), (3, 3), (2, 1), (3, 2)):
        found = trace_training(config, plan_job._parallel_dims(config, 4), replace(H100, load=Load(tokens, slots)))
        for layer, kept in found.layer_kept.items():
            more_tokens, more_slots = plan.layer_growth[layer]
            foreseen = plan.layer_kept[layer] + (tokens - 1) * more_tokens + (slots - 1) * more_slots
            assert abs(kept - foreseen) <= 3 * 512  # blocks are rounded up
        budget = ActivationBudget(again, layers)
        budget.room = 1 << 60
        for layer in layers:
            budget.reserve(layer, tokens, slots, 0)
        peak = found.active([50, 0, 100])
        most = budget._peak_S(budget._rows_L2, budget._sent_L, budget._rows_L2.max()).max() - plan.slack
        assert budget.least_peak - plan.slack - 3 * 512 <= peak <= most + 3 * 512
        if tokens == slots:
            assert abs(most - peak) <= 3 * 512
    # layers of a recomputed block do not keep the rows that were sent to them
    first, second, third = (sum(growth) for growth in plan.layer_growth.values())
    assert first == third != second and min(first, second) > 0
    tokens, slots = plan.layer_growth[plan.layers[0]]
    assert min(tokens, slots) > 0
    assert not any(m.growth for m in plan.moments if m.phase in ("loss", "optimizer"))
    assert max(m.growth for m in plan.moments if m.phase == "backward") > max(first, second)


def test_growth_foresees_what_a_trace_with_more_rows_finds():
    assert in_forks(1, lambda rank: _growth_is_exact())


@pytest.mark.slow
def test_command_line_and_shards():
    out = run("--world_size", "2", "--json", "--momoe.save_percent", "auto", "--momoe.fsdp_copies")
    assert out.returncode == 0, out.stderr
    p = json.loads(out.stdout)
    assert [row["save_percent"] for row in p["rows"]] == [0, 25, 50, 75, 100]
    parameters = p["num_parameters"] * 4
    sharded = p["rows"][0]["at_peak"][PARAMETERS]
    assert parameters / 2 <= sharded < parameters / 2 * 1.1  # padding, buffers
    assert all(row["total"] == row["max_reserved"] + p["context"] for row in p["rows"])
    assert p["fits"]["save_percent"] == [100.0] * 3
    assert p["context"] == context_bytes(2) + p["plan"]["staging"]
    block = p["num_parameters"] / 5 * 2  # of the four in bfloat16, embedding and output layer beside them
    granules = 6 * 2 * 2**20  # of six groups, each in whole ones
    assert 5 * block < p["plan"]["staging"] < 5 * (p["num_parameters"] * 2 + granules)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_pipeline_stages_are_timed_in_bfloat16_with_fsdp_and_without(world_size):
    options = ["--parallelism.pipeline_parallel_degree", "2", "--momoe.cuda_graphs"]
    out = run("--world_size", str(world_size), "--json", "--time", *options)
    assert out.returncode == 0, out.stderr
    p = json.loads(out.stdout)
    assert "pipeline" in p["layout"]
    times = p["time"]["100"]
    # seconds; from a graph those of the optimizer alone. There is none with FSDP beside a pipeline.
    assert (times["host"] < 0.0025) == (world_size == 2), times["host"]
    kinds = times["by_kind"]
    width = flavors["debugmodel"].moe_hidden_dim
    assert [kind for kind in kinds if kind.startswith("experts forward")] == [f"experts forward {width}"]


def _what_fits_is_found_behind_what_does_not() -> None:
    parallel_dims.device_type = "cpu"
    options = "--model.flavor 500M --training.seq_len 2048 --activation_checkpoint.mode full"
    args, job_args = command_line.build_parser().parse_known_args(options.split())
    config = command_line.read_job(args, ["--job.config_file", "train_configs/debug_model.toml", *job_args])
    plan = command_line._plan(args, config, (9, 0), None)
    with mock.patch.object(command_line, "_plan", lambda *_: plan):
        rows = command_line.predict(args, config)["rows"]
        more, less = next((a, b) for a, b in itertools.combinations(rows, 2) if a["total"] > b["total"])
        args.gpu_memory_gib = (more["total"] + less["total"]) / 2 / GIB / config.momoe.memory_budget
        shown = command_line.text(command_line.predict(args, config))
    rows = {line.split()[0]: line for line in shown.splitlines() if line.strip() and line.split()[0].isdigit()}
    assert rows[str(more["save_percent"])].endswith("too much")
    assert not rows[str(less["save_percent"])].endswith("too much")
    found = re.search(r"largest that fits: save_percent (\d+)", shown)
    assert int(found[1]) >= less["save_percent"] and "does not fit" not in shown


@pytest.mark.slow
def test_the_command_line_finds_what_its_table_shows_to_fit():
    """Where a larger save_percent takes less memory than a smaller one: the allocator reserves in blocks."""
    assert in_forks(1, lambda rank: _what_fits_is_found_behind_what_does_not())


@pytest.mark.slow
def test_where_nothing_fits_the_plan_says_what_would():
    options = "--gpu_memory_gib", "0.3", "--context_gib", "0.1", "--training.seq_len", "512"
    out = run(*options, before=[commands.fork_children])
    assert out.returncode == 0, out.stderr
    assert "assumed: GPU with 0.3 GiB, compute capability 9.0, for each rank; no parallelism" in out.stdout
    tried = out.stdout.partition("what to try, as planned:\n")[2].splitlines()
    assert [line.strip().partition(":")[0] for line in tried[:4]] == [
        "--training.local_batch_size 4",
        "--activation_checkpoint.mode full",
        "--world_size 2",
        "--training.local_batch_size 4 --activation_checkpoint.mode full --world_size 2",
    ]
    assert all(" GiB" in line and "fit" in line for line in tried[:4])


@pytest.mark.slow
def test_a_plan_made_in_a_child_is_the_plan(plan, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", commands.Popen)
    config = job(save_percent="auto")
    config.job.custom_config_module = "momoe_titan.job_config"
    config.experimental.custom_import = "momoe_titan.register"
    assert plan_in_child(config) == json.loads(json.dumps(plan.to_dict()))
