"""Bias and counts through TorchTitan's own checkpointing."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import JobConfig

from momoe_titan.model import parallelize_momoe_llama
from tests.model.tiny import (
    batch,
    build,
    job_config,
    loss_of,
    moes,
    ONE_PROCESS,
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
    return config


class Job:
    """Model, optimizer and checkpointer, built in the trainer's order."""

    def __init__(self, config, args=None, seed=0):
        def parallelize(model):
            return parallelize_momoe_llama(model, ONE_PROCESS, config)

        self.model = build(args or tiny_args(), seed, parallelize)
        self.optimizers = optimizers_for(self.model)
        self.state = Step()
        self.checkpointer = CheckpointManager(
            dataloader=SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None),
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=build_lr_schedulers(self.optimizers, config.lr_scheduler, 100),
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
