"""MoMoE, TopKRouter and MoE against loops that treat one token at a time."""

import copy
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from momoe_titan.moe.layers import MoE, MoMoE, TopKRouter

D, H, N, K, KS = 16, 12, 6, 3, 1


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_experts(**kwargs):
    """Unit-scale weights, so that an error of the maths is not hidden under a tolerance."""
    w1 = torch.randn(N, D, 2 * H) / D**0.5
    w2 = torch.randn(N, H, D) / H**0.5
    return MoMoE(D, H, N, K, Wl1_ND2H=w1, Wl2_NHD=w2, device="cpu", **kwargs)


def make_moe(**kwargs):
    options = dict(bias_update_rate=0.1, bias_update_rule="sign", device="cpu", dtype=torch.float32)
    return MoE(D, H, N, K, KS, **(options | kwargs))


def dense_loop(x_MD, mask_NM, s_NM, w1, w2):
    out = []
    for m in range(x_MD.shape[0]):
        y = torch.zeros(w2.shape[-1])
        for n in range(w1.shape[0]):
            if mask_NM[n, m]:
                z = x_MD[m] @ w1[n]
                up, gate = z[: z.shape[0] // 2], z[z.shape[0] // 2 :]
                y = y + s_NM[n, m] * ((up * F.silu(gate)) @ w2[n])
        out.append(y)
    return torch.stack(out)


MASKS = {
    # every token has K experts: what a top-k router gives
    "regular": lambda M: F.one_hot(torch.rand(M, N).topk(K).indices, N).sum(1).T,
    # 0 to N experts per token, more than K among them
    "ragged": lambda M: (torch.rand(N, M) < torch.linspace(0, 1, M)).int(),
    "none": lambda M: torch.zeros(N, M, dtype=torch.int32),
    "all": lambda M: torch.ones(N, M, dtype=torch.bool),
    # one expert gets every token, the others stay empty
    "one expert": lambda M: (torch.arange(N) == 4)[:, None].expand(N, M),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("save_percent", [0, 37, 100])
def test_any_mask_matches_a_loop_over_tokens(mask, save_percent):
    M = 10
    mask_NM = MASKS[mask](M)
    momoe = make_experts(save_percent=save_percent)
    x_BSD = torch.randn(2, M // 2, D, requires_grad=True)
    s_NM = torch.randn(N, M, requires_grad=True)
    dy_BSD = torch.randn(2, M // 2, D)
    leaves = (x_BSD, s_NM, momoe.Wl1_ND2H, momoe.Wl2_NHD)

    y_BSD, counts_N = momoe(x_BSD, mask_NM, s_NM)
    got = torch.autograd.grad(y_BSD, leaves, dy_BSD)
    expected_MD = dense_loop(x_BSD.reshape(M, D), mask_NM, s_NM, *leaves[2:])
    expected = (
        torch.autograd.grad(expected_MD, leaves, dy_BSD.reshape(M, D), allow_unused=True)
        if mask_NM.any()
        else [None] * 4
    )

    assert counts_N.dtype == torch.int64
    assert counts_N.tolist() == mask_NM.sum(1).tolist()
    assert y_BSD.shape == x_BSD.shape
    torch.testing.assert_close(y_BSD.reshape(M, D), expected_MD)
    for leaf, g, e in zip(leaves, got, expected, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(leaf) if e is None else e)
    # gradients reach the scores where the mask is set, and nowhere else
    assert ((got[1] != 0) == (mask_NM != 0)).all()


def test_scores_are_read_only_where_the_mask_is_set():
    mask_NM = MASKS["ragged"](8)
    momoe = make_experts()
    x_MD, s_NM = torch.randn(8, D), torch.randn(N, 8)
    poisoned_NM = s_NM.masked_fill(mask_NM == 0, float("nan")).requires_grad_()
    y_MD, _ = momoe(x_MD, mask_NM, poisoned_NM)
    assert torch.equal(y_MD, momoe(x_MD, mask_NM, s_NM)[0])
    y_MD.sum().backward()
    assert (poisoned_NM.grad[mask_NM == 0] == 0).all()
    assert poisoned_NM.grad.isfinite().all()


@pytest.mark.parametrize("T", [0, 1, 7])
def test_few_tokens_and_two_dimensional_x(T):
    momoe = make_experts()
    x_MD = torch.randn(T, D, requires_grad=True)
    y_MD, counts_N = momoe(x_MD, torch.ones(N, T, dtype=torch.int32), torch.ones(N, T))
    assert y_MD.shape == (T, D) and counts_N.tolist() == [T] * N
    y_MD.sum().backward()
    assert x_MD.grad.shape == (T, D)
    y_BSD, _ = momoe(x_MD[None], torch.ones(N, T, dtype=torch.int32), torch.ones(N, T))
    assert torch.equal(y_BSD[0], y_MD)


def test_noncontiguous_x_and_expanded_gradient():
    momoe = make_experts()
    x = torch.randn(D, 9, requires_grad=True)
    mask_NM, s_NM = MASKS["regular"](9), torch.randn(N, 9)
    y, _ = momoe(x.T, mask_NM, s_NM)
    y.sum().backward()
    copied = x.detach().T.contiguous().requires_grad_()
    y2, _ = momoe(copied, mask_NM, s_NM)
    (y2 * torch.ones(9, D)).sum().backward()
    assert torch.equal(y, y2)
    torch.testing.assert_close(x.grad.T, copied.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_given_weights_are_used_in_place(dtype):
    w1, w2 = torch.randn(N, D, 2 * H, dtype=dtype), torch.randn(N, H, D, dtype=dtype)
    wg = torch.randn(D, N, dtype=dtype)
    moe = MoE(D, H, N, K, KS, Wg_DN=wg, Wl1_ND2H=w1, Wl2_NHD=w2)
    for parameter, given in (
        (moe.router.Wg_DN, wg),
        (moe.momoe.Wl1_ND2H, w1),
        (moe.momoe.Wl2_NHD, w2),
    ):
        assert isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad
        assert parameter.data_ptr() == given.data_ptr() and parameter.dtype == dtype
    torch.optim.SGD(moe.parameters(), lr=1.0)
    moe(torch.randn(1, 4, D, dtype=dtype)).sum().backward()
    before = w1.clone()
    torch.optim.SGD(moe.parameters(), lr=1.0).step()
    assert not torch.equal(before, w1), "the step has to be seen in the caller's tensor"


def test_a_given_parameter_is_kept_as_that_very_parameter():
    w1 = torch.nn.Parameter(torch.randn(N, D, 2 * H))
    assert MoMoE(D, H, N, K, Wl1_ND2H=w1, device="cpu").Wl1_ND2H is w1


@pytest.mark.parametrize(
    "name, weights, message",
    [
        ("Wl1_ND2H", {"Wl1_ND2H": torch.zeros(N, 2 * H, D).transpose(1, 2)}, "not contiguous"),
        ("Wl2_NHD", {"Wl2_NHD": torch.zeros(N, D, H)}, r"shape \(6, 16, 12\)"),
        ("Wl1_ND2H", {"Wl1_ND2H": torch.zeros(N, D, 2 * H).half()}, "torch.float16"),
        ("Wl2_NHD", {"Wl2_NHD": torch.zeros(N, H, D).double()}, "torch.float64"),
        (
            "Wl2_NHD",
            {"Wl1_ND2H": torch.zeros(N, D, 2 * H), "Wl2_NHD": torch.zeros(N, H, D).bfloat16()},
            "torch.bfloat16",
        ),
        (
            "Wl2_NHD",
            {
                "Wl1_ND2H": torch.zeros(N, D, 2 * H),
                "Wl2_NHD": torch.zeros(N, H, D, device="meta"),
            },
            "on meta",
        ),
        ("Wl1_ND2H", {"Wl1_ND2H": torch.zeros(N, D, 2 * H), "device": "meta"}, "expected meta"),
        ("Wl1_ND2H", {"Wl1_ND2H": [1.0]}, "list"),
    ],
)
def test_weights_that_cannot_be_used_in_place_are_refused(name, weights, message):
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        MoMoE(D, H, N, K, **weights)


def test_router_weight_that_cannot_be_used_in_place_is_refused():
    with pytest.raises(ValueError, match="Wg_DN.*not contiguous"):
        TopKRouter(D, N, K, KS, Wg_DN=torch.zeros(N, D).T)
    with pytest.raises(ValueError, match="Wg_DN.*meta"):
        MoE(D, H, N, K, KS, Wl1_ND2H=torch.zeros(N, D, 2 * H), Wg_DN=torch.zeros(D, N, device="meta"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"embedding_dim": 0}, "embedding_dim is 0"),
        ({"intermediate_dim": -1}, "intermediate_dim is -1"),
        ({"num_experts": 2.0}, "num_experts is 2.0"),
        ({"num_experts": True}, "num_experts is True"),
        ({"num_chosen_experts": 0}, "num_chosen_experts is 0"),
        ({"num_chosen_experts": N + 1}, "num_chosen_experts is 7.*num_experts, 6"),
        ({"num_shared_experts": -1}, "num_shared_experts is -1"),
        ({"num_shared_experts": K + 1}, "num_shared_experts is 4.*num_chosen_experts, 3"),
        ({"save_percent": 101}, "save_percent.*101"),
        ({"save_percent": "50"}, "save_percent.*50"),
        ({"save_percent": float("nan")}, "save_percent.*nan"),
        ({"bias_update_rate": -1e-4}, "bias_update_rate is -0.0001"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate is nan"),
        ({"bias_update_rate": "x"}, "bias_update_rate is 'x'"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    arguments = dict(
        embedding_dim=D,
        intermediate_dim=H,
        num_experts=N,
        num_chosen_experts=K,
        num_shared_experts=KS,
    )
    with pytest.raises(ValueError, match=message):
        MoE(**(arguments | change))


@pytest.mark.parametrize(
    "x, mask, s, message",
    [
        (torch.ones(4, D + 1), torch.ones(N, 4).int(), torch.ones(N, 4), "x_BSD has shape"),
        (torch.ones(4, D).int(), torch.ones(N, 4).int(), torch.ones(N, 4), "x_BSD has dtype"),
        (torch.ones(4, D), torch.ones(4, N).int(), torch.ones(N, 4), "mask_NM has shape"),
        (torch.ones(4, D), torch.ones(N, 4), torch.ones(N, 4), "mask_NM has dtype"),
        (torch.ones(4, D), torch.ones(N, 4).int(), torch.ones(N, 5), "s_NM has shape"),
        (torch.ones(4, D), torch.ones(N, 4).int(), torch.ones(N, 4).int(), "s_NM has dtype"),
        (torch.ones(4, D, device="meta"), torch.ones(N, 4).int(), torch.ones(N, 4), "x_BSD is on"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, mask, s, message):
    with pytest.raises(ValueError, match=message):
        make_experts()(x, mask, s)


def test_float32_weights_compute_in_the_dtype_of_x():
    momoe = make_experts()
    mask_NM, s_NM = MASKS["regular"](8), torch.rand(N, 8)
    x_MD = torch.randn(8, D)
    y_bf16, _ = momoe(x_MD.bfloat16(), mask_NM, s_NM)
    assert y_bf16.dtype == torch.bfloat16
    y_bf16.float().sum().backward()
    assert momoe.Wl1_ND2H.grad.dtype == torch.float32

    narrow = copy.deepcopy(momoe).to(torch.bfloat16)
    assert torch.equal(y_bf16, narrow(x_MD.bfloat16(), mask_NM, s_NM)[0])
    # float32 tokens on bfloat16 weights: the work is done in bfloat16, the dtype comes back
    y, _ = narrow(x_MD, mask_NM, s_NM)
    assert y.dtype == torch.float32 and torch.equal(y, y_bf16.float())

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_autocast, _ = momoe(x_MD, mask_NM, s_NM)
    assert y_autocast.dtype == torch.bfloat16 and torch.equal(y_autocast, y_bf16)
    with pytest.raises(ValueError, match="x_BSD has dtype torch.float16"):
        narrow(x_MD.half(), mask_NM, s_NM)


def reference_route(x_MD, wg, biases_N):
    """The formula of the paper: softmax over all routed experts, then divide by the chosen sum."""
    logits = x_MD.double() @ wg.double()
    routed, shared = logits[:, : N - KS].softmax(1), logits[:, N - KS :].softmax(1)
    ids = (routed + biases_N[: N - KS]).topk(K - KS).indices.sort(1).values
    chosen = routed.gather(1, ids)
    ids = torch.cat([ids, torch.arange(N - KS, N).expand(len(ids), KS)], 1)
    return ids, torch.cat([chosen / chosen.sum(1, keepdim=True), shared], 1)


def test_router_scores_and_gradients():
    wg = torch.randn(D, N)
    router = TopKRouter(D, N, K, KS, Wg_DN=wg)
    biases_N = torch.randn(N) * 0.2
    x_MD = torch.randn(20, D, requires_grad=True)
    ids_TK, scores_TK = router.route(x_MD, biases_N)
    ids, scores = reference_route(x_MD, router.Wg_DN, biases_N)
    assert torch.equal(ids_TK, ids) and scores_TK.dtype == torch.float32
    torch.testing.assert_close(scores_TK, scores.float())
    weight_TK = torch.randn(20, K)
    leaves = (x_MD, router.Wg_DN)
    got = torch.autograd.grad((scores_TK * weight_TK).sum(), leaves)
    expected = torch.autograd.grad((scores * weight_TK).sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared, chosen", [(0, 1), (0, N), (1, 3), (2, 2), (3, N)])
def test_shared_experts_are_the_last_and_chosen_by_every_token(shared, chosen):
    router = TopKRouter(D, N, chosen, shared, device="cpu")
    x_BSD, mask_NM, s_NM = router(torch.randn(2, 5, D), torch.zeros(N))
    assert x_BSD.shape == (2, 5, D) and mask_NM.shape == s_NM.shape == (N, 10)
    assert mask_NM.dtype == torch.int32
    assert (mask_NM.sum(0) == chosen).all() and (mask_NM[N - shared :] == 1).all()
    assert (s_NM[mask_NM == 0] == 0).all()
    if chosen > shared + 1:  # of one routed expert the score is its probability
        torch.testing.assert_close(s_NM[: N - shared].sum(0), torch.ones(10))
    if shared:
        torch.testing.assert_close(s_NM[N - shared :].sum(0), torch.ones(10))


@pytest.mark.parametrize("chosen, shared", [(1, 0), (2, 1), (3, 2)])
def test_router_of_one_routed_expert_learns(chosen, shared):
    """Of one expert the score is its probability: divided by itself it would be 1, and its gradient 0."""
    moe = MoE(D, H, 6, chosen, shared, backend="torch", device="cpu")
    x_BSD = torch.randn(2, 8, D)
    moe(x_BSD).square().sum().backward()
    assert (moe.router.Wg_DN.grad[:, : 6 - shared].abs().sum(dim=0) > 0).all()
    ids_TK, scores_TK = moe.router.route(x_BSD, moe.biases_N)
    p_TE = (x_BSD.reshape(-1, D) @ moe.router.Wg_DN)[:, : 6 - shared].softmax(dim=1)
    torch.testing.assert_close(scores_TK[:, 0], p_TE.amax(dim=1))
    assert torch.equal(ids_TK[:, 0], p_TE.argmax(dim=1))


def test_no_expert_is_shared_unless_it_is_said():
    assert MoE(D, H, 6, 2, device="cpu").Ks == 0
    assert TopKRouter(D, 6, 2, device="cpu").Ks == 0


def test_mask_and_list_say_the_same():
    moe = make_moe()
    x_BSD = torch.randn(2, 8, D)
    y_list = moe(x_BSD)
    _, mask_NM, s_NM = moe.router(x_BSD, moe.biases_N)
    y_mask, counts_N = moe.momoe(x_BSD, mask_NM, s_NM)
    assert torch.equal(y_list, y_mask) and torch.equal(counts_N, moe.counts_N)


def test_bias_is_for_the_choice_only():
    router = TopKRouter(D, N, K, KS, device="cpu", Wg_DN=torch.randn(D, N))
    x_MD = torch.randn(30, D)
    shift = router.route(x_MD, torch.full((N,), 3.0))
    plain = router.route(x_MD, torch.zeros(N))
    assert all(torch.equal(a, b) for a, b in zip(shift, plain, strict=True))
    biases_N = torch.zeros(N)
    biases_N[2] = 10.0
    with pytest.raises(ValueError, match="biases_N is on meta, the weights are on cpu"):
        router.route(x_MD, biases_N.to("meta"))
    ids_TK, scores_TK = router.route(x_MD, biases_N)
    assert (ids_TK == 2).any(dim=1).all()
    logits = x_MD @ router.Wg_DN
    expected = logits.gather(1, ids_TK[:, : K - KS]).softmax(1)
    torch.testing.assert_close(scores_TK[:, : K - KS], expected)


def test_equal_logits_choose_the_lowest_ids():
    router = TopKRouter(D, 40, 5, 1, Wg_DN=torch.zeros(D, 40))
    ids_TK, scores_TK = router.route(torch.randn(300, D), torch.zeros(40))
    assert (ids_TK == torch.tensor([0, 1, 2, 3, 39])).all()
    torch.testing.assert_close(scores_TK[:, :4], torch.full((300, 4), 0.25))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_logits_stay_with_their_token(value):
    moe = make_moe(Wg_DN=torch.randn(D, N))
    x_MD = torch.randn(9, D)
    clean = moe(x_MD)
    moe.counts_N.zero_()
    x_MD[4, 3] = value
    y = moe(x_MD)
    ids_TK, scores_TK = moe.router.route(x_MD, moe.biases_N)
    assert all(len(set(row)) == K for row in ids_TK.tolist())
    assert moe.counts_N.sum() == 9 * K
    others = torch.arange(9) != 4
    torch.testing.assert_close(y[others], clean[others])
    if value != value:
        assert y[4].isnan().all() and scores_TK[4].isnan().all()
    else:
        assert scores_TK.isfinite().all(), "an infinite logit has a clear winner"


def test_scores_stay_finite_when_the_bias_forces_hopeless_experts():
    # probabilities of the forced experts underflow to zero, so that their sum does too
    wg = torch.zeros(D, N)
    wg[0, 0] = 1.0
    router = TopKRouter(D, N, 2, 0, Wg_DN=wg)
    x_MD = torch.zeros(4, D)
    x_MD[:, 0] = 500.0
    biases_N = torch.tensor([0, 0, 0, 0, 5.0, 5.0])
    ids_TK, scores_TK = router.route(x_MD, biases_N)
    assert (ids_TK == torch.tensor([4, 5])).all()
    torch.testing.assert_close(scores_TK, torch.full((4, 2), 0.5))


def test_forward_changes_no_bias_and_a_step_does_once():
    moe = make_moe(Wg_DN=torch.randn(D, N))
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.0)
    handle = moe.register_bias_update(optimizer)
    moe(torch.randn(4, 8, D)).sum().backward()
    assert (moe.biases_N == 0).all()
    counts = moe.counts_N.double()
    optimizer.step()
    mean = counts[: N - KS].mean()
    expected = 0.1 * torch.sign(mean - counts[: N - KS]).float()
    assert torch.equal(moe.biases_N[: N - KS], expected) and expected.any()
    assert (moe.biases_N[N - KS :] == 0).all() and (moe.counts_N == 0).all()
    optimizer.step()
    assert torch.equal(moe.biases_N[: N - KS], expected), "no tokens, no update"
    handle.remove()
    moe(torch.randn(4, 8, D))
    optimizer.step()
    assert torch.equal(moe.biases_N[: N - KS], expected)


def test_accumulation_over_microbatches_is_one_batch():
    x_BSD = torch.randn(8, 4, D)
    together, apart = make_moe(Wg_DN=torch.randn(D, N)), None
    apart = copy.deepcopy(together)
    together(x_BSD)
    for microbatch in x_BSD:
        apart(microbatch[None])
    assert torch.equal(together.counts_N, apart.counts_N) and together.counts_N.sum() == 32 * K
    together.update_biases()
    apart.update_biases()
    assert torch.equal(together.biases_N, apart.biases_N) and together.biases_N.any()


def test_replicas_agree_on_the_summed_counts(monkeypatch):
    """Two replicas, each of which alone would move its biases elsewhere."""
    one, two = make_moe(), make_moe()
    one.counts_N.copy_(torch.tensor([9, 0, 1, 5, 5, 20]))
    two.counts_N.copy_(torch.tensor([0, 8, 1, 5, 6, 20]))
    total_N = one.counts_N + two.counts_N
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda counts_N, group: counts_N.copy_(total_N))
    for moe in (one, two):
        moe.update_biases(process_group=object())
    # 9 8 2 10 11 around a mean of 8; the last expert is shared
    expected = torch.tensor([-0.1, 0.0, 0.1, -0.1, -0.1, 0.0])
    assert torch.equal(one.biases_N, expected) and torch.equal(two.biases_N, expected)


def test_evaluation_does_not_count():
    moe = make_moe()
    with torch.no_grad():
        moe(torch.randn(1, 8, D))
    moe.eval()
    moe(torch.randn(1, 8, D))
    assert (moe.counts_N == 0).all()


def test_recomputation_does_not_count():
    moe = make_moe()
    x_BSD = torch.randn(1, 8, D, requires_grad=True)
    moe(x_BSD).square().sum().backward()
    plain = moe.counts_N.clone(), x_BSD.grad.clone()
    moe.counts_N.zero_()
    x_BSD.grad = None
    checkpoint(moe, x_BSD, use_reentrant=False).square().sum().backward()
    assert torch.equal(moe.counts_N, plain[0]) and torch.equal(x_BSD.grad, plain[1])
    assert moe.counts_N.sum() == 8 * K


def _plain(function, x):
    return function(x)


def _reentrant(function, x):
    return checkpoint(function, x, use_reentrant=True)


def _saved(function, x):
    return checkpoint(function, x, use_reentrant=False)


@pytest.mark.parametrize("outer", [_plain, _reentrant, _saved])
@pytest.mark.parametrize("inner", [_plain, _reentrant, _saved])
@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_every_kind_of_checkpointing_counts_once(outer, inner, rule):
    """A checkpoint with use_reentrant=True has no gradients in its first forward, and none in an evaluation."""
    moe = make_moe(bias_update_rule=rule)
    x_BSD = torch.randn(1, 8, D, requires_grad=True)
    outer(lambda x: inner(moe, x), x_BSD).square().sum().backward()
    assert moe.counts_N.sum() == 8 * K
    if rule == "quantile":
        margins = moe.margins_EB.sum()
        moe.margins_EB.zero_()
        moe(x_BSD)
        assert margins == moe.margins_EB.sum() > 0
    moe.eval()
    moe.counts_N.zero_()
    outer(lambda x: inner(moe, x), x_BSD).square().sum().backward()
    assert not moe.counts_N.any()


def test_checkpointing_of_a_sequence_counts_once():
    layers = torch.nn.Sequential(make_moe(), make_moe())
    x_BSD = torch.randn(1, 8, D, requires_grad=True)
    checkpoint_sequential(layers, 2, x_BSD, use_reentrant=True).sum().backward()
    assert [int(moe.counts_N.sum()) for moe in layers] == [8 * K, 8 * K]


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_compiled_in_one_graph_counts_once(where):
    """Checkpointing around a compiled layer, and compiled code that checkpoints a layer."""
    moe = make_moe()
    x_BSD = torch.randn(2, 8, D, requires_grad=True)
    expected = moe(x_BSD)
    expected.sum().backward()
    counts_N, x_grad = moe.counts_N.clone(), x_BSD.grad
    moe.counts_N.zero_()
    x_BSD.grad = None
    if where == "outside":
        compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
        y_BSD = checkpoint(compiled, x_BSD, use_reentrant=False)
    else:
        compiled = torch.compile(lambda x: checkpoint(moe, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
        y_BSD = compiled(x_BSD)
    y_BSD.sum().backward()
    torch.testing.assert_close(y_BSD, expected)
    torch.testing.assert_close(x_BSD.grad, x_grad)
    assert torch.equal(moe.counts_N, counts_N)


def test_biases_stay_float32_and_are_saved():
    moe = make_moe(bias_update_rate=1e-4, Wg_DN=torch.randn(D, N))
    moe(torch.randn(2, 8, D))
    moe.update_biases()
    before = moe.biases_N.clone()
    for cast in (lambda m: m.bfloat16(), lambda m: torch.nn.Sequential(m).half()):
        cast(moe)
        assert moe.biases_N.dtype == torch.float32 and torch.equal(moe.biases_N, before)
        assert moe.counts_N.dtype == torch.int64
    moe.to(torch.bfloat16)
    assert moe(torch.randn(2, 8, D, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert set(moe.state_dict()) == {
        "biases_N",
        "router.Wg_DN",
        "momoe.Wl1_ND2H",
        "momoe.Wl2_NHD",
    }
    other = make_moe()
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other.biases_N, before)
    assert make_moe(device="meta").to_empty(device="cpu").biases_N.dtype == torch.float32


def test_router_is_float32_under_autocast():
    router = TopKRouter(D, N, K, KS, Wg_DN=torch.randn(D, N))
    x_MD = torch.randn(6, D)
    plain = router.route(x_MD, torch.zeros(N))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router.route(x_MD, torch.zeros(N))[1], plain)


def test_layers_do_not_import_torchtitan():
    code = "import sys, momoe_titan.moe.layers\nassert not [m for m in sys.modules if m.startswith('torchtitan')]\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def load_seed_curve():
    path = Path(__file__).parents[2] / "benchmarks" / "seed_curve.py"
    spec = importlib.util.spec_from_file_location("seed_curve", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_falls_steadily(losses):
    # mean square of normal values, and the experts' first output is close to zero
    assert losses[0] == pytest.approx(1.0, abs=0.05)
    tenths = [sum(losses[i : i + len(losses) // 10]) for i in range(0, len(losses), len(losses) // 10)]
    assert all(later < earlier for earlier, later in itertools.pairwise(tenths)), losses


def test_reproducing_the_input_small():
    losses = load_seed_curve().train(
        batch=2,
        seq_len=64,
        dim=32,
        hidden=32,
        experts=8,
        chosen=3,
        shared=1,
        steps=100,
        lr=1e-2,
        device="cpu",
    )
    assert_falls_steadily(losses)
    assert losses[-1] < 0.5


@pytest.mark.gpu
def test_reproducing_the_input_full_size(capsys):
    losses = load_seed_curve().train(device="cuda")
    with capsys.disabled():
        print("\nloss every 10 steps:", [round(v, 4) for v in losses[::10]], losses[-1])
    assert_falls_steadily(losses)


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_a_layer_from_the_meta_device_is_usable_after_a_reset(rule):
    """The weights have the scale of a new layer's, biases and counts start at 0, and the layer trains."""
    moe = make_moe(device="meta", bias_update_rule=rule).to_empty(device="cpu")
    for tensor in (*moe.parameters(), *moe.buffers()):
        tensor.data.fill_(7)
    moe.reset_parameters()
    assert not any(buffer.any() for buffer in moe.buffers())
    for weight in moe.parameters():
        assert weight.std().item() * D == pytest.approx(1, abs=0.2) and abs(weight.mean()) < 0.02
    x = torch.randn(40, D)
    moe(x).square().sum().backward()
    assert moe.counts_N.sum() == 40 * K and all(w.grad.any() for w in moe.parameters())


def test_a_reset_leaves_given_weights_in_their_place():
    experts = make_experts()
    place, before = experts.Wl1_ND2H.data_ptr(), experts.Wl1_ND2H.detach().clone()
    experts.reset_parameters()
    assert experts.Wl1_ND2H.data_ptr() == place and not torch.equal(experts.Wl1_ND2H, before)


def test_a_state_dict_of_the_first_release_is_loaded():
    """Its layer has the same names. The biases of shared experts were -inf there, and are read here nowhere."""
    ours = make_moe()
    first = {
        "router.Wg_DN": torch.randn(D, N) / D,
        "momoe.Wl1_ND2H": torch.randn(N, D, 2 * H) / D,
        "momoe.Wl2_NHD": torch.randn(N, H, D) / D,
        "biases_N": torch.cat([torch.randn(N - KS) / 10, torch.full((KS,), float("-inf"))]),
    }
    ours.load_state_dict(first)
    x = torch.randn(40, D)
    y = ours(x)
    _, mask_NM, s_NM = ours.router(x, first["biases_N"])
    expected = dense_loop(x, mask_NM, s_NM, first["momoe.Wl1_ND2H"], first["momoe.Wl2_NHD"])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-6)
    ours.update_biases()
    assert ours.biases_N[: N - KS].isfinite().all() and ours(x).isfinite().all()


@pytest.mark.parametrize("transform", ["grad of x", "grad of weights", "vmap", "jvp", "jacrev"])
def test_torch_func_is_refused_by_name(transform):
    moe = make_moe()
    x, weights = torch.randn(3, 4, D), dict(moe.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(moe, weights, (x,)).square().mean()

    def call():
        if transform == "grad of x":
            return torch.func.grad(loss, argnums=1)(weights, x)
        if transform == "grad of weights":
            return torch.func.grad(loss)(weights, x)
        if transform == "vmap":
            return torch.func.vmap(moe)(x)
        if transform == "jvp":
            return torch.func.jvp(moe, (x,), (x,))
        return torch.func.jacrev(moe)(x)

    with pytest.raises(RuntimeError, match="momoe_titan's layers do not work under torch.func"):
        call()
    # without a transform, functional_call works
    assert loss(weights, x) == moe(x).square().mean()
