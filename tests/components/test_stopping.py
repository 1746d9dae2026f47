"""How a signal ends a run: on all ranks, after the step in which one of them got it."""

import contextlib
import os
import signal
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torchtitan.train as titan

from momoe_titan.components.stopping import StopRequest
from momoe_titan.components.trainer import Trainer
from tests.support.forks import in_gloo_forks


def test_a_signal_in_a_microbatch_stops_all_ranks_after_the_step(tmp_path):
    """Whatever the model: nothing of it, nor of its optimizer, takes part."""
    assert in_gloo_forks(2, tmp_path / "store", _stop_in_a_microbatch)


def _stop_in_a_microbatch() -> None:
    done, saved = [], []
    with StopRequest() as stop:
        stop.in_training = True
        trainer = SimpleNamespace(
            run=SimpleNamespace(stop=stop, has_trained=False, stopped_by=0),
            job_config=SimpleNamespace(training=SimpleNamespace(steps=5)),
            checkpointer=SimpleNamespace(save_now=saved.append),
            finish_log=lambda: None,
            step=0,
        )
        while Trainer.should_continue_training(trainer):
            trainer.step += 1
            for microbatch in range(3):
                if (trainer.step, microbatch, dist.get_rank()) == (2, 1, 1):
                    os.kill(os.getpid(), signal.SIGTERM)
                done.append((trainer.step, microbatch))
    assert done[-1] == (2, 2) and saved == [2] and trainer.run.stopped_by == signal.SIGTERM


def test_the_last_step_is_logged_before_anything_else_takes_time():
    """A checkpoint after a signal, and TorchTitan's sleep after the last step."""
    for steps, signum, expected in ((1, 0, ["log"]), (5, signal.SIGINT, ["log", "save"])):
        done = []
        trainer = SimpleNamespace(
            run=SimpleNamespace(stop=SimpleNamespace(agree=lambda signum=signum: signum), has_trained=True),
            job_config=SimpleNamespace(training=SimpleNamespace(steps=steps)),
            checkpointer=SimpleNamespace(save_now=lambda step, done=done: done.append("save")),
            finish_log=lambda done=done: done.append("log"),
            step=1,
        )
        assert not Trainer.should_continue_training(trainer) and done == expected


@pytest.mark.parametrize(
    "ranks, fails, logged",
    [(1, False, 1), (2, False, 1), (1, True, 1), (2, True, 0)],  # the wait for the others might not end
)
def test_what_a_gpu_has_not_logged_yet_is_logged_where_training_ends(monkeypatch, ranks, fails, logged):
    done = []

    def train(self):
        if fails:
            raise RuntimeError("broken")

    monkeypatch.setattr(titan.Trainer, "train", train)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    trainer = object.__new__(Trainer)
    trainer.run = SimpleNamespace(stop=SimpleNamespace(), stopped_by=0, has_trained=False)
    trainer.metrics_processor = SimpleNamespace(finish_log=lambda: done.append("log"))
    with pytest.raises(RuntimeError, match="broken") if fails else contextlib.nullcontext():
        trainer.train()
    assert len(done) == logged


def test_the_highest_signal_of_any_rank_is_heard(tmp_path):
    assert in_gloo_forks(2, tmp_path / "store", _hear_the_highest)


def _hear_the_highest() -> None:
    with StopRequest() as stop:
        stop.in_training = True
        assert stop.agree() == 0
        os.kill(os.getpid(), (signal.SIGINT, signal.SIGTERM)[dist.get_rank()])
        assert stop.noted == (signal.SIGINT, signal.SIGTERM)[dist.get_rank()]
        assert stop.agree() == signal.SIGTERM
