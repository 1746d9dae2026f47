"""Sums of what ranks have sent, against torch."""

import pytest
import torch

from momoe_titan.kernels import sum_parts as module


@pytest.mark.parametrize("parts, sums", [(2, 8192), (2, 4097), (3, 16), (8, 1), (1, 5)])
def test_is_torch_s_sum_in_float32(parts, sums, device, monkeypatch):
    torch.manual_seed(0)
    sent = torch.randn(parts, sums, device=device, dtype=torch.bfloat16)
    want = torch.zeros(sums, device=device)
    for part in sent:
        want += part.float()
    for runs in (True, False):
        monkeypatch.setattr(module, "runs_here", lambda t, runs=runs: runs)
        guarded = torch.full((sums + 8,), 7.0, device=device)
        module.sum_parts(guarded[:sums], sent)
        torch.testing.assert_close(guarded[:sums], want, rtol=0 if runs else 1e-6, atol=0 if runs else 1e-6)
        assert (guarded[sums:] == 7).all()
        for own in {0, parts - 1}:  # from elsewhere
            others = sent.clone()
            others[own] = float("nan")
            module.sum_parts(guarded[:sums], others, own=(own, sent[own].clone()))
            torch.testing.assert_close(guarded[:sums], want, rtol=0 if runs else 1e-6, atol=0 if runs else 1e-6)
