"""Bias and counts in checkpoints; which checkpoint is loaded and which are kept."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torchtitan.components import checkpoint as titan
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import ConfigManager, JobConfig

from momoe_titan.components.checkpoint import (
    CheckpointError,
    CheckpointManager,
    _what_failed,
    resumed_checkpoint,
    saved_steps,
)
from momoe_titan.components.resumed_settings import keep_balance_rule, save_job
from momoe_titan.config.command_line import SECTION_OPTION
from momoe_titan.register import prepare_and_parallelize
from tests.support.tiny import (
    ONE_PROCESS,
    batch,
    build,
    job_config,
    loss_of,
    moes,
    optimizers_for,
    tiny_args,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class Step:
    """The trainer's own state, as far as the checkpoint knows it."""

    def __init__(self):
        self.step = 0

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def config_for(folder) -> JobConfig:
    config = job_config()
    config.job.dump_folder = str(folder)
    config.checkpoint.enable = True
    config.checkpoint.interval = 1
    config.training.steps = 100
    return config


class Job:
    """Model, optimizer and checkpointer, built in the trainer's order."""

    def __init__(self, config, args=None, seed=0, optimizer=None):
        def parallelize(model):
            return prepare_and_parallelize(model, ONE_PROCESS, config)

        self.model = build(args or tiny_args(), seed, parallelize)
        self.optimizers = optimizers_for(self.model, **(optimizer or {}))
        self.schedulers = build_lr_schedulers(self.optimizers, config.lr_scheduler, config.training.steps)
        self.state = Step()
        self.checkpointer = CheckpointManager(
            dataloader=SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None),
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.state},
            checkpoint_config=config.checkpoint,
            sd_adapter=None,
            base_folder=config.job.dump_folder,
        )

    def train(self, steps):
        losses = []
        for _ in range(steps):
            self.state.step += 1
            loss = loss_of(self.model, *batch(self.state.step))
            loss.backward()
            losses.append(loss.detach())
            self.optimizers.step()
            self.optimizers.zero_grad()
        return torch.stack(losses)

    def balance(self):
        return torch.stack([torch.stack([m.expert_bias, m.tokens_per_expert]) for m in moes(self.model)])


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    # what the checkpointer asks of torch.distributed when it purges old checkpoints
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *group: 0)


@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, backend):
    args = tiny_args(backend=backend)
    straight = Job(config_for(tmp_path / "straight"), args)
    want = straight.train(5)

    config = config_for(tmp_path / "resumed")
    first = Job(config, args)
    first.train(3)
    # as if saved in the middle of a step's microbatches
    first.model(batch(9)[0])
    saved = first.balance()
    first.checkpointer.save(3)
    assert saved[:, 0].any() and saved[:, 1].any()

    second = Job(config, args, seed=1)
    assert second.checkpointer.load()
    assert torch.equal(second.balance(), saved)
    for moe in moes(second.model):
        moe.tokens_per_expert.zero_()
    assert second.state.step == 3
    assert torch.equal(second.train(2), want[3:])
    assert torch.equal(second.balance(), straight.balance())


def save_without(names, config):
    job = Job(config)
    job.train(1)
    for moe in moes(job.model):
        moe._non_persistent_buffers_set.update(names)
    states = job.checkpointer.states["model"]
    states.cache_state_dict = states._get_state_dict()
    assert not any(key.endswith(tuple(names)) for key in states.state_dict())
    job.checkpointer.save(1)
    return job


@pytest.mark.parametrize("names", [["expert_bias"], ["expert_bias", "tokens_per_expert"]])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_checkpoint_without_bias(tmp_path, names, initial, mode, caplog):
    config = config_for(tmp_path)
    old = save_without(names, config)
    if initial:
        config.checkpoint.initial_load_path = str(tmp_path / "checkpoint" / "step-1")
        config.job.dump_folder = str(tmp_path / "new")
    config.activation_checkpoint.mode = mode
    job = Job(config, seed=1)
    for moe in moes(job.model):
        moe.expert_bias.fill_(1)
    assert job.checkpointer.load()
    assert not job.balance().any()
    for layer_id in (1, 2):
        assert f"layers.{layer_id}." in caplog.text and "STARTS AT ZERO" in caplog.text
    weights = dict(job.model.named_parameters())
    for name, weight in old.model.named_parameters():
        assert torch.equal(weights[name] if mode == "none" else _wrapped(weights, name), weight)

    # and from there on like any other
    job.train(1)
    job.checkpointer.save(2)
    again = Job(config, seed=2)
    assert again.checkpointer.load()
    assert torch.equal(again.balance(), job.balance()) and job.balance()[:, 0].any()


