"""The losses of a router: their gradients are those of their formulas, and outputs stay as they are."""

import pytest
import torch

from momoe_titan.moe import router_losses
from momoe_titan.moe.expert_stats import want_entropy
from momoe_titan.moe.router import expert_scores, route_tokens
from momoe_titan.moe.router_losses import accumulate_router_losses, add_router_losses, expert_shares

T, E, K, SEQUENCES = 24, 6, 2, 3


def formula(logits_TE, ids_TK, num_sequences, score_func, aux_weight, z_weight):
    """Sums over tokens, by autograd; shares are constants."""
    scores_TE = expert_scores(logits_TE, score_func)
    p_SLE = (scores_TE / scores_TE.sum(dim=1, keepdim=True)).view(num_sequences, -1, E)
    loss = z_weight * logits_TE.logsumexp(dim=1).square().sum()
    for p_LE, ids in zip(p_SLE, ids_TK.view(num_sequences, -1), strict=True):
        shares_E = torch.bincount(ids, minlength=E) / ids.numel()
        loss = loss + aux_weight * len(p_LE) * E * (shares_E * p_LE.mean(dim=0)).sum()
    return loss


@pytest.mark.parametrize("num_sequences", [1, SEQUENCES])
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("weights", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_gradient(weights, score_func, num_sequences):
    logits_TE = torch.randn(T, E, requires_grad=True)
    other_TE = logits_TE.detach().clone().requires_grad_()
    scores_TK, ids_TK = route_tokens(logits_TE, None, K, score_func)
    want_TK, _ = route_tokens(other_TE, None, K, score_func)
    shares_SE = expert_shares(ids_TK, E, num_sequences)
    got_TK = add_router_losses(scores_TK, logits_TE, shares_SE, score_func, *weights)
    assert torch.equal(got_TK, want_TK)
    dscores_TK = torch.randn(T, K)
    (got_TK * dscores_TK).sum().backward()
    ((want_TK * dscores_TK).sum() + formula(other_TE, ids_TK, num_sequences, score_func, *weights)).backward()
    torch.testing.assert_close(logits_TE.grad, other_TE.grad)


def test_shares():
    ids_TK = torch.tensor([[0, 1], [0, 2], [3, 4], [3, 5]])
    assert expert_shares(ids_TK, E).tolist() == [[0.25, 0.125, 0.125, 0.25, 0.125, 0.125]]
    assert expert_shares(ids_TK, E, 2).tolist() == [[0.5, 0.25, 0.25, 0, 0, 0], [0, 0, 0, 0.5, 0.25, 0.25]]


@pytest.mark.parametrize("num_sequences", [1, SEQUENCES])
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_sums_for_the_log_are_those_of_the_formula(score_func, num_sequences):
    logits_TE = torch.randn(T, E)
    ids_TK = route_tokens(logits_TE, None, K, score_func)[1]
    how = logits_TE, expert_shares(ids_TK, E, num_sequences), score_func
    sums_2 = torch.zeros(2)
    accumulate_router_losses(sums_2, *how)
    assert not sums_2.any(), "nothing is logged"
    want_entropy(True)
    accumulate_router_losses(sums_2, *how)
    want_entropy(False)
    want = [formula(logits_TE, ids_TK, num_sequences, score_func, *weights) for weights in ((1, 0), (0, 1))]
    torch.testing.assert_close(sums_2, torch.stack(want))


def test_a_nan_in_a_step_that_is_not_logged_stays_out_of_the_next(monkeypatch):
    """A CUDA graph records every step, times a number on the device."""
    monkeypatch.setattr(router_losses, "recording_entropy", lambda device: torch.zeros(()))
    sums_2 = torch.ones(2)
    accumulate_router_losses(sums_2, torch.full((3, 4), float("nan")), torch.ones(1, 4), "sigmoid")
    assert sums_2.tolist() == [1.0, 1.0]
