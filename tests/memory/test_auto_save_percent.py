"""save_percent = "auto": the choice, its correction, what a resumed run takes, and all ranks alike."""

import dataclasses
import json
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchtitan.config import ConfigManager

from momoe_titan.components.auto_save_percent import (
    job_fields,
    plan_in_child,
    set_up_auto_save_percent,
)
from momoe_titan.config.section import Momoe
from momoe_titan.memory.auto_save_percent import (
    MEASURED_STEPS,
    PLAN_ERROR,
    AutoSavePercent,
    describe,
)
from momoe_titan.memory.plan import CUBLAS_BYTES, GIB, MemoryPlan, Moment, context_bytes
from momoe_titan.model import MomoeLlamaArgs
from momoe_titan.model.experts import MomoeExperts
from tests.support import commands
from tests.support.forks import in_gloo_forks
from tests.support.tiny import build, job_config, moes, optimizers_for, tiny_args, train

MIB = 1 << 20
JOB = {"training.local_batch_size": 8}


def plan(z=1000, base=10_000) -> MemoryPlan:
    """Two layers whose z is 1000 MiB each, beside 10000 MiB."""
    layers = [("0", z * MIB), ("1", z * MIB)]
    return MemoryPlan(["0", "1"], [Moment("loss", layers, base * MIB - CUBLAS_BYTES, {})], {}, 1)


@dataclass
class Memory:
    """A GPU of 20000 MiB on which a run takes what the plan says and `more`."""

    layers: list[MomoeExperts]
    more: int = 0
    total_mib: int = 20_000
    outside_mib: int = 0  # beyond what is assumed of a GPU
    reads: int = 0
    given_back: int = 0

    def total(self) -> int:
        return self.total_mib * MIB

    def outside(self) -> int:
        return context_bytes(1) + self.outside_mib * MIB

    def peak_reserved(self) -> int:
        self.reads += 1
        return plan().active([layer.save_percent for layer in self.layers]) + self.more * MIB

    def give_back(self) -> None:
        self.given_back += 1


def start(tmp_path: Path, budget_mib: float, job=JOB, correct=True, **memory) -> AutoSavePercent:
    layers = [MomoeExperts(4, 4, 2) for _ in range(2)]
    budget = (budget_mib * MIB + context_bytes(1)) / GIB
    return AutoSavePercent(
        layers, plan(), budget, Memory(layers, **memory), tmp_path / "run" / "save_percent.json", job, correct
    )


def steps(auto: AutoSavePercent, number: int) -> list[float]:
    for _ in range(number):
        auto(None, (), {})
    return [layer.save_percent for layer in auto.layers]


@pytest.mark.parametrize(
    "room, expected", [(9_000, [0, 0]), (10_000, [0, 0]), (10_500, [0, 50]), (11_250, [25, 100]), (12_000, [100, 100])]
)
def test_the_plan_chooses_and_leaves_room_for_its_error(tmp_path, room, expected):
    auto = start(tmp_path, room * (1 + PLAN_ERROR) + 0.01)
    assert auto.choice == [layer.save_percent for layer in auto.layers] == expected


@pytest.mark.parametrize("room, says", [(9_990, True), (10_010, False)])
def test_a_budget_that_even_0_exceeds_is_said(tmp_path, room, says, caplog):
    caplog.set_level("INFO")
    start(tmp_path, room)
    assert ("but by the plan even save_percent 0 takes 9.77 GiB" in caplog.text) == says
    assert f"hold 9.77 GiB of {room / 1024:.2f}" in caplog.text


@pytest.mark.parametrize("outside_mib, expected", [(-400, [25, 100]), (750, [0, 50])])
def test_what_others_take_of_the_gpu_is_left_to_them(tmp_path, outside_mib, expected):
    """At least what is assumed of a job's first steps."""
    room = (10_500 if outside_mib > 0 else 11_250) * (1 + PLAN_ERROR) + 0.01
    assert start(tmp_path, room + max(outside_mib, 0), outside_mib=outside_mib).choice == expected


@pytest.mark.parametrize(
    "more, expected",
    [
        (0, [50, 100]),  # as planned: the room that was left for the error is used
        (400, [10, 100]),
        (2_000, [0, 0]),  # far more than planned: back to nothing
        (-600, [100, 100]),
    ],
)
def test_what_was_measured_corrects_once(tmp_path, more, expected):
    auto = start(tmp_path, 11_500, more=more)
    before = list(auto.choice)
    assert steps(auto, MEASURED_STEPS - 1) == before and auto.memory.reads == auto.memory.given_back == 0
    assert steps(auto, 1) == expected and auto.memory.given_back == (expected != before)
    auto.memory.more = 10_000
    assert steps(auto, 20) == expected and auto.memory.reads == 1
    # never above the budget where a smaller value would have fitted
    auto.memory.more = more
    assert auto.memory.peak_reserved() <= 11_500.01 * MIB or expected == [0, 0]


