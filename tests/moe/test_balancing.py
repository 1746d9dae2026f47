"""The rules that move the experts' biases."""

import pytest
import torch

from momoe_titan.moe.balancing import bias_delta


class TestDelta:
    def test_sign_rule(self):
        counts = torch.tensor([[6, 1, 3, 2], [0, 0, 0, 8], [5, 5, 5, 5], [0, 0, 0, 0]])
        # means 3, 2, 5, 0; at the mean an expert stays where it is, and nothing is re-centred
        want = [[-1, 1, 0, 1], [1, 1, 1, -1], [0, 0, 0, 0], [0, 0, 0, 0]]
        delta = bias_delta(counts, 0.001)
        assert delta.dtype == torch.float32
        assert torch.equal(delta, 0.001 * torch.tensor(want, dtype=torch.float32))

    def test_proportional_rule(self):
        counts = torch.tensor([[6, 1, 3, 2], [0, 0, 0, 0]])
        delta = bias_delta(counts, 0.3, "proportional")
        want = 0.3 * torch.tensor([[-1, 2 / 3, 0, 1 / 3], [0, 0, 0, 0]])
        torch.testing.assert_close(delta, want)
        # counts, not their scale, matter
        torch.testing.assert_close(bias_delta(counts * 1000, 0.3, "proportional"), want)

    def test_counts_beyond_float32(self):
        # neighbours of 2**30 are one float32
        counts = torch.tensor([2**30 - 1, 2**30, 2**30 + 1])
        assert bias_delta(counts, 1.0).tolist() == [1, 0, -1]

    def test_unknown_rule(self):
        with pytest.raises(ValueError, match="rule is 'signs'"):
            bias_delta(torch.ones(1, 2), 0.1, "signs")
