"""The bias of the rule "quantile" is averaged over more steps as the learning rate falls."""

import pytest
from torchtitan.config import LRScheduler as LRSchedulerConfig

from momoe_titan.components.lr_schedule import build_momoe_lr_schedulers
from momoe_titan.register import get_train_spec
from tests.support.tiny import build, optimizers_for, tiny_args

SCHEDULE = LRSchedulerConfig(warmup_steps=3, decay_ratio=0.5, decay_type="linear", min_lr_factor=0.1)


def scheduled():
    optimizers = optimizers_for(build(tiny_args(load_balance_rule="quantile")), lr=1.0)
    return optimizers, build_momoe_lr_schedulers(optimizers, SCHEDULE, 10)


def test_the_share_of_a_step_falls_with_the_learning_rate_but_not_in_the_warm_up():
    optimizers, schedules = scheduled()
    shares, rates = [], []
    for _ in range(10):
        shares.append(optimizers.load_balancer.average_factor())
        rates.append(schedules.schedulers[0].get_last_lr()[0])
        for optimizer in optimizers:
            optimizer.step()
        schedules.step()
    assert rates[0] < rates[1] < 1 and shares[:3] == [1.0, 1.0, 1.0]
    assert shares[3:] == pytest.approx(rates[3:]) and 0 < shares[-1] < 0.3


def test_a_resumed_job_goes_on_where_the_schedule_was():
    _, schedules = scheduled()
    schedules.schedulers[0].last_epoch = 8
    optimizers, fresh = scheduled()
    assert optimizers.load_balancer.average_factor() == 1.0
    fresh.load_state_dict(schedules.state_dict())
    assert 0 < optimizers.load_balancer.average_factor() < 0.6


def test_the_trainer_builds_it():
    assert get_train_spec().build_lr_schedulers_fn is build_momoe_lr_schedulers
