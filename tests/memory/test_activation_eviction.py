"""What z is evicted, and when; test_expert_parallel.py trains with it."""

import gc
import logging

import pytest
import torch

from momoe_titan.memory.activation_eviction import ActivationBudget
from momoe_titan.memory.plan import CUBLAS_BYTES, MemoryPlan, Moment

Z, BASE, SLACK, LAYERS = 1000, 50_000, 7, ["0", "1", "2"]


class Layer:
    def __init__(self, save_percent=100.0):
        self.save_percent = save_percent


def budget_with(room: int, growth=100, kept=10, save_percent=(100.0,) * 3) -> ActivationBudget:
    """z of each layer takes 1000 bytes beside 50000, 51000 in the first layer's backward; with `room` beyond 50000."""
    z = [(layer, Z) for layer in LAYERS]
    moments = [Moment("forward", z[:i], BASE, {}, growth) for i in range(3)]
    moments += [
        Moment("loss", z, BASE, {}),
        Moment("backward", z[:1], BASE + 1000, {}, growth),
        Moment("optimizer", [], 0, {}),
    ]
    plan = MemoryPlan(
        LAYERS, moments, {}, 1, slack=SLACK, layer_growth=dict.fromkeys(LAYERS, (0.75 * kept, 0.25 * kept))
    )
    budget = ActivationBudget(plan, [Layer(percent) for percent in save_percent])
    budget.room = BASE + SLACK + CUBLAS_BYTES + room
    return budget


def forward(budget: ActivationBudget, rows: list[float], more_sent=0, tokens=None) -> list[torch.Tensor]:
    """z of each layer, empty where it is not kept at all. As many tokens as rows unless said otherwise."""
    kept = []
    for i, (layer, share) in enumerate(zip(budget.layers, rows, strict=False)):
        budget.reserve(layer, share if tokens is None else tokens[i], share, more_sent)
        kept.append(torch.empty(round(10 * share * budget.save_percent(layer)), dtype=torch.uint8))
        if kept[-1].numel():
            budget.record_saved(layer, kept[-1])
    return kept


def held(kept: list[torch.Tensor]) -> list[int]:
    return [z.untyped_storage().nbytes() for z in kept]


@pytest.mark.parametrize(
    "rows, room, left",
    [
        ([1, 1, 1], 3000, [1000, 1000, 1000]),  # as planned
        ([0.5, 0.5, 0.5], 3000, [500, 500, 500]),
        ([1, 1, 2], 4009, [0, 1000, 2000]),  # z 1000 and 10 that the layer keeps
        ([1, 1, 2], 4010, [1000, 1000, 2000]),
        ([2, 1, 1], 3500, [0, 1000, 1000]),  # its own
        ([1, 2, 1], 3000, [0, 0, 1000]),  # the first and its own
        ([1, 4, 1], 5050, [0, 4000, 1000]),
        ([2, 1, 0.5], 3500, [0, 1000, 500]),  # what comes later is not known
        ([5, 5, 5], 2999, [0, 0, 0]),
        ([1, 1, 1], -1, [0, 0, 0]),
    ],
)
def test_sheds_from_the_first_layer_on_and_no_more_than_needed(rows, room, left):
    budget = budget_with(room)
    kept = forward(budget, rows)
    assert held(kept) == left
    assert budget.evicted_bytes == sum(round(Z * share) for share in rows) - sum(left)
    assert held(forward(budget_with(room + 100_000), rows)) == [round(Z * share) for share in rows]


def test_the_next_forward_starts_anew():
    budget = budget_with(3000)
    assert held(forward(budget, [1, 1, 3])) == [0, 0, 0]
    assert held(forward(budget, [1, 1, 1])) == [1000] * 3 and budget.evicted_bytes == 0
    budget.reserve(budget.layers[0], 9, 9, 0)  # and ends in an error
    assert held(forward(budget, [1, 1, 1])) == [1000] * 3
    budget.layers[0].save_percent, budget.layers[2].save_percent = 0.0, 50.0
    assert held(forward(budget, [9, 1.5, 1])) == [0, 1500, 500]


