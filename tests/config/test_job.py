"""A job is checked once: what was checked before is neither checked nor logged again, unless something has changed."""

import tomllib
from pathlib import Path

import pytest
from torchtitan.tools.logging import logger

from momoe_titan.config.checks.job import check_job
from momoe_titan.config.flavor import configured_args
from momoe_titan.config.machine import Machine, checking_for
from momoe_titan.config.section import Momoe
from momoe_titan.model import flavors
from tests.support.tiny import job_config


@pytest.fixture
def job():
    config = job_config(backend="torchtitan", save_percent=[50.0])
    config.experimental.custom_import = "momoe_titan.register"
    config.model.name, config.model.flavor = "momoe_llama", "debugmodel"
    return config


@pytest.fixture
def logged(caplog, monkeypatch):
    """How often a text has been logged."""
    monkeypatch.setattr(logger, "propagate", True)
    return lambda text: caplog.text.count(text)


def test_the_trainer_s_call_logs_nothing_again(job, logged):
    job.training.seq_len = 200_000
    args = check_job(job)
    # as TorchTitan's trainer does, and what completes the last checkpoint
    trained = flavors["debugmodel"]
    trained.update_from_config(job)
    assert logged("not started by momoe_titan.train") == 0
    assert trained == args == configured_args(job)
    assert logged("momoe.save_percent has no effect") == 1
    assert logged("training.seq_len is 200000, longer than the model's own maximum, 131072") == 1


def test_the_trainer_s_call_checks_a_job_that_nobody_has_checked(job, logged):
    job.training.steps = 0
    with pytest.raises(ValueError, match="training.steps is 0"):
        flavors["debugmodel"].update_from_config(job)
    job.training.steps = 1
    flavors["debugmodel"].update_from_config(job)
    assert logged("not started by momoe_titan.train, which takes the same options. It lacks: checks of folders") == 2
    assert logged("momoe.save_percent has no effect") == 1


def test_what_has_changed_is_checked_again(job, logged):
    check_job(job)
    job.training.global_batch_size = 3
    job.parallelism.data_parallel_shard_degree = 1
    with pytest.raises(ValueError, match="global_batch_size is 3"):
        flavors["debugmodel"].update_from_config(job)
    job.training.global_batch_size = -1
    job.momoe.load_balance_off_layers = [0]
    with pytest.raises(ValueError, match="load_balance_off_layers names"):
        flavors["debugmodel"].update_from_config(job)


def test_another_model_or_machine_is_checked_again(job):
    check_job(job)
    other = flavors["debugmodel"]
    other.moe_args.top_k = 9
    with pytest.raises(ValueError, match="top_k is 9"):
        other.update_from_config(job)
    job.parallelism.tensor_parallel_degree = 2
    with checking_for(Machine(4, has_gpu=True)):
        check_job(job)
    with checking_for(Machine(5, has_gpu=True)), pytest.raises(ValueError, match="number of processes, 5"):
        flavors["debugmodel"].update_from_config(job)


def test_triton_kernels_need_a_gpu(job, monkeypatch):
    job.momoe.backend = "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_job(job)  # in Triton's interpreter
    monkeypatch.delenv("TRITON_INTERPRET")
    with (
        checking_for(Machine(1, has_gpu=False)),
        pytest.raises(ValueError, match="momoe.backend is 'triton', but this"),
    ):
        check_job(job)
    with checking_for(Machine(1, has_gpu=True)):
        check_job(job)


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
@pytest.mark.parametrize("shard, world, warns", [(1, 2, 1), (-1, 2, 1), (-1, 4, 0), (1, None, 1), (-1, None, 0)])
def test_float32_in_place_of_mixed_precision_is_loud(job, logged, kind, shard, world, warns):
    """Where autocast is asked for; by default these jobs mix precision as FSDP does."""
    setattr(job.parallelism, f"{kind}_parallel_degree", 2)
    job.parallelism.data_parallel_shard_degree = shard
    with checking_for(Machine(world, has_gpu=True)):
        check_job(job)
        assert not logged("HAS NO EFFECT")
        job.momoe.mixed_precision = "autocast"
        check_job(job)
        assert logged("training.mixed_precision_param = 'bfloat16' HAS NO EFFECT: the job computes in float32") == warns
        job.training.mixed_precision_param = "float32"
        check_job(job)
    assert logged("HAS NO EFFECT") == warns


def test_one_expert_with_a_normalised_score_is_refused(job):
    args = flavors["debugmodel"]
    args.moe_args.top_k = 1
    with pytest.raises(ValueError, match="moe_args.route_norm is True, must be False where moe_args.top_k is 1"):
        args.update_from_config(job)
    args.moe_args.route_norm = False
    args.update_from_config(job)


@pytest.mark.parametrize("flavor", ["30B", "mixtral-8x7b"])
def test_a_bias_that_the_hugging_face_format_cannot_hold_is_opt_in_and_warned_of(job, logged, flavor):
    assert flavors[flavor].load_balance_rate == 0 < flavors[flavor].aux_loss_weight
    job.model.flavor, job.momoe.load_balance_rule = flavor, "quantile"
    check_job(job)
    assert logged("momoe.load_balance_rule 'quantile' moves a bias of each expert") == 1
    job.momoe.load_balance_rate = 0.0
    check_job(job)
    assert logged("moves a bias of each expert") == 1


def test_shipped_jobs_balance_as_their_flavors_do():
    files = sorted((Path(__file__).parents[2] / "train_configs").glob("*.toml"))
    assert files
    for file in files:
        job = tomllib.loads(file.read_text())
        section, flavor = job["momoe"], job["model"]["flavor"]
        if flavor == "hf":  # balances as the folder's format lets it
            assert (section["load_balance_rate"], section["aux_loss_weight"]) == (0, 0.001)
            continue
        for name in ("load_balance_rate", "load_balance_rule", "load_balance_average", "aux_loss_weight"):
            assert section.get(name, getattr(Momoe, name)) == getattr(flavors[flavor], name), (file, name)


def test_the_module_that_a_job_names_is_imported(job):
    job.experimental.custom_import = "no.such.module"
    with pytest.raises(ValueError, match=r"experimental.custom_import 'no.such.module': No module named 'no'"):
        check_job(job)
