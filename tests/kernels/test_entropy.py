"""The entropy of the router's scores: the kernel against torch, and the switch on the device."""

import pytest
import torch

from momoe_titan.kernels import entropy


@pytest.mark.parametrize("tokens, experts", [(67, 40), (3000, 2), (1, 1), (0, 8), (5, 3000)])
def test_matches_torch(tokens, experts, device, monkeypatch):
    monkeypatch.setattr(entropy, "runs_here", lambda t: True)
    torch.manual_seed(0)
    scores = torch.rand(tokens, experts, device=device) ** 4
    scores[: tokens // 3, 0] = 0
    want = torch.tensor([2.0, 5.0], device=device)
    got = want.clone()
    for wanted in (1.0, 0.0):
        switch = torch.tensor(wanted, device=device)
        entropy._add_entropy_ref(want, scores, switch)
        entropy.add_entropy(got, scores, switch)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want[1] == 5 + tokens  # the second time nothing was wanted
    assert tokens == 0 or experts == 1 or want[0] > 2


def test_nan_stays_one(device, monkeypatch):
    monkeypatch.setattr(entropy, "runs_here", lambda t: True)
    total = torch.zeros(2, device=device)
    entropy.add_entropy(total, torch.tensor([[0.5, float("nan")]], device=device), torch.ones((), device=device))
    assert total[0].isnan() and total[1] == 1
