"""What is counted of a forward, and when."""

import pytest
import torch
from torch import nn

from momoe_titan.kernels.quantile import NUM_BINS
from momoe_titan.moe import expert_stats
from momoe_titan.moe.expert_stats import (
    accumulate_entropy,
    accumulate_margins,
    count_experts,
    record_counts,
    recording_entropy,
    recording_paused,
    records_entropy,
    want_entropy,
)


@pytest.fixture
def entropy_wanted():
    want_entropy(True)
    yield
    want_entropy(False)


def test_counts_experts_that_nobody_chose_too():
    ids = torch.tensor([[0, 3], [3, 1], [3, 0]])
    counts = count_experts(ids, 5)
    assert counts.dtype == torch.int64 and counts.tolist() == [2, 1, 0, 3, 0]
    assert count_experts(ids[:0], 5).tolist() == [0] * 5


def test_records_training_forwards_alone():
    module, total, counts = nn.Module(), torch.zeros(3, dtype=torch.int64), torch.tensor([1, 0, 2])
    record_counts(module, total, counts)
    assert total.tolist() == [1, 0, 2]
    with torch.no_grad():
        record_counts(module, total, counts)
    record_counts(module.eval(), total, counts)
    assert total.tolist() == [1, 0, 2]


def test_the_mean_token_is_that_of_tokens_from_all_over_a_long_batch(monkeypatch):
    monkeypatch.setattr(expert_stats, "MEAN_TOKENS", 16)
    x = torch.arange(67.0)[:, None]
    histogram, input_sum = torch.zeros(2, NUM_BINS, dtype=torch.int32), torch.zeros(2)
    ids = torch.zeros(67, 1, dtype=torch.int64)
    accumulate_margins(histogram, input_sum, x, torch.zeros(67, 2), torch.zeros(2), ids, "sigmoid")
    assert 16 <= input_sum[1] < 32
    assert input_sum[0] / input_sum[1] == pytest.approx(33, abs=1.5)


def test_records_nothing_while_paused(entropy_wanted):
    module, total, entropy = nn.Module(), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    scores = torch.tensor([[0.5, 0.5]])

    def record():
        record_counts(module, total, torch.tensor([1, 2]))
        accumulate_entropy(entropy, scores)

    with pytest.raises(KeyError), recording_paused():
        with recording_paused():
            record()
        record()
        raise KeyError
    assert not total.any() and not entropy.any()
    record()
    assert total.tolist() == [1, 2] and entropy.tolist() == [1, 1]


def test_a_captured_forward_asks_when_it_runs(monkeypatch):
    """The host cannot ask in a CUDA graph: what is captured while nothing is wanted must record once it is."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(expert_stats, "_is_captured", lambda: True)
    monkeypatch.setattr(expert_stats, "_switches", {gpu: torch.zeros(())})
    switch = recording_entropy(gpu)
    assert switch == 0
    want_entropy(True)
    assert switch == 1
    with recording_paused():
        assert recording_entropy(gpu) is None
    want_entropy(False)
    assert switch == 0 and records_entropy(nn.Module())
    monkeypatch.undo()
    assert recording_entropy(gpu) is None and not records_entropy(nn.Module())


def test_an_eager_training_forward_records_while_the_entropy_is_wanted(entropy_wanted):
    assert records_entropy(nn.Module()) and not records_entropy(nn.Module().eval())
    want_entropy(False)
    assert not records_entropy(nn.Module())