def _wrapped(weights, name):
    layers, layer_id, rest = name.split(".", 2) if name.startswith("layers") else (name, "", "")
    return weights[f"{layers}.{layer_id}._checkpoint_wrapped_module.{rest}" if rest else name]


def test_another_missing_key_is_still_an_error(tmp_path):
    config = config_for(tmp_path)
    save_without(["expert_bias"], config)
    job = Job(config, tiny_args(moe={"gate_bias": True}))
    with pytest.raises(CheckpointException, match="Missing key.*gate.bias"):
        job.checkpointer.load()


def test_no_checkpoint_no_warning(tmp_path, caplog):
    job = Job(config_for(tmp_path))
    assert not job.checkpointer.load()
    assert "expert_bias" not in caplog.text
    assert "layers.1.moe.expert_bias" in job.model.state_dict()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path, at):
    """One bit of the byte at this place, counted from the end where it is negative."""
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def flip_in(folder, name):
    """One bit within the tensor or object of this name."""
    stored = FileSystemReader(folder).read_metadata().storage_data
    where = next(info for index, info in stored.items() if index.fqn == name)
    flip(folder / where.relative_path, where.offset + where.length // 2)


DAMAGES = {
    "bytes of train_state.step": lambda folder: flip_in(folder, "train_state.step"),
    "bytes of layers.1.moe.experts.w2": lambda folder: flip_in(folder, "layers.1.moe.experts.w2"),
    "metadata.sha256": lambda folder: flip(folder / ".metadata", -9),
    "no .metadata": lambda folder: (folder / ".metadata").unlink(),
    "cannot be read": lambda folder: ((folder / "metadata.sha256").unlink(), truncate(folder / ".metadata")),
    "is missing": lambda folder: (folder / "__0_0.distcp").unlink(),
    "bytes": lambda folder: truncate(folder / "__0_0.distcp"),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_damaged_checkpoints_are_passed_over(tmp_path, fault, caplog):
    config = config_for(tmp_path)
    job = Job(config)
    for step in (9, 10, 11):
        job.state.step = step
        job.checkpointer.save(step)
    for step in (10, 11):
        DAMAGES[fault](tmp_path / "checkpoint" / f"step-{step}")
    (tmp_path / "checkpoint" / "step-12-copy").mkdir()
    again = Job(config, seed=1)
    assert again.checkpointer.load()
    assert again.state.step == 9
    for step in (10, 11):
        assert f"step-{step}: it" in caplog.text
    assert caplog.text.count(fault) == 2
    with pytest.raises(CheckpointError, match=r"checkpoint\.load_step: .*step-11.*" + fault):
        again.checkpointer.load(11)


def test_the_newest_of_whole_checkpoints_is_loaded(tmp_path):
    config = config_for(tmp_path)
    job = Job(config)
    for step in (2, 10, 9):  # neither the last written nor the last by name
        job.state.step = step
        job.checkpointer.save(step)
    again = Job(config)
    assert again.checkpointer.load() and again.state.step == 10
    # TorchTitan's own, whose sum nobody has written, counts like ours
    (tmp_path / "checkpoint" / "step-10" / "metadata.sha256").unlink()
    assert again.checkpointer.load() and again.state.step == 10


def test_what_comes_before_a_save_comes_before_each_that_is_due(tmp_path):
    checkpointer, seen = Job(config_for(tmp_path)).checkpointer, []
    checkpointer.before_save = lambda: seen.append(saved_steps(checkpointer.folder))
    checkpointer.interval = 2
    for step in (2, 3, 4):
        checkpointer.save(step)
    assert [sorted(steps) for steps in seen] == [[], [2]]


def test_a_save_that_failed_names_what_the_system_said(tmp_path):
    """Of one rank, in what torch collects, or of this process, and not what that led to."""
    full = OSError(28, "No space left on device")
    of_rank = CheckpointException("write", {1: (full, SimpleNamespace())})
    for cause in (full, of_rank):
        error = RuntimeError("the save did not end")
        error.__cause__ = cause
        said = _what_failed(str(tmp_path), error)
        assert f"written to '{tmp_path}': OSError: [Errno 28] No space left on device (" in said
        assert said.endswith("On the disk: there is no whole checkpoint")


def test_without_a_complete_checkpoint_the_run_is_new(tmp_path, caplog):
    config = config_for(tmp_path)
    Job(config).checkpointer.save(1)
    DAMAGES["no .metadata"](tmp_path / "checkpoint" / "step-1")
    assert not Job(config).checkpointer.load()
    assert "step-1: it was not written to its end" in caplog.text


def test_a_run_killed_in_its_first_save_starts_from_the_initial_checkpoint_again(tmp_path):
    config = config_for(tmp_path)
    old = Job(config)
    old.train(1)
    old.checkpointer.save(1)
    config.checkpoint.initial_load_path = str(tmp_path / "checkpoint" / "step-1")
    config.job.dump_folder = str(tmp_path / "new")
    (tmp_path / "new" / "checkpoint" / "step-1").mkdir(parents=True)
    job = Job(config, seed=1)
    assert job.checkpointer.load()
    weights = dict(job.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in old.model.named_parameters())
    assert job.checkpointer.folder == str(tmp_path / "new" / "checkpoint")


def test_incomplete_initial_checkpoint(tmp_path):
    config = config_for(tmp_path)
    Job(config).checkpointer.save(1)
    config.checkpoint.initial_load_path = str(tmp_path / "checkpoint" / "step-1")
    config.job.dump_folder = str(tmp_path / "new")
    DAMAGES["bytes"](tmp_path / "checkpoint" / "step-1")
    with pytest.raises(CheckpointError, match=r"checkpoint\.initial_load_path: .* bytes"):
        Job(config).checkpointer.load()


def test_a_step_without_a_checkpoint_is_an_error(tmp_path):
    config = config_for(tmp_path)
    Job(config).checkpointer.save(1)
    with pytest.raises(CheckpointError, match=r"checkpoint\.load_step: .*step-2.* no such folder"):
        Job(config).checkpointer.load(2)
    config.checkpoint.initial_load_path = str(tmp_path / "checkpoint" / "step-1")
    config.job.dump_folder = str(tmp_path / "mistyped")
    with pytest.raises(CheckpointError, match=r"checkpoint\.load_step is 2, but .*dump_folder.*mistyped"):
        Job(config).checkpointer.load(2)


def test_an_export_from_which_more_is_to_be_loaded(tmp_path):
    config = config_for(tmp_path)
    job = Job(config)
    job.checkpointer.save(0, last_step=True)
    job.checkpointer.save(1, last_step=True)
    with pytest.raises(CheckpointError, match=r"load_step: .*step-1.* only weights .*; load_step -1"):
        job.checkpointer.load(1)
    assert job.checkpointer.load(0)  # of a seed no more than that
    config.checkpoint.exclude_from_loading = ["train_state", "optimizer"]  # leaves two
    with pytest.raises(CheckpointError, match=r"load_step: .*step-1.* only weights"):
        Job(config).checkpointer.load(1)
    config.checkpoint.exclude_from_loading += ["lr_scheduler", "dataloader"]
    assert Job(config).checkpointer.load(1)

    config.checkpoint.exclude_from_loading = []
    config.job.dump_folder = str(tmp_path / "new")
    for step in (0, 1):
        config.checkpoint.initial_load_path = str(tmp_path / "checkpoint" / f"step-{step}")
        config.checkpoint.initial_load_model_only = False
        with pytest.raises(CheckpointError, match=r"initial_load_path: .* set .*initial_load_model_only"):
            Job(config).checkpointer.load()
        config.checkpoint.initial_load_model_only = True
        assert Job(config).checkpointer.load()


def test_purge_keeps_the_latest_complete_checkpoints(tmp_path):
    config = config_for(tmp_path)
    config.checkpoint.keep_latest_k = 2
    folder = tmp_path / "checkpoint"
    job = Job(config)
    for step in (1, 2, 4, 5, 7):
        (folder / f"step-{step}").mkdir(parents=True)  # of runs that were killed
    for step in (3, 6):
        job.checkpointer.save(step)
    job.checkpointer.save(8)
    job.checkpointer.close()
    # two complete ones behind it, and nothing older
    assert sorted(path.name for path in folder.iterdir()) == ["step-6", "step-7", "step-8"]


def test_purge_keeps_what_training_can_resume_from(tmp_path):
    """An export is no checkpoint to resume from, however new."""
    config = config_for(tmp_path)
    config.checkpoint.keep_latest_k = 2
    job = Job(config)
    for step in (1, 2, 3, 4):
        job.checkpointer.save(step, last_step=step > 2)
    job.checkpointer._purge_stale_checkpoints()
    job.checkpointer.close()
    assert len(list((tmp_path / "checkpoint").iterdir())) == 4
    assert Job(config, seed=1).checkpointer.load()


@pytest.mark.parametrize("backends", [("torch", "torchtitan"), ("torchtitan", "torch")])
def test_checkpoint_of_the_other_backend(tmp_path, backends):
    config = config_for(tmp_path)
    Job(config, tiny_args(backend=backends[0])).checkpointer.save(1)
    with pytest.raises(CheckpointError, match="momoe.backend must (not )?be 'torchtitan'"):
        Job(config, tiny_args(backend=backends[1]))


def test_a_save_under_way_does_not_see_the_next_forward(tmp_path, monkeypatch):
    """TorchTitan stages a save through pinned memory until the next optimizer step, in a thread of its own."""
    job = Job(config_for(tmp_path))
    job.train(1)
    staged = {}
    monkeypatch.setattr(
        titan.CheckpointManager, "dcp_save", lambda self, states, *args, **kwargs: staged.update(states)
    )
    job.checkpointer.save(1)
    moe = moes(job.model)[0]
    counts = next(value for key, value in staged.items() if key.endswith("moe.tokens_per_expert"))
    loss_of(job.model, *batch(2))
    assert moe.tokens_per_expert.any() and not counts.any()


@pytest.fixture
def saved_after_3(tmp_path):
    """A folder with a checkpoint of step 3, in the middle of the warm-up."""
    job, _ = job_with(tmp_path, lr=1e-2, weight_decay=0.1)
    job.train(3)
    for _ in range(3):
        job.schedulers.step()
    job.checkpointer.save(3)
    return tmp_path


def job_with(folder, steps=100, warmup=8, **optimizer):
    config = config_for(folder)
    config.training.steps, config.lr_scheduler.warmup_steps = steps, warmup
    config.optimizer.implementation = "for-loop"
    for name, value in optimizer.items():
        setattr(config.optimizer, name, value)
    job = Job(config, optimizer=optimizer)
    job.state.job_config = config
    return job, config


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("implementation", ["for-loop", "fused"])
def test_settings_of_the_resumed_job_hold(saved_after_3, name, implementation, caplog):
    other = dict(lr=2e-3, weight_decay=0.0, beta1=0.5, beta2=0.75, eps=1e-6, name=name, implementation=implementation)
    job, _ = job_with(saved_after_3, steps=50, warmup=4, **other)
    assert job.checkpointer.load()
    (optimizer,) = job.optimizers
    for group in optimizer.param_groups:
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.5, 0.75), 0.0, 1e-6)
        assert group["fused"] == (implementation == "fused")
        assert group["decoupled_weight_decay"] == (name == "AdamW")
        assert group["initial_lr"] == 2e-3 and group["lr"] == 2e-3 * 4 / 4
    (scheduler,) = job.schedulers
    assert scheduler.get_last_lr() == [2e-3]  # step 3 of a warm-up of 4
    assert job.optimizers.state_dict()["state.output.weight.step"] == 3
    job.train(1)
    job.schedulers.step()
    assert scheduler.get_last_lr() == [pytest.approx(2e-3)]
    lines = [line.strip() for line in caplog.text.splitlines() if "; holds: " in line]
    assert "optimizer.lr: 0.01 -> 0.002; holds: the job's, on the checkpoint's moments" in lines
    assert "lr_scheduler.warmup_steps: 8 -> 4; holds: the job's: the rate is that of its schedule at this step" in lines
    assert "training.steps: 100 -> 50; holds: the job's: the rate is that of its schedule at this step" in lines
    assert {line.partition(":")[0] for line in lines} >= {f"optimizer.{name}" for name in other if name != "name"} - {
        "optimizer.implementation" if implementation == "for-loop" else ""
    }
    assert caplog.text.count("Settings that are not those of the checkpoint") == 1


