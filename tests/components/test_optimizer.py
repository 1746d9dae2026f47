"""Loss-free balancing in the optimizer step, and what must not reach it."""

from types import SimpleNamespace

import pytest
import torch
from torchtitan.models.moe import MoEArgs
from torchtitan.tools.utils import set_default_dtype

from momoe_titan.components.optimizer import ExpertLoadBalancer
from momoe_titan.model import MomoeLlama, MomoeMoE, StockMoE
from momoe_titan.moe.balancing import bias_delta
from tests.support.tiny import (
    assert_same_run,
    batch,
    build,
    loss_of,
    moes,
    optimizers_for,
    tiny_args,
    train,
)


@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
@pytest.mark.parametrize("rule", ["sign", "proportional"])
def test_bias_follows_the_counts_of_each_step(backend, rule):
    model = build(tiny_args(backend=backend, load_balance_rule=rule))
    run = train(model, steps=3)
    assert (run["counts"].sum(-1) == batch(0)[0].numel() * 2).all()
    delta = sum(bias_delta(counts, 0.01, rule) for counts in run["counts"])
    torch.testing.assert_close(run["bias"], delta)
    assert run["bias"].any(dim=1).all()
    assert not any(moe.tokens_per_expert.any() for moe in moes(model))


def test_balancing_evens_out_the_load():
    """Biases that start far off come back, with weights that do not move."""

    def max_violation(rate):
        model = build(tiny_args(load_balance_rate=rate))
        optimizers = optimizers_for(model)
        for moe in moes(model):
            moe.expert_bias.copy_(torch.tensor([0.1, 0.0, 0.0, -0.1, -0.1]))
        for _ in range(150):
            model(batch(0)[0])
            optimizers.step()
        counts_LE = optimizers.load_balancer.counts_LE.double()
        return (counts_LE.amax(dim=1) / counts_LE.mean(dim=1)).max() - 1

    # 1.5: two experts take all, two of five times their share
    assert max_violation(0.0) > 1.4
    assert max_violation(0.001) < 0.3


@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
def test_gradient_accumulation(backend):
    whole, parts = (train(build(tiny_args(backend=backend)), steps=3, microbatches=n) for n in (1, 8))
    assert_same_run(parts, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "torchtitan"])
def test_validation_between_steps(backend):
    def validate(model):
        model.eval()
        with torch.no_grad():
            loss_of(model, *batch(99))
        model.train()
        with torch.no_grad():
            loss_of(model, *batch(98))

    plain, validated = (train(build(tiny_args(backend=backend)), between=f) for f in (None, validate))
    assert_same_run(validated, plain)


@pytest.mark.parametrize("off", [[1], [2], [1, 2]])
def test_layers_with_balancing_off(off):
    run = train(build(tiny_args(load_balance_off_layers=off)), steps=3)
    for row, layer_id in enumerate((1, 2)):
        assert run["bias"][row].any() == (layer_id not in off)
    assert (run["counts"].sum(-1) > 0).all()


def test_rate_zero_leaves_biases():
    run = train(build(tiny_args(load_balance_rate=0.0)), steps=2)
    assert not run["bias"].any() and run["counts"].any()


