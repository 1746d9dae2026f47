"""How the biases move: by counts, and by the quantiles of histograms of margins."""

import pytest
import torch

from momoe_titan import MoE
from momoe_titan.kernels.quantile import NUM_BINS, bin_edges, count_margins
from momoe_titan.moe.balancing import bias_delta, quantile_delta
from momoe_titan.moe.router import route_in_groups, route_tokens


def margins_of(logits_TE, bias_E, top_k, score_func):
    histogram_EB = torch.zeros(logits_TE.shape[1], NUM_BINS, dtype=torch.int32)
    _, ids_TK = route_tokens(logits_TE, bias_E, top_k, score_func)
    count_margins(logits_TE, bias_E, ids_TK, histogram_EB, score_func)
    return histogram_EB, ids_TK


def maxvio(ids_TK, num_experts):
    counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts).double()
    return (counts_E.max() / counts_E.mean() - 1).item()


def router_logits(num_tokens, num_experts, common, spread):
    """What the tokens have in common, by which a few experts win all of them, and what they differ in."""
    return common * torch.randn(num_experts) + spread * torch.randn(num_tokens, num_experts)


@pytest.mark.parametrize("spread", [1.0, 0.05])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "score_func"),
    [(8, 2, "sigmoid"), (32, 4, "softmax"), (128, 8, "softmax")],
)
def test_few_steps_balance_what_had_collapsed(num_experts, top_k, score_func, spread):
    """Without a number to tune: scores of any scale, and any spread of the tokens."""
    logits_TE = router_logits(1024, num_experts, 1.0, spread)
    bias_E = torch.zeros(num_experts)
    found = []
    for _ in range(14):
        histogram_EB, ids_TK = margins_of(logits_TE, bias_E, top_k, score_func)
        found.append(maxvio(ids_TK, num_experts))
        bias_E += quantile_delta(histogram_EB[None].long(), bias_E[None], top_k)[0]
    assert found[0] > 0.8
    assert found[-1] < 0.1
    assert bias_E.mean().abs() < 1e-6


def test_two_experts_that_compete_do_not_overshoot():
    """One step solves it: each moves half of the way."""
    logits_TE = torch.randn(4096, 1) * torch.tensor([[1.0, 0.0]]) + torch.tensor([[2.0, 0.0]])
    bias_E = torch.zeros(2)
    histogram_EB, ids_TK = margins_of(logits_TE, bias_E, 1, "sigmoid")
    assert maxvio(ids_TK, 2) > 0.9
    bias_E += quantile_delta(histogram_EB[None].long(), bias_E[None], 1)[0]
    assert maxvio(margins_of(logits_TE, bias_E, 1, "sigmoid")[1], 2) < 0.02


GROUPS = [(64, 8, 8, 4), (64, 4, 8, 1), (32, 4, 8, 2), (24, 4, 6, 2)]  # (E, K, groups, groups taken)


def in_groups(logits_TE, bias_E, top_k, num_groups, num_taken):
    return route_in_groups(logits_TE, bias_E, top_k, "sigmoid", True, 1.0, num_groups, num_taken)[1]


def change_in_groups(logits_TE, bias_E, top_k, num_groups, num_taken):
    ids_TK = in_groups(logits_TE, bias_E, top_k, num_groups, num_taken)
    histogram_EB = torch.zeros(logits_TE.shape[1], NUM_BINS, dtype=torch.int32)
    groups = {"num_groups": num_groups, "num_limited_groups": num_taken}
    count_margins(logits_TE, bias_E, ids_TK, histogram_EB, "sigmoid", **groups)
    return quantile_delta(histogram_EB[None].long(), bias_E[None], top_k)[0], ids_TK


@pytest.mark.parametrize("how", GROUPS, ids=str)
def test_few_steps_balance_experts_in_groups(how):
    """Cutoffs without groups leave a MaxVio of a half; those of one expert alone swing (64, 4, 8, 1)."""
    num_experts, *how = how
    logits_TE = router_logits(1024, num_experts, 1.0, 1.0)
    bias_E = torch.zeros(num_experts)
    found = []
    for _ in range(30):
        delta_E, ids_TK = change_in_groups(logits_TE, bias_E, *how)
        found.append(maxvio(ids_TK, num_experts))
        bias_E += delta_E
    assert found[0] > 0.8
    assert max(found[-5:]) < 0.15