def test_nothing_is_listed_where_nothing_has_changed(saved_after_3, caplog):
    job, _ = job_with(saved_after_3, lr=1e-2, weight_decay=0.1)
    assert job.checkpointer.load()
    assert "Settings that are not those" not in caplog.text and "holds" not in caplog.text
    (group,) = next(iter(job.optimizers)).param_groups
    assert group["lr"] == 1e-2 * 4 / 8


def test_a_checkpoint_without_its_configuration_loads_with_one_line(saved_after_3, caplog):
    (saved_after_3 / "checkpoint/step-3/job_config.json").unlink()
    job, _ = job_with(saved_after_3, lr=3e-3)
    assert job.checkpointer.load()
    assert caplog.text.count("has no readable job_config.json, so that what has changed since cannot be listed") == 1
    (group,) = next(iter(job.optimizers)).param_groups
    assert group["lr"] == 3e-3 * 4 / 8


def test_weights_alone_bring_no_settings(saved_after_3, tmp_path_factory, caplog):
    folder = tmp_path_factory.mktemp("new")
    job, config = job_with(folder, lr=3e-3)
    job.checkpointer.initial_load_path = str(saved_after_3 / "checkpoint/step-3")
    assert job.checkpointer.load()
    assert job.state.step == 0 and "Settings that are not those" not in caplog.text
    assert resumed_checkpoint(config) is None
    config.checkpoint.initial_load_path = job.checkpointer.initial_load_path
    assert resumed_checkpoint(config) is None
    config.checkpoint.initial_load_model_only = False
    assert resumed_checkpoint(config) == config.checkpoint.initial_load_path


