"""Balance over ranks of experts, and layers that stay collapsed."""

import numpy as np
import pytest

from momoe_titan.components.balance import CollapseWatch, maxvio, worst_rank_load
from momoe_titan.components.metrics import balance_advice
from tests.support.tiny import tiny_args


def test_maxvio_is_relative_to_the_mean_and_zero_without_tokens():
    counts = np.array([[8.0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    assert maxvio(counts).tolist() == [3, 0, 0]


@pytest.mark.parametrize("ranks, expected", [(2, 1.6), (3, 1.8)])
def test_load_of_the_worst_rank(ranks, expected):
    """Five experts: two ranks hold 3 and 2 of them, three ranks 2, 2 and 1. Of two layers the worse counts."""
    counts = np.array([[2, 2, 2, 2, 2], [3, 3, 2, 1, 1]]).astype(float)
    assert worst_rank_load(counts, ranks) == pytest.approx(expected)
    assert worst_rank_load(0 * counts, ranks) == 0


def test_collapsed_layers_are_told_once_and_again_after_they_recovered():
    watch = CollapseWatch(8, 2, "do this")
    told = {}
    for step in range(5, 400, 5):
        collapsed = 3.0 if step < 100 or step >= 200 else 0.5
        line = watch.look(step, [1, 4], np.array([collapsed, 0.1]))
        if line:
            told[step] = line
    assert sorted(told) == [55, 250]
    assert "COLLAPSED for 50 steps" in told[55] and "1 (3.00)" in told[55] and "4 (" not in told[55]
    assert told[55].endswith("do this")


def test_a_layer_that_is_unbalanced_only_now_and_then_is_not_told():
    watch = CollapseWatch(8, 2, "")
    values = [3.0 if step % 40 else 0.5 for step in range(200)]
    assert not any(watch.look(step, [1], np.array([value])) for step, value in enumerate(values))
    # where every token goes to every expert there is nothing to tell
    assert not any(CollapseWatch(2, 2, "").look(step, [1], np.array([0.0])) for step in range(200))


def test_advice_follows_the_settings():
    assert "Balancing is off: set momoe.load_balance_rate" in balance_advice(tiny_args(load_balance_rate=0.0))
    assert 'momoe.load_balance_rule = "quantile" (now "sign")' in balance_advice(tiny_args())
    assert "optimizer.lr" in balance_advice(tiny_args(load_balance_rule="quantile"))