@pytest.mark.parametrize("rows", [1.0, 0.75, 1.25])
def test_a_correction_goes_by_the_rows_that_came(tmp_path, monkeypatch, rows):
    """Expert parallelism: with few rows, or z shed for many, a rank takes less than it may the next time."""
    grows = dataclasses.replace(plan(), layer_growth={"0": (600 * MIB, 400 * MIB), "1": (600 * MIB, 400 * MIB)})
    monkeypatch.setattr(f"{__name__}.plan", lambda: grows)
    auto = start(tmp_path, 11_500)
    for layer in auto.layers:
        auto.activation_budget.reserve(layer, rows, rows, 0)
    assert (auto.activation_budget.evicted_bytes > 0) == (rows > 1)
    taken = 10_000 + 2 * 1000 * (rows - 1) + (0 if rows > 1 else 810 * rows)
    monkeypatch.setattr(Memory, "peak_reserved", lambda self: int(taken * MIB))
    # 5% more rows would take 10100 and 1050 for each z, of 11500 less the 5% of an uncorrected plan
    assert auto.choice == [0, 81] and steps(auto, MEASURED_STEPS) == [33, 100]
    resumed = start(tmp_path, 11_500)
    assert resumed.choice == [33, 100] and resumed.steps_left == 0
    assert not resumed.activation_budget.quiet  # what a choice evicts first is said
    for run in (auto, resumed):
        assert run.activation_budget.room == run.room == pytest.approx(11_500 * MIB, abs=MIB)
        assert all(layer.activation_budget is run.activation_budget for layer in run.layers)


def test_no_correction_where_the_model_is_compiled(tmp_path):
    auto = start(tmp_path, 11_500, correct=False)
    before = list(auto.choice)
    assert steps(auto, 20) == before and auto.memory.reads == 0


def test_a_resumed_run_takes_the_stored_choice(tmp_path):
    first = start(tmp_path, 11_500, more=400)
    uncorrected = list(first.choice)
    again = start(tmp_path, 11_500, more=400)
    assert again.choice == uncorrected and again.steps_left == MEASURED_STEPS  # still to be corrected
    corrected = steps(first, MEASURED_STEPS)
    assert corrected != uncorrected
    resumed = start(tmp_path, 11_500, more=-5_000)
    assert resumed.choice == corrected
    assert steps(resumed, 20) == corrected and resumed.memory.reads == 0


def test_room_is_asked_of_a_stored_choice_only_where_a_ledger_needs_it(tmp_path, monkeypatch):
    first = start(tmp_path, 11_500)
    stored = json.loads(first.file.read_text())
    del stored["room"]
    stored["save_percent"] = [1, 1]
    first.file.write_text(json.dumps(stored))
    assert start(tmp_path, 11_500).choice == [1, 1]
    grows = dataclasses.replace(plan(), layer_growth={"0": (0, 0), "1": (0, 0)})
    monkeypatch.setattr(f"{__name__}.plan", lambda: grows)
    assert start(tmp_path, 11_500).choice == [0, 90]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixed_precision", "autocast"),
        ("loss_chunk_mib", 0),
        ("cuda_graphs", True),
        ("document_mask", True),
        ("memory_budget", 0.5),
    ],
)
def test_a_choice_for_other_memory_is_not_taken(tmp_path, caplog, field, value):
    caplog.set_level("INFO")
    for fields in ({}, {field: value}):
        start(tmp_path, 11_500, job_fields(job_config(save_percent="auto", **fields)))
    assert f"is for other momoe.{field}" in caplog.text


def test_a_choice_is_taken_where_memory_is_the_same():
    same = {"load_balance_rate": 0.5, "data_shuffle": False}
    assert job_fields(job_config(save_percent="auto")) == job_fields(job_config(save_percent="auto", **same))


@pytest.mark.parametrize(
    "section, field, value, matters",
    [
        ("model", "flavor", "1b", True),
        ("training", "seq_len", 77, True),
        ("training", "steps", 77, False),
        ("parallelism", "expert_parallel_degree", 2, True),
        ("activation_checkpoint", "mode", "full", True),
        ("compile", "enable", True, True),
        ("optimizer", "implementation", "for-loop", True),
        ("optimizer", "lr", 0.5, False),
    ],
)
def test_a_choice_goes_by_the_sections_on_which_memory_depends(section, field, value, matters):
    config, other = job_config(save_percent="auto"), job_config(save_percent="auto")
    assert getattr(getattr(config, section), field) != value
    setattr(getattr(other, section), field, value)
    fields, others = job_fields(config), job_fields(other)
    assert fields.keys() == others.keys()
    assert [name for name in fields if fields[name] != others[name]] == [f"{section}.{field}"] * matters


@pytest.mark.parametrize(
    "choice, words",
    [
        ([], "no MoE layer"),
        ([37.5], "37.5"),
        ([50, 50], "50"),
        ([0, 37.5, 75], "38 on average, by layer 0 37.5 75"),
    ],
)
def test_a_choice_in_words(choice, words):
    assert describe(choice) == words