def state_after(model, optimizers) -> list[torch.Tensor]:
    moments = [
        optimizer.state[p][name]
        for optimizer in optimizers
        for p in model.parameters()
        for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    return [*model.state_dict().values(), *moments]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_step_with_a_non_finite_gradient_is_not_taken(value, device):
    states = []
    for bad_step in (None, 1):
        model = build(tiny_args(backend="torch"), device=device)
        optimizers = optimizers_for(model, implementation="fused")
        for step in (0, 1, 2, 3) if bad_step else (0, 2, 3):
            tokens, labels = (t.to(device) for t in batch(step))
            loss_of(model, tokens, labels).backward()
            if step == bad_step:
                model.layers["2"].moe.experts.w2.grad[-1, -1, -1] = value
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step()
            optimizers.zero_grad()
            assert not any(moe.tokens_per_expert.any() for moe in moes(model))
        states.append(state_after(model, optimizers))
        assert optimizers.non_finite_guard.skipped_steps == (bad_step or 0)
    for got, want in zip(*states, strict=True):
        assert torch.equal(got, want)
    assert any(moe.expert_bias.any() for moe in moes(model))


def test_non_finite_gradient_moves_no_bias_with_any_optimizer():
    model = build(tiny_args())
    optimizers = optimizers_for(model, implementation="for-loop")
    loss_of(model, *batch(0)).backward()
    model.tok_embeddings.weight.grad[0, 0] = float("inf")
    optimizers.step()
    for moe in moes(model):
        assert not moe.expert_bias.any() and not moe.tokens_per_expert.any()
    assert optimizers.load_balancer.counts_LE.any()
    assert optimizers.non_finite_guard.skipped_steps == 0  # nothing but the bias was kept from it


def test_one_process_starts_no_collective(monkeypatch):
    """NCCL would allocate at its first, on a GPU that the first step may have filled."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *a, **k: pytest.fail("a collective"))
    model = build(tiny_args())
    optimizers = optimizers_for(model)
    loss_of(model, *batch(0)).backward()
    model.tok_embeddings.weight.grad[0, 0] = float("inf")
    optimizers.step()
    assert optimizers.found_inf == 1


def test_nan_activations_still_count():
    model = build(tiny_args())
    with torch.no_grad():
        model.tok_embeddings.weight[7].fill_(float("nan"))
    optimizers = optimizers_for(model)
    tokens, labels = batch(0)
    loss_of(model, tokens, labels).backward()
    optimizers.step()
    assert (optimizers.load_balancer.counts_LE.sum(1) == tokens.numel() * 2).all()
    assert all(moe.expert_bias.isfinite().all() for moe in moes(model))


def test_checkpoints_keep_a_reference():
    model = build(tiny_args())
    cached = model.state_dict()
    run = train(model, steps=1)
    assert torch.equal(cached["layers.2.moe.expert_bias"], run["bias"][1])
    assert run["bias"][1].any()


def test_optimizer_steps_in_backward():
    """TorchTitan's optimizer.early_step_in_backward: weights move in the backward, biases in step."""
    model = build(tiny_args())
    optimizers = optimizers_for(model, early_step_in_backward=True)
    loss_of(model, *batch(0)).backward()
    counts = torch.stack([moe.tokens_per_expert for moe in moes(model)])
    optimizers.step()
    bias = torch.stack([moe.expert_bias for moe in moes(model)])
    assert torch.equal(bias, bias_delta(counts, 0.01))


def moe_layer(num_experts=4, cls=MomoeMoE, **kwargs):
    args = MoEArgs(num_experts=num_experts, top_k=1, score_before_experts=False)
    moe = cls(args, 6, 5, **{"load_balance_rate": 0.5, "load_balance_rule": "sign", **kwargs})
    with torch.no_grad():
        moe.init_weights(0.1, torch.device("cpu"))
    return moe


def test_counts_of_the_last_step():
    layers = torch.nn.ModuleList([moe_layer(), moe_layer(cls=StockMoE), moe_layer(load_balance_rate=0.0)])
    balancer = ExpertLoadBalancer([layers])
    assert balancer.counts_LE is None and balancer.average_factor() == 1
    counts = [[3, 5, 0, 0], [2, 2, 2, 2], [8, 0, 0, 0]]
    for layer, counts_E in zip(layers, counts, strict=True):
        layer.tokens_per_expert.copy_(torch.tensor(counts_E))
    balancer()
    assert balancer.counts_LE.tolist() == counts
    balancer()  # a step without tokens
    assert not balancer.counts_LE.any()


def test_what_routers_of_a_tensor_parallel_group_see_is_summed_and_their_counts_are_not(monkeypatch):
    """They count the same tokens."""
    layer = moe_layer(load_balance_rule="quantile")
    balancer = ExpertLoadBalancer([layer], "of data", router_group="of routers")
    layer.tokens_per_expert.fill_(3)
    layer.router.margins_EB.fill_(5)
    times = {"of data": 2, "of routers": 10}
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, group: tensor.mul_(times[group]))
    found = []
    monkeypatch.setattr(balancer._step, "solve", lambda biases, histogram_LEB, *_: found.append(histogram_LEB.clone()))
    balancer()
    assert (balancer.counts_LE == 6).all() and (found[0] == 100).all()


