"""One reduction joins the layers of all pipeline stages and the memory of all ranks."""

import numpy as np
import pytest
import torch

from momoe_titan.components.job_state import RankState, gather
from tests.support.tiny import build, moes, tiny_args


def test_stages_and_shared_layers(monkeypatch):
    """Rank 0 has layers 1 and 2, rank 1 layers 2 and 4, nobody layer 3. What the ranks give to the
    reduction is caught first, then each gets the sum."""
    layers = moes(build(tiny_args(n_layers=5, save_percent=[0, 25, 0, 100])))
    for i, moe in enumerate(layers):
        moe.expert_bias += 0.1 * i
    counts = torch.arange(20).reshape(4, 5) + 2**40  # exact beyond float32
    entropies = [{1: (3.0, 4.0), 2: (1.0, 4.0)}, {2: (7.0, 4.0), 4: (0.0, 2.0)}]
    ranks = [RankState(1, 3, 80, 0, 1, 5, 0.5, 2, 0, 0, -1), RankState(2, 2, 70, 4, 0, 6, 0.25, 1, 0, 0, 2.5)]
    sent, total = [], None

    def all_reduce(flat):
        sent.append(flat.clone())
        if total is not None:
            flat.copy_(total)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)

    def run(rank):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        own = {}
        for i, entropy in entropies[rank].items():
            layers[i - 1].router.entropy_and_tokens.copy_(torch.tensor(entropy))
            own[i] = (layers[i - 1], counts[i - 1])
        return gather(own, [1, 2, 3, 4], 5, ranks[rank], torch.device("cpu"))()

    for rank in (0, 1):
        run(rank)
    total = sum(sent)
    for rank in (0, 1):
        state = run(rank)
        assert state.layer_ids == [1, 2, 4]
        assert np.array_equal(state.counts_LE, counts[[0, 1, 3]].numpy())
        np.testing.assert_allclose(state.bias_LE[:, 0], [0, 0.1, 0.3], rtol=1e-6)
        np.testing.assert_allclose(state.entropy_L, [0.75, 1.0, 0.0])
        assert state.save_percent_L.tolist() == [0, 25, 100] and state.ours
        assert state.ranks.peak.tolist() == [3, 2] and state.ranks.capacity.min() == 70


def test_stock_layers_have_no_save_percent():
    (layer, _) = moes(build(tiny_args(backend="torchtitan")))
    here = RankState(*range(10), torch.tensor(10.0))
    state = gather({1: (layer, torch.ones(5))}, [1], 5, here, torch.device("cpu"))()
    assert not state.ours and state.maxvio_L.tolist() == [0] and np.isnan(state.entropy_L[0])
    assert state.ranks == pytest.approx(here._replace(loss=10.0))
    assert not gather({}, [], 1, here, torch.device("cpu"))().ours