@pytest.mark.parametrize("content", ["{", "[]", '{"save_percent": [1, 1]}', None])
def test_a_stored_choice_that_is_of_no_use_is_not_taken(tmp_path, content):
    first = start(tmp_path, 11_500)
    stored = json.loads(first.file.read_text())
    if content is None:  # of another job
        stored["save_percent"], stored["job"] = [1, 1], {"training.local_batch_size": 4}
        content = json.dumps(stored)
    first.file.write_text(content)
    assert start(tmp_path, 11_500).choice == first.choice


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_file(tmp_path, caplog):
    (tmp_path / "run").write_text("a file in the way")
    assert start(tmp_path, 100_000).choice == [100, 100]


def test_the_optimizer_calls_it(tmp_path):
    model = build(tiny_args())
    layers = [moe.experts for moe in moes(model)]
    model.auto_save_percent = AutoSavePercent(
        layers, plan(), 30.0, Memory(layers, total_mib=40_000), tmp_path / "f.json", JOB
    )
    model.auto_save_percent.choice = [0, 0]
    model.auto_save_percent._apply()
    train(model, steps=MEASURED_STEPS)
    assert model.auto_save_percent.steps_left == 0
    assert [layer.save_percent for layer in layers] == [100, 100]
    assert optimizers_for(build(tiny_args())) is not None  # a model without


def test_without_a_gpu_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = MomoeLlamaArgs()
    config = job_config(save_percent="auto")
    model = build(tiny_args(save_percent=[50.0]))
    args.update_from_config(config)
    assert args.save_percent == [0.0]
    set_up_auto_save_percent(model, config)
    assert not hasattr(model, "auto_save_percent")


@pytest.mark.parametrize(
    "said, status, reason",
    [
        ("a warning\nmomoe_titan.plan: error: a.field is 1:\n  no good\n", 2, "a.field is 1: no good"),
        (
            "Traceback\n  a line\nRuntimeError: no data\nmomoe_titan.plan: error: RuntimeError: no data\n",
            1,
            "RuntimeError: no data",
        ),
        ("one\ntwo\n", 1, "two"),
        ("", -9, "the plan's process ended with exit status -9"),
    ],
)
def test_why_there_is_no_plan_is_said_in_a_line(said, status, reason, monkeypatch, caplog):
    def child(command, stderr, **kwargs):
        stderr.write(said)
        return subprocess.CompletedProcess(command, status, "")

    monkeypatch.setattr(subprocess, "run", child)
    assert plan_in_child(job_config(save_percent="auto")) is None
    assert caplog.messages[-1] == f"save_percent = auto: 0, since the memory could not be planned: {reason}"


@pytest.mark.slow
def test_what_the_plan_refuses_is_named(caplog, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", commands.Popen)
    config = job_config(save_percent="auto")
    config.training.enable_cpu_offload = True
    assert plan_in_child(config) is None
    assert (
        "could not be planned: training.enable_cpu_offload is True: what is kept on the host is not planned"
        in caplog.text
    )


@pytest.mark.gpu
def test_a_shipped_job_is_planned_beside_its_gpu():
    """By the torch of a machine with a GPU, which may have other fake versions of its ops than a CPU's."""
    options = ["--job.config_file=train_configs/500m.toml", "--momoe.save_percent=auto"]
    plan = plan_in_child(ConfigManager().parse_args(options))
    assert plan is not None and 5 * GIB < MemoryPlan.from_dict(plan).active(0) < 60 * GIB


def test_what_auto_cannot_do_is_refused():
    config = job_config(save_percent="auto")
    config.parallelism.pipeline_parallel_degree = 2
    with pytest.raises(ValueError, match="momoe.save_percent is 'auto', which knows no pipeline stages"):
        MomoeLlamaArgs().update_from_config(config)
    for budget, wanted in [
        *((budget, "above 0") for budget in (0, -1.0, float("inf"), float("nan"))),
        *((budget, "of type float") for budget in (True, "0.5")),
    ]:
        with pytest.raises(ValueError, match=f"momoe.memory_budget is {budget!r}, must be {wanted}"):
            Momoe(memory_budget=budget)
    assert Momoe(save_percent="auto").save_percent == "auto"
    with pytest.raises(ValueError, match="momoe.save_percent"):
        Momoe(save_percent="most")


def _rank(folder: Path) -> None:
    rank = dist.get_rank()
    # rank 1 has less room at the start, and takes more than planned
    own = folder / f"rank{rank}"
    auto = start(own, 11_500, total_mib=20_000, more=(0, 700)[rank])
    auto.memory.total_mib = 20_000
    choices = [list(auto.choice), steps(auto, MEASURED_STEPS)]
    resumed = start(own, 11_500, more=(-9_000, 0)[rank])
    choices.append(list(resumed.choice))
    (folder / f"out{rank}.json").write_text(json.dumps([choices, own.exists()]))


def test_two_ranks_choose_alike(tmp_path):
    assert in_gloo_forks(2, tmp_path / "store", partial(_rank, tmp_path))
    (first, wrote), (second, other_wrote) = (json.loads((tmp_path / f"out{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[1] == first[2]  # as corrected
    # the room that the rank with the least has: 11500 MiB, of which NCCL is assumed to take 1024 at first
    assert first[1] == [0, 80]
    assert wrote and not other_wrote