def test_a_decision_on_the_cpu_is_taken_to_the_biases():
    """Weights offloaded to the CPU have their gradients there, and with them found_inf; a kernel cannot read it."""
    balancer = ExpertLoadBalancer([moe_layer(load_balance_rule="quantile").to("meta")])
    seen = []
    for name in ("solve", "follow"):
        setattr(balancer._step, name, lambda *args: seen.append(args[-1].device.type))
    optimizer = SimpleNamespace(found_inf=torch.zeros(()))
    balancer(optimizer)
    balancer.follow_gates(optimizer)
    assert seen == ["meta", "meta"]


def test_no_moe_layer():
    run_model = build(tiny_args(n_dense_layers=3))
    optimizers = optimizers_for(run_model)
    loss_of(run_model, *batch(0)).backward()
    optimizers.step()
    assert optimizers.load_balancer.counts_LE is None


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"num_experts": 6}, "num_experts"),
        ({"load_balance_rate": 0.1}, "load_balance_rate"),
        ({"load_balance_rule": "proportional"}, "load_balance_rule"),
    ],
)
def test_layers_that_do_not_fit_together(other, name):
    with pytest.raises(ValueError, match=name):
        ExpertLoadBalancer([torch.nn.ModuleList([moe_layer(), moe_layer(**other)])])