def test_only_the_largest_layer_at_work_counts_beyond_what_is_kept():
    for share, sheds in ((1.5, False), (1.51, True)):  # 1000 + z + 3000 * (share - 1) in the last backward
        budget = budget_with(4000, growth=3000, kept=0)
        assert (held(forward(budget, [share, 0.9, share]))[0] == 0) == sheds


def test_tokens_and_slots_take_what_each_takes():
    # twice the slots of a layer: z 1000 and a quarter of 400; twice its tokens: three quarters of it
    for tokens, rows, more in (([1, 1, 1], [1, 1, 2], 1100), ([1, 1, 2], [1, 1, 1], 300), ([1, 1, 2], [1, 1, 2], 1400)):
        for room, left in ((3000 + more, 1000), (2999 + more, 0)):
            assert held(forward(budget_with(room, kept=400), rows, tokens=tokens))[0] == left
    # the layer at work goes by the larger: two z and 3000 / 2 in the last forward
    for room, left in ((3500, 1000), (3499, 0)):
        assert held(forward(budget_with(room, growth=3000, kept=0), [1, 1, 0.9], tokens=[1, 1, 1.5]))[0] == left


def test_what_is_sent_beyond_the_fair_share_counts():
    # kept by three layers, at the loss
    assert held(forward(budget_with(3300), [1, 1, 1], more_sent=100)) == [1000, 1000, 1000]
    assert held(forward(budget_with(3300), [1, 1, 1], more_sent=101)) == [0, 1000, 1000]
    # kept by one, and as much at work, in the first layer's backward
    for more_sent, left in ((500, 1000), (501, 0)):
        budget = budget_with(3000, save_percent=(100.0, 0.0, 0.0))
        assert held(forward(budget, [1, 1, 1], more_sent)) == [left, 0, 0]


def test_z_that_would_make_no_room_is_kept():
    budget = budget_with(3010)
    budget._base_S[-1] += 10**9  # the optimizer's step, when no z is alive
    assert held(forward(budget, [1, 1, 1])) == [1000] * 3
    assert held(forward(budget, [1, 1, 2])) == [0, 1000, 2000]


def test_what_is_freed_is_forgotten_and_what_is_no_forward_is_not_counted():
    budget = budget_with(3000)
    first, second, _ = budget.layers
    kept = forward(budget, [1])
    storage = budget._saved[0][1]
    assert storage() is not None
    del kept
    gc.collect()
    assert storage() is None
    budget.reserve(second, 2, 2, 0)  # nothing to free but its own
    assert budget.save_percent(first) == 100 and budget.save_percent(second) == 0

    budget = budget_with(3000)
    kept = forward(budget, [1, 1, 1])
    with torch.no_grad():
        budget.reserve(first, 9, 9, 0)
    again = torch.ones((), requires_grad=True) * 1
    again.register_hook(lambda grad: budget.reserve(first, 9, 9, 0) or budget.record_saved(first, kept[0]))
    again.backward()
    assert held(kept) == [1000] * 3 and len(budget._saved) == 3


def test_the_least_that_the_rows_take():
    """What a correction takes for granted: never more than they took."""
    planned = BASE + 3 * Z + SLACK + CUBLAS_BYTES
    for rows, least in (([1, 1, 1], 0), ([0.5, 1, 1], -505), ([1.5, 1, 1.5], 1010), ([0.5, 0.5, 0.5], -1515)):
        budget = budget_with(10_000)
        assert budget.least_peak == 0
        forward(budget, rows)
        assert budget.least_peak == planned + least
        forward(budget, [0.1] * 3)
        assert budget.least_peak == planned + least  # the highest


def test_it_is_said_once(caplog):
    caplog.set_level(logging.INFO)
    budget = budget_with(3000)
    for _ in range(3):
        forward(budget, [1, 1.5, 1.5])
    said = [record.message for record in caplog.records if "evicts" in record.message]
    assert (
        len(said) == 1
        and "rank 0 receives up to 1.500 times its fair share of tokens, 1.500 of rows, by MoE layer 2 of 3" in said[0]
    )