@pytest.mark.parametrize("given", [False, True])
def test_a_resumed_job_keeps_the_balancing_rule(tmp_path, given, caplog):
    config = ConfigManager().parse_args([SECTION_OPTION, "--momoe.load_balance_rule=quantile"])
    save_job(str(tmp_path), config)
    config = ConfigManager().parse_args([SECTION_OPTION, "--momoe.load_balance_rule=sign"])
    keep_balance_rule(config, ["--momoe.load_balance_rule=sign"] if given else [], str(tmp_path))
    assert config.momoe.load_balance_rule == ("sign" if given else "quantile")
    said = "is 'sign' from here on; the checkpoint" if given else "stays 'quantile', as in the checkpoint"
    assert caplog.text.count("momoe.load_balance_rule " + said) == 1
    keep_balance_rule(config, [], None)
    assert caplog.text.count("load_balance_rule") == 1


def test_a_checkpoint_without_its_configuration_was_balanced_by_the_old_default(tmp_path, caplog):
    config = ConfigManager().parse_args([SECTION_OPTION, "--momoe.load_balance_rule=quantile"])
    keep_balance_rule(config, [], str(tmp_path))
    assert config.momoe.load_balance_rule == "sign"
    assert caplog.text.count("momoe.load_balance_rule stays 'sign', as in the checkpoint") == 1