class TestQuantile:
    """The rule that solves for the bias."""

    def args(self, **fields):
        return tiny_args(load_balance_rule="quantile", **fields)

    def statistics(self, model):
        return [t for moe in moes(model) for t in (moe.router.margins_EB, moe.router.input_sum_C)]

    @pytest.mark.parametrize("backend", ["torch", "torchtitan"])
    def test_solves_collects_and_clears(self, backend):
        model = build(self.args(backend=backend))
        run = train(model, steps=3)
        assert run["bias"].any(dim=1).all()
        torch.testing.assert_close(run["bias"].mean(dim=1), torch.zeros(2), rtol=0, atol=1e-6)
        assert not any(t.any() for t in self.statistics(model))
        assert not any(moe.tokens_per_expert.any() for moe in moes(model))

    def test_every_token_once_per_step(self):
        model = build(self.args())
        loss_of(model, *batch(0)).backward()
        with torch.no_grad():
            model(batch(1)[0])
        model.eval()
        loss_of(model, *batch(2))
        for moe in moes(model):
            assert (moe.router.margins_EB.sum(dim=1) == batch(0)[0].numel()).all()
            assert torch.equal(moe.router.margins_EB[:, :192].sum(dim=1), moe.tokens_per_expert)
            assert moe.router.input_sum_C[-1] == batch(0)[0].numel()

    def test_statistics_are_float32_in_a_bfloat16_model(self):
        """TorchTitan builds models under training.dtype; a sum in bfloat16 stands still at 256 tokens."""
        with torch.device("meta"), set_default_dtype(torch.bfloat16):
            model = MomoeLlama(self.args(aux_loss_weight=0.1))
        model.to_empty(device="cpu")
        model.init_weights()
        for moe in moes(model):
            floats = [b for b in moe.buffers() if b.is_floating_point()]
            assert {b.dtype for b in floats} == {torch.float32} and len(floats) == 5

    def test_gradient_accumulation(self):
        whole, parts = (train(build(self.args()), steps=3, microbatches=n) for n in (1, 8))
        torch.testing.assert_close(parts["bias"], whole["bias"], rtol=0, atol=1e-3)

    def test_evens_out_the_load(self):
        model = build(self.args())
        optimizers = optimizers_for(model)
        for moe in moes(model):
            moe.expert_bias.copy_(torch.tensor([0.1, 0.0, 0.0, -0.1, -0.1]))
        for _ in range(12):
            model(batch(0)[0])
            optimizers.step()
        counts_LE = optimizers.load_balancer.counts_LE.double()
        assert (counts_LE.amax(dim=1) / counts_LE.mean(dim=1)).max() - 1 < 0.15

    @pytest.mark.parametrize("implementation", ["fused", "for-loop"])
    def test_skipped_step_moves_no_bias_and_is_forgotten(self, implementation):
        model = build(self.args(backend="torch"))
        optimizers = optimizers_for(model, implementation=implementation)
        loss_of(model, *batch(0)).backward()
        model.layers["2"].moe.experts.w2.grad[-1, -1, -1] = float("nan")
        optimizers.step()
        assert not any(moe.expert_bias.any() for moe in moes(model))
        assert not any(t.any() for t in self.statistics(model))

    def test_layers_with_balancing_off(self):
        model = build(self.args(load_balance_off_layers=[2]))
        run = train(model, steps=2)
        assert run["bias"][0].any() and not run["bias"][1].any()
        assert moes(model)[1].router.margins_EB is None

    def test_every_expert_chosen(self):
        run = train(build(self.args(moe={"top_k": 5})), steps=2)
        assert not run["bias"].any()

    def test_average(self):
        """A first step with half the average goes half as far."""
        biases = []
        for average in (1.0, 0.5):
            model = build(self.args(load_balance_average=average))
            optimizers = optimizers_for(model, lr=0.0)
            loss_of(model, *batch(0)).backward()
            optimizers.step()
            biases.append(torch.stack([moe.expert_bias for moe in moes(model)]))
        torch.testing.assert_close(biases[1], 0.5 * biases[0])

    def test_bias_takes_back_what_the_step_adds_to_the_scores(self):
        model = build(self.args())
        moe = moes(model)[0]
        inputs = []
        moe.router.gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
        optimizers = optimizers_for(model, lr=0.05)
        loss_of(model, *batch(0)).backward()
        before = (moe.router.gate.weight @ inputs[0].mean(dim=0)).detach().sigmoid()
        optimizers.load_balancer(optimizers)
        solved = moe.expert_bias.clone()
        for optimizer in optimizers:
            optimizer.step()
        gained = (moe.router.gate.weight @ inputs[0].mean(dim=0)).detach().sigmoid() - before
        optimizers.load_balancer.follow_gates(optimizers)
        assert gained.abs().max() > 0.01
        torch.testing.assert_close(moe.expert_bias - solved, gained.mean() - gained)
        again = build(self.args())
        optimizers = optimizers_for(again, lr=0.05)
        loss_of(again, *batch(0)).backward()
        optimizers.step()  # which runs both
        torch.testing.assert_close(moes(again)[0].expert_bias, moe.expert_bias)

    def test_resumes_to_the_same_bits(self):
        """Between steps all that the rule counts is 0: its buffers are not in the state dict."""
        model = build(self.args())
        assert not any("margins" in key or "input_sum" in key for key in model.state_dict())

    def test_aux_loss_reads_the_shares_of_the_last_step(self):
        model = build(self.args(aux_loss_weight=0.01))
        optimizers = optimizers_for(model)
        loss_of(model, *batch(0)).backward()
        optimizers.step()
        counts_LE = optimizers.load_balancer.counts_LE
        for moe, counts_E in zip(moes(model), counts_LE, strict=True):
            torch.testing.assert_close(moe.router.last_shares_E, counts_E / counts_E.sum())

    @pytest.mark.parametrize(
        "settings",
        [{}, {"router_z_loss_weight": 0.01}, {"aux_loss_weight": 0.01, "aux_loss_scope": "sequence"}],
    )
    def test_without_a_loss_over_the_global_batch_no_shares_are_recorded(self, settings):
        model = build(self.args(**settings))
        optimizers = optimizers_for(model)
        loss_of(model, *batch(0)).backward()
        optimizers.step()
        assert all(moe.router.last_shares_E is None for moe in moes(model))