def test_biases_in_groups_are_those_of_a_search():
    """Expert after expert, by trying biases on the choice itself until all have their share: the rule stays there."""
    num_experts, num_tokens, how, tried = 8, 64, (3, 4, 2), 17
    torch.manual_seed(0)
    logits_TE = router_logits(num_tokens, num_experts, 1.0, 1.0)
    share = num_tokens * how[0] // num_experts
    bias_E = torch.zeros(num_experts)
    for _ in range(40):
        counts_E = torch.bincount(in_groups(logits_TE, bias_E, *how).flatten(), minlength=num_experts)
        if (counts_E - share).abs().max() <= 1:
            break
        for expert in range(num_experts):
            low, high = -2.0, 2.0
            for _ in range(2):
                biases_NE = bias_E.repeat(tried, 1)
                biases_NE[:, expert] = torch.linspace(low, high, tried)
                many_RE = torch.cat([logits_TE] * tried), biases_NE.repeat_interleave(num_tokens, dim=0)
                counts_N = (in_groups(*many_RE, *how) == expert).view(tried, -1).sum(dim=1)
                enough = int((counts_N >= share).nonzero()[0])
                low, high = biases_NE[max(0, enough - 1), expert].item(), biases_NE[enough, expert].item()
            bias_E[expert] = high
    assert (counts_E - share).abs().max() <= 1
    bias_E -= bias_E.mean()
    delta_E, _ = change_in_groups(logits_TE, bias_E, *how)
    assert bias_E.abs().max() > 0.1
    assert delta_E.abs().max() < 0.1 * bias_E.abs().max()


def test_quantile_of_the_margins():
    """Against torch.quantile of the margins themselves, within the width of a bin."""
    edges = bin_edges().float()
    margins = torch.randn(1000).clamp(-3, 3)
    index = torch.bucketize(margins, edges, right=True) - 1
    histogram = torch.bincount(index, minlength=NUM_BINS)
    other = torch.zeros(NUM_BINS, dtype=torch.int64)
    other[NUM_BINS // 2 - 1] = other[NUM_BINS // 2] = 500  # the quantile 1/2 is 0
    delta = quantile_delta(torch.stack([histogram, other])[None], torch.zeros(1, 2), 1)[0]
    want = margins.quantile(0.5)
    assert (2 * delta[0] - want).abs() <= 0.13 * want.abs() + 1e-6
    torch.testing.assert_close(delta[1], -delta[0])


def test_average_and_mean():
    logits_TE = router_logits(512, 8, 1.0, 0.3)
    bias_E = 0.1 * torch.randn(8) + 1.0
    histogram_EB, _ = margins_of(logits_TE, bias_E, 2, "sigmoid")
    whole, half = (quantile_delta(histogram_EB[None].long(), bias_E[None], 2, a)[0] for a in (1.0, 0.5))
    centred = bias_E - bias_E.mean()
    torch.testing.assert_close(bias_E + half, centred + 0.5 * (bias_E + whole - centred))
    assert (bias_E + half).mean().abs() < 1e-6


def test_layer_without_tokens_stays():
    histogram_LEB = torch.zeros(2, 4, NUM_BINS, dtype=torch.int64)
    histogram_LEB[0, :, 3] = 10
    delta_LE = quantile_delta(histogram_LEB, torch.rand(2, 4), 2)
    assert not delta_LE[1].any() and delta_LE.isfinite().all()


def test_counts_beyond_float32():
    """Many steps' worth of tokens: the same quantile as of few."""
    logits_TE = router_logits(256, 8, 1.0, 0.3)
    histogram_EB, _ = margins_of(logits_TE, torch.zeros(8), 2, "sigmoid")
    few, many = (quantile_delta(histogram_EB[None].long() * n, torch.zeros(1, 8), 2) for n in (1, 2**30))
    torch.testing.assert_close(few, many)


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


@pytest.mark.parametrize("num_shared", [0, 1])
def test_seed_layer_solves_for_its_biases(num_shared):
    shape = 8 + num_shared, 2 + num_shared, num_shared
    moe = MoE(16, 8, *shape, bias_update_rule="quantile", device="cpu", dtype=torch.float32)
    with torch.no_grad():
        moe.router.Wg_DN.mul_(16)
    x_MD = torch.randn(500, 16) + 1
    handle = moe.register_bias_update(torch.optim.SGD(moe.parameters(), lr=0.0))
    for _ in range(16):  # each goes half the way
        moe(x_MD)
        counts_E = moe.counts_N[:8].double()
        moe.update_biases()
    handle.remove()
    assert counts_E.max() / counts_E.mean() - 1 < 0.15
    assert not moe.biases_N[8:].any() and moe.biases_N.mean().abs() < 1e-6
    assert moe.margins_EB is not None and not moe.margins_EB.any()
    with torch.no_grad():
        moe(x_MD)
    assert not moe.margins_EB.any()


def test_seed_layer_refuses_other_rules():
    with pytest.raises(ValueError, match="bias_update_rule is 'median'"):
        MoE(4, 4, 4, 1, 0, bias_update_rule="median", device="cpu")
