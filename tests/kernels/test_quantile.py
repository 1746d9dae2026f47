"""The counting of margins: every token once per expert, in the bin of its margin, on CPU and GPU alike."""

import pytest
import torch

from momoe_titan.kernels import quantile
from momoe_titan.kernels.quantile import NUM_BINS, bin_edges, count_margins, group_margins
from momoe_titan.moe.router import route_in_groups, route_tokens


def case(num_tokens, num_experts, top_k, score_func, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    bias_E = 0.1 * torch.randn(num_experts, generator=generator)
    logits_TE, bias_E = logits_TE.to(device), bias_E.to(device)
    _, ids_TK = route_tokens(logits_TE, bias_E, top_k, score_func)
    return logits_TE, bias_E, ids_TK


def empty_histogram(logits_TE):
    return torch.zeros(logits_TE.shape[1], NUM_BINS, dtype=torch.int32, device=logits_TE.device)


def reference_histogram(logits_TE, bias_E, ids_TK, score_func):
    """By its definition, in float64, one token after another."""
    scores_TE = logits_TE.sigmoid() if score_func == "sigmoid" else logits_TE.softmax(dim=1)
    choice_TE = scores_TE + bias_E
    edges = bin_edges()
    histogram_EB = torch.zeros(logits_TE.shape[1], NUM_BINS, dtype=torch.int32)
    for choice_E, ids_K in zip(choice_TE, ids_TK, strict=True):
        left = [e for e in range(len(choice_E)) if e not in ids_K.tolist()]
        cutoff = 0.5 * (choice_E[ids_K].min() + choice_E[left].max())
        for e, value in enumerate(choice_E):
            margin = (cutoff - value).double()
            index = torch.bucketize(margin, edges, right=e not in ids_K.tolist()).item() - 1
            histogram_EB[e, min(max(index, 0), NUM_BINS - 1)] += 1
    return histogram_EB


SHAPES = {  # (T, E, K)
    "a part of a block": (37, 8, 2),
    "experts not a power of two": (100, 5, 2),
    "many experts": (50, 128, 8),
    "one expert left": (40, 4, 3),
}


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(shape, score_func):
    logits_TE, bias_E, ids_TK = case(*SHAPES[shape], score_func)
    histogram_EB = empty_histogram(logits_TE)
    count_margins(logits_TE, bias_E, ids_TK, histogram_EB, score_func)
    assert torch.equal(histogram_EB, reference_histogram(logits_TE, bias_E, ids_TK, score_func))


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax", "softmax_of_chosen"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernel(shape, score_func, device):
    logits_TE, bias_E, ids_TK = case(*SHAPES[shape], score_func, device)
    got, want = empty_histogram(logits_TE), empty_histogram(logits_TE)
    quantile._count_margins(logits_TE, bias_E, ids_TK, got, score_func)
    quantile._count_margins_ref(logits_TE, bias_E, ids_TK, want, score_func)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=logits_TE.shape[1])
    assert torch.equal(got[:, : NUM_BINS // 2].sum(dim=1), counts_E)
    assert (got.sum(dim=1) == logits_TE.shape[0]).all()
    # An exponential that differs in its last bit may move a margin to the next bin.
    assert (got.cumsum(dim=1) - want.cumsum(dim=1)).abs().max() <= (1 if device == "cuda" else 0)


def test_adds_to_what_is_there_and_gives_the_same_bits_in_parts(device):
    logits_TE, bias_E, ids_TK = case(300, 8, 2, "sigmoid", device)
    whole, parts = empty_histogram(logits_TE), empty_histogram(logits_TE)
    quantile._count_margins(logits_TE, bias_E, ids_TK, whole, "sigmoid")
    for part in (slice(0, 70), slice(70, 300)):
        quantile._count_margins(logits_TE[part], bias_E, ids_TK[part].contiguous(), parts, "sigmoid")
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("by", ["kernel", "reference"])
@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_tokens_with_nan_are_left_out_and_infinities_are_not(score_func, by, device):
    logits_TE, bias_E, _ = case(20, 8, 2, score_func, device)
    logits_TE[3, 5], logits_TE[7], logits_TE[9, 1] = float("nan"), float("nan"), float("inf")
    _, ids_TK = route_tokens(logits_TE, bias_E, 2, score_func)
    histogram_EB = empty_histogram(logits_TE)
    count = quantile._count_margins if by == "kernel" else quantile._count_margins_ref
    count(logits_TE, bias_E, ids_TK, histogram_EB, score_func)
    assert (histogram_EB.sum(dim=1) == 18).all()


def test_no_tokens(device):
    logits_TE, bias_E, ids_TK = case(0, 8, 2, "sigmoid", device)
    histogram_EB = empty_histogram(logits_TE)
    quantile._count_margins(logits_TE, bias_E, ids_TK, histogram_EB, "sigmoid")
    count_margins(logits_TE, bias_E, ids_TK, histogram_EB, "sigmoid")
    assert not histogram_EB.any()


def test_rows_of_a_wider_matrix(device):
    """`TopKRouter` with shared experts hands over the first columns of its logits."""
    logits_TE, bias_E, ids_TK = case(40, 8, 2, "softmax", device)
    wide_TE = torch.cat([logits_TE, torch.full_like(logits_TE, 9.0)], dim=1)[:, :8]
    got, want = empty_histogram(logits_TE), empty_histogram(logits_TE)
    quantile._count_margins(wide_TE, bias_E, ids_TK, got, "softmax")
    quantile._count_margins(logits_TE, bias_E, ids_TK, want, "softmax")
    assert torch.equal(got, want)


def test_edges():
    edges = bin_edges()
    assert len(edges) == NUM_BINS + 1 and (edges.diff() > 0).all() and edges[NUM_BINS // 2] == 0
    assert torch.equal(edges, -edges.flip(0)) and edges[-1] == 2.0**quantile.MAX_EXPONENT


def test_equal_scores_are_counted_by_who_was_chosen(device):
    """All experts alike: the lowest ids are chosen, at a margin of 0, on the chosen side."""
    logits_TE = torch.zeros(10, 4, device=device)
    bias_E = torch.zeros(4, device=device)
    _, ids_TK = route_tokens(logits_TE, bias_E, 2, "sigmoid")
    histogram_EB = empty_histogram(logits_TE)
    quantile._count_margins(logits_TE, bias_E, ids_TK, histogram_EB, "sigmoid")
    middle = NUM_BINS // 2
    assert histogram_EB[:, middle - 1].tolist() == [10, 10, 0, 0]
    assert histogram_EB[:, middle].tolist() == [0, 0, 10, 10]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 3])
def test_sum_of_tokens(device, dtype, every):
    x_SD = torch.randn(700, 40, device=device).to(dtype)[::every]
    got, want = torch.ones(41, device=device), torch.ones(41, device=device)
    quantile._add_tokens(x_SD, got)
    quantile.add_tokens(x_SD[:0], got)  # adds nothing
    want[:-1] += x_SD.float().sum(dim=0)
    want[-1] += len(x_SD)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


GROUPS = {  # (E, K, groups, groups taken)
    "four of eight": (32, 4, 8, 4),
    "one": (16, 2, 4, 1),
    "all but one": (24, 5, 3, 2),
    "all experts of the groups": (8, 4, 4, 2),
    "DeepSeek-V3": (256, 8, 8, 4),
}


def margin_by_definition(choice_E, expert, top_k, num_groups, num_taken):
    """Of one token, in Python."""
    groups = choice_E.view(num_groups, -1)
    scores = [sum(sorted(group.tolist())[-2:]) for group in groups]
    ranked = sorted(range(num_groups), key=lambda g: -scores[g])
    own = expert // groups.shape[1]
    of_groups = (scores[ranked[num_taken - 1]] + scores[ranked[num_taken]]) / 2 - scores[own]
    others = [g for g in ranked if g != own][: num_taken - 1]
    rivals = sorted((v for g in [own, *others] for v in groups[g].tolist()), reverse=True)
    if top_k == len(rivals):  # all of them are chosen
        return of_groups
    return max(of_groups, (rivals[top_k - 1] + rivals[top_k]) / 2 - choice_E[expert].item())


@pytest.mark.parametrize("name", GROUPS)
def test_margins_in_groups(name, device):
    num_experts, *how = GROUPS[name]
    logits_TE = torch.randn(20, num_experts, generator=torch.Generator().manual_seed(0)).to(device)
    bias_E = 0.1 * torch.randn(num_experts, generator=torch.Generator().manual_seed(1)).to(device)
    _, ids_TK = route_in_groups(logits_TE, bias_E, how[0], "sigmoid", False, 1.0, *how[1:])
    choice_TE = logits_TE.sigmoid() + bias_E
    found_TE = group_margins(choice_TE, *how).cpu()
    chosen_TE = torch.zeros(20, num_experts, dtype=torch.bool).scatter_(1, ids_TK.cpu(), True)
    assert torch.equal(found_TE < 0, chosen_TE)
    for t, e in [(t, e) for t in range(20) for e in range(0, num_experts, max(1, num_experts // 16))]:
        assert found_TE[t, e].item() == pytest.approx(margin_by_definition(choice_TE[t].cpu(), e, *how), abs=1e-5)

    histogram_EB = empty_histogram(logits_TE)
    groups = {"num_groups": how[1], "num_limited_groups": how[2]}
    count_margins(logits_TE, bias_E, ids_TK, histogram_EB, "sigmoid", **groups)
    counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
    assert torch.equal(histogram_EB[:, : NUM_BINS // 2].sum(dim=1), counts_E)
    assert (histogram_EB.sum(dim=1) == 20).all()


def test_all_groups_taken_is_as_no_groups():
    logits_TE, bias_E, ids_TK = case(50, 12, 3, "sigmoid")
    want, found = empty_histogram(logits_TE), empty_histogram(logits_TE)
    count_margins(logits_TE, bias_E, ids_TK, want, "sigmoid")
    count_margins(logits_TE, bias_E, ids_TK, found, "sigmoid", num_groups=4, num_limited_groups=4)
    assert torch.equal(found, want)
