"""Experts from few groups, against a loop over tokens."""

import pytest
import torch

from momoe_titan.moe.router import route_in_groups


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("num_groups, num_limited", [(4, 2), (2, 1), (3, 3)])
def test_experts_come_from_the_best_groups(score_func, num_groups, num_limited):
    logits = torch.randn(40, 12)
    logits[3] = 0  # of equal groups the first, of equal experts the lowest
    bias = 0.3 * torch.randn(12)
    bias[:] = torch.where(torch.rand(12) < 0.5, bias, torch.zeros(12))
    scores, ids = route_in_groups(
        logits,
        bias,
        top_k=4,
        score_func=score_func,
        normalize=True,
        scale=2.5,
        num_groups=num_groups,
        num_limited_groups=num_limited,
    )
    for token, of_token in enumerate(logits):
        score = of_token.sigmoid() if score_func == "sigmoid" else of_token.softmax(0)
        choice = (score + bias).tolist()
        size = 12 // num_groups
        groups = [range(first, first + size) for first in range(0, 12, size)]
        best = sorted(groups, key=lambda group: -sum(sorted(choice[e] for e in group)[-2:]))[:num_limited]
        allowed = sorted(e for group in best for e in group)
        chosen = sorted(allowed, key=lambda e: -choice[e])[:4]
        assert ids[token].tolist() == chosen
        weights = torch.stack([score[e] for e in chosen])
        torch.testing.assert_close(scores[token], 2.5 * weights / weights.sum())
