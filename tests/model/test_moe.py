"""The MoE layers against plain torch, and the state that load balancing keeps in them."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchtitan.models.moe import MoE, MoEArgs

from momoe_titan.model.moe import MomoeMoE
from momoe_titan.model.router import MomoeRouter
from momoe_titan.model.stock_moe import StockMoE
from momoe_titan.moe.layers import TopKRouter

D, FFN, E, K = 12, 7, 5, 2
ARGS = dict(
    num_experts=E,
    top_k=K,
    num_shared_experts=1,
    route_norm=True,
    score_before_experts=False,
    use_grouped_mm=False,  # the tensors are on the CPU, also where there is a GPU
)


def layer(cls=MomoeMoE, moe=None, **kwargs):
    torch.manual_seed(0)
    built = cls(
        MoEArgs(**{**ARGS, **(moe or {})}), D, FFN, **{"load_balance_rate": 0.01, "load_balance_rule": "sign", **kwargs}
    )
    with torch.no_grad():
        built.init_weights(0.3, torch.device("cpu"))
        # far from ties and from a softmax that is flat
        built.router.gate.weight.mul_(3)
    return built


def tokens(*shape, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def dense_forward(moe, x_BLD, bias_E=None):
    """Every expert on every token, weighted by a score that is zero where it was not chosen."""
    router, x_TD = moe.router, x_BLD.reshape(-1, D)
    logits_TE = x_TD @ router.gate.weight.t()
    probs_TE = logits_TE.sigmoid() if router.score_func == "sigmoid" else logits_TE.softmax(-1)
    choice_TE = probs_TE.detach() + (0 if bias_E is None else bias_E)
    mask_TE = torch.zeros_like(probs_TE).scatter(1, choice_TE.topk(router.top_k).indices, 1)
    scores_TE = probs_TE * mask_TE
    if router.route_norm:
        scores_TE = scores_TE / scores_TE.sum(1, keepdim=True)
    scores_TE = scores_TE * router.route_scale
    w1, w2 = moe.experts.w1.flatten(2), moe.experts.w2
    out_TD = torch.zeros_like(x_TD)
    for e in range(w2.shape[0]):
        up, gate = (x_TD @ w1[e]).split(w2.shape[1], dim=1)
        out_TD = out_TD + scores_TE[:, e : e + 1] * ((up * F.silu(gate)) @ w2[e])
    if moe.shared_experts is not None:
        s = moe.shared_experts
        hidden = F.silu(x_TD @ s.w1.weight.t()) * (x_TD @ s.w3.weight.t())
        out_TD = out_TD + hidden @ s.w2.weight.t()
    return out_TD.view_as(x_BLD), mask_TE.sum(0).long()


@pytest.mark.parametrize(
    "moe",
    [
        {"score_func": "sigmoid"},
        {"score_func": "softmax", "route_scale": 2.5},
        {"score_func": "softmax", "route_norm": False, "num_shared_experts": 0},
        {"score_func": "sigmoid", "num_shared_experts": 2, "top_k": 1},
        {"score_func": "sigmoid", "top_k": E},
    ],
    ids=str,
)
def test_layer_is_the_dense_computation(moe):
    ours = layer(moe=moe, save_percent=37)
    ours.expert_bias.copy_(torch.linspace(-0.3, 0.3, E))
    x = tokens(3, 11).requires_grad_()
    dout = tokens(3, 11, seed=2)
    out, counts = dense_forward(ours, x, ours.expert_bias)
    inputs = [x, *ours.parameters()]
    expected = torch.autograd.grad(out, inputs, dout)

    actual = ours(x)
    torch.testing.assert_close(actual, out, rtol=1e-5, atol=1e-5)
    for grad, want in zip(torch.autograd.grad(actual, inputs, dout), expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.tokens_per_expert, counts)


@pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
def test_stock_layer_has_the_same_weights_and_results(score_func):
    ours, stock = (layer(cls, {"score_func": score_func}) for cls in (MomoeMoE, StockMoE))
    assert type(stock.experts).__module__ == "torchtitan.models.moe.moe"
    ffn_first = torch.cat([stock.experts.w3, stock.experts.w1], dim=1).transpose(1, 2)
    assert torch.equal(ours.experts.w1.flatten(2), ffn_first)
    assert torch.equal(ours.experts.w2, stock.experts.w2.transpose(1, 2))

    x_ours, x_stock = (tokens(2, 9).requires_grad_() for _ in range(2))
    dout = tokens(2, 9, seed=2)
    out, want = ours(x_ours), stock(x_stock)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    out.backward(dout)
    want.backward(dout)
    torch.testing.assert_close(x_ours.grad, x_stock.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.router.gate.weight.grad, stock.router.gate.weight.grad)
    assert ours.tokens_per_expert.sum() == 18 * K
    assert torch.equal(ours.tokens_per_expert, stock.tokens_per_expert)


def test_torchtitan_recognises_the_layer():
    ours = layer()
    assert isinstance(ours, MoE)
    names = {name.rpartition(".")[0] for name, _ in ours.named_parameters()}
    shared = {f"shared_experts.w{i}" for i in (1, 2, 3)}
    assert names == {"experts", "router.gate"} | shared


def router(**fields):
    torch.manual_seed(0)
    return MomoeRouter(D, MoEArgs(**{**ARGS, **fields}))


class TestRouter:
    def test_multiplies_in_float32_under_autocast_and_in_bfloat16(self):
        r = router(score_func="sigmoid", route_norm=False)
        x = tokens(64)
        want = (x @ r.gate.weight.t()).sigmoid()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, ids = r(x)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, want.gather(1, ids))

        x, r = x.bfloat16(), r.bfloat16()
        want = (x.float() @ r.gate.weight.float().t()).sigmoid()
        scores, ids = r(x)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, want.gather(1, ids))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("gate_bias", [False, True])
    def test_gradients_without_float32_copies(self, dtype, gate_bias):
        r, x = router(gate_bias=gate_bias).to(dtype), tokens(64).to(dtype).requires_grad_()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            logits = r.gate(x)
        assert {t.dtype for t in kept} == {dtype} and {tuple(t.shape) for t in kept} == {
            (64, D),
            (E, D),
        }
        dout = torch.randn(64, E)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            grads = torch.autograd.grad(logits, [x, *r.gate.parameters()], dout)
        want = [dout @ r.gate.weight.float(), dout.t() @ x.float(), *([dout.sum(0)] if gate_bias else [])]
        for grad, exact in zip(grads, want, strict=True):
            assert grad.dtype == dtype
            torch.testing.assert_close(grad, exact.to(dtype))

    def test_bias_moves_the_choice_and_not_the_scores(self):
        r, x = router(score_func="sigmoid", route_norm=False), tokens(64)
        bias = torch.tensor([0.0, 0.0, 2.0, 0.0, -2.0])
        scores, ids = r(x, bias)
        assert (ids[:, 0] == 2).all() and not (ids == 4).any()
        assert torch.equal(scores, (x @ r.gate.weight.t()).sigmoid().gather(1, ids))

    def test_lowest_id_wins_among_equals(self):
        r = router(top_k=3)
        with torch.no_grad():
            r.gate.weight.zero_()
        # 33 tokens: more than one vector register of a sort
        assert torch.equal(r(tokens(33))[1], torch.tensor([0, 1, 2]).expand(33, 3))
        _, ids = r(tokens(33), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
        assert torch.equal(ids, torch.tensor([1, 3, 0]).expand(33, 3))

    @pytest.mark.parametrize("score_func", ["sigmoid", "softmax"])
    def test_infinite_logits(self, score_func):
        r = router(score_func=score_func)
        with torch.no_grad():
            r.gate.weight.zero_()[:, 0] = torch.tensor([0.0, 1.0, -1.0, 1.0, 0.0])
        x = torch.zeros(3, D)
        x[0, 0], x[1, 0] = 3e38, -3e38  # products overflow once the weight is scaled up
        with torch.no_grad():
            r.gate.weight.mul_(1e3)
        scores, ids = r(x)
        assert ids.tolist() == [[1, 3], [2, 0], [0, 1]]
        want = [[0.5, 0.5], [2 / 3, 1 / 3] if score_func == "sigmoid" else [1, 0], [0.5, 0.5]]
        torch.testing.assert_close(scores, torch.tensor(want))

    def test_chooses_and_scores_as_the_layer_without_torchtitan(self):
        r, x, bias = router(score_func="softmax", route_norm=True), tokens(64), torch.linspace(-0.1, 0.1, E)
        ids, scores = TopKRouter(D, E, K, 0, Wg_DN=r.gate.weight.t().contiguous()).route(x, bias)
        titan_scores, titan_ids = r(x, bias)
        order = titan_ids.argsort(dim=1)
        assert torch.equal(ids, titan_ids.gather(1, order))
        torch.testing.assert_close(scores, titan_scores.gather(1, order))

    def test_round_robin_debug_switch(self):
        r = router(_debug_force_load_balance=True)
        scores, ids = r(tokens(5))
        assert torch.bincount(ids.flatten(), minlength=E).tolist() == [2] * E
        torch.testing.assert_close(scores.sum(1), torch.ones(5))

    def test_gate_bias_starts_at_zero(self):
        r = router(gate_bias=True)
        with torch.no_grad():
            r.init_weights(0.1)
        assert torch.equal(r.gate.bias, torch.zeros(E))


@pytest.mark.parametrize("cls", [MomoeMoE, StockMoE])
def test_nan_stays_in_its_token(cls):
    moe, x = layer(cls), tokens(1, 9)
    want = moe(x)
    moe.tokens_per_expert.zero_()
    bad = x.clone()
    bad[0, 4, 3] = float("nan")
    out = moe(bad)
    assert out[0, 4].isnan().all()
    others = [t for t in range(9) if t != 4]
    torch.testing.assert_close(out[0, others], want[0, others])
    assert moe.tokens_per_expert.sum() == 9 * K


@pytest.mark.parametrize("percent", [0, 50, 100])
def test_unchosen_expert_gets_zero_gradients(percent):
    moe = layer(save_percent=percent)
    moe.expert_bias[3] = -10
    moe(tokens(2, 9)).sum().backward()
    for weight in (moe.experts.w1, moe.experts.w2):
        zero = [not grad.any() for grad in weight.grad]
        assert zero == [False, False, False, True, False]


def test_no_tokens():
    moe = layer(save_percent=50)
    x = tokens(0, 4).requires_grad_()
    out = moe(x)
    out.sum().backward()
    assert out.shape == (0, 4, D) and x.grad.shape == x.shape
    assert not moe.experts.w1.grad.any() and not moe.tokens_per_expert.any()


@pytest.mark.parametrize("cls", [MomoeMoE, StockMoE])
class TestCounts:
    def test_accumulate_in_training_only(self, cls):
        moe, x = layer(cls), tokens(2, 9)
        moe(x)
        once = moe.tokens_per_expert.clone()
        assert once.sum() == 18 * K and once.dtype == torch.int64
        moe(x)
        assert torch.equal(moe.tokens_per_expert, 2 * once)
        with torch.no_grad():
            moe(x)
        moe.eval()
        moe(x)
        assert torch.equal(moe.tokens_per_expert, 2 * once)

    def test_recomputation_does_not_count(self, cls):
        moe, x = layer(cls), tokens(2, 9).requires_grad_()
        checkpoint(moe, x, use_reentrant=False).sum().backward()
        assert moe.tokens_per_expert.sum() == 18 * K

    def test_are_cleared_in_place_by_no_one_else(self, cls):
        moe = layer(cls)
        buffers = dict(moe.named_buffers())
        moe(tokens(2, 9)).sum().backward()
        assert moe.tokens_per_expert is buffers["tokens_per_expert"]


@pytest.mark.parametrize("around", ["nothing", "checkpoint", "checkpoint inside"])
def test_compiles_without_graph_breaks(around):
    moe, x = layer(save_percent=50), tokens(2, 9)
    eager = copy.deepcopy(moe)
    want = eager(x)
    want.sum().backward()

    torch._dynamo.reset()
    if around == "checkpoint inside":
        compiled = torch.compile(
            lambda x: checkpoint(moe, x, use_reentrant=False),
            fullgraph=True,
            backend="aot_eager",
        )
    else:
        compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    out = checkpoint(compiled, x.requires_grad_(), use_reentrant=False) if around == "checkpoint" else compiled(x)
    out.sum().backward()
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(moe.experts.w1.grad, eager.experts.w1.grad)
    assert torch.equal(moe.tokens_per_expert, eager.tokens_per_expert)


def test_save_percent_decides_what_is_kept():
    kept = {}
    outs = {}

    def record(shapes, t):
        shapes.append(tuple(t.shape))
        return t

    for percent in (0, 37, 100):
        moe, shapes = layer(save_percent=percent), []
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(record, shapes), lambda t: t):
            out = moe(tokens(2, 9))
        out.sum().backward()
        kept[percent] = {rows for rows, *cols in shapes if cols == [2 * FFN]}
        outs[percent] = (out, moe.experts.w1.grad)
    rows = 18 * K
    assert kept == {0: {0}, 37: {rows * 37 // 100}, 100: {rows}}
    for percent in (37, 100):
        for value, want in zip(outs[percent], outs[0], strict=True):
            torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-6)


def test_check_ids_reaches_the_op(monkeypatch):
    moe = layer(check_ids=True)
    bad = torch.full((18, K), E)
    monkeypatch.setattr(moe.router, "forward", lambda *args: (torch.ones(18, K), bad))
    with pytest.raises(ValueError, match="ids"):
        moe(tokens(2, 9))


@pytest.mark.parametrize("cls", [MomoeMoE, StockMoE])
class TestBalanceState:
    # 1 + 2**-20 is not a bfloat16, so that a cast there and back shows.
    VALUE = 1 + 2**-20

    def test_bias_stays_float32(self, cls):
        model = torch.nn.Sequential(layer(cls))
        model[0].expert_bias.fill_(self.VALUE)
        for cast in (model.bfloat16, model.half, model.double, lambda: model.to(torch.bfloat16)):
            cast()
            assert model[0].expert_bias.dtype == torch.float32
            assert (model[0].expert_bias == self.VALUE).all()
            assert model[0].experts.w2.dtype != torch.float32
            assert model[0].tokens_per_expert.dtype == torch.int64
        model.bfloat16()
        model(tokens(2, 9).bfloat16())

    def test_meta_init_zeroes_buffers(self, cls):
        with torch.device("meta"):
            moe = layer(cls)
        moe.to_empty(device="cpu")
        moe.expert_bias.fill_(float("nan"))
        moe.tokens_per_expert.fill_(-1)
        with torch.no_grad():
            moe.init_weights(0.1, torch.device("cpu"))
        state = moe.state_dict()
        for name, dtype in (("expert_bias", torch.float32), ("tokens_per_expert", torch.int64)):
            assert torch.equal(state[name], torch.zeros(E, dtype=dtype))
        assert all(p.isfinite().all() for p in moe.parameters())

    def test_state_dict_restores_bias_and_counts(self, cls):
        moe = layer(cls)
        moe(tokens(2, 9))
        moe.expert_bias.fill_(self.VALUE)
        fresh = layer(cls)
        fresh.load_state_dict(moe.state_dict())
        assert torch.equal(fresh.expert_bias, moe.expert_bias)
        assert torch.equal(fresh.tokens_per_expert, moe.tokens_per_expert)
        assert fresh.tokens_per_expert.any()

    def test_missing_bias_starts_at_zero_with_a_warning(self, cls, caplog):
        model = torch.nn.ModuleDict({"moe": layer(cls)})
        state = model.state_dict()
        del state["moe.expert_bias"]
        model.moe.expert_bias.fill_(1)
        model.load_state_dict(state)  # strict
        assert not model.moe.expert_bias.any()
        assert "moe.expert_bias" in caplog.text and "ZERO" in caplog.text

    def test_unrelated_state_dict_leaves_bias_alone(self, cls, caplog):
        model = torch.nn.ModuleDict({"moe": layer(cls), "head": torch.nn.Linear(2, 2)})
        model.moe.expert_bias.fill_(1)
        model.load_state_dict({"head.bias": torch.ones(2)}, strict=False)
        assert (model.moe.expert_bias == 1).all()
        assert "expert_bias" not in caplog.text
