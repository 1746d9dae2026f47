"""TorchTitan 0.3's models with our experts. Runs where 0.3 is installed: `scripts/test_torchtitan_03.sh` makes such a
place; skipped beside 0.2.2, for which all other tests are."""

import dataclasses
import importlib.metadata
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

VERSION = importlib.metadata.version("torchtitan")
if not VERSION.startswith("0.3"):
    pytest.skip(f"needs torchtitan 0.3, found {VERSION}", allow_module_level=True)

from torchtitan.components.optimizer import (  # noqa: E402
    default_adamw,
    register_moe_load_balancing_hook,
)
from torchtitan.config import Configurable, OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.config.override import parse_cli_imports  # noqa: E402
from torchtitan.models.qwen3 import model_registry  # noqa: E402

from momoe_titan.adapters.torchtitan_03 import (  # noqa: E402
    BalancingOptimizers,
    MomoeRoutedExperts,
    MomoeRouter,
    momoe_balancing,
    momoe_experts,
    momoe_router,
)
from momoe_titan.kernels.quantile import NUM_BINS  # noqa: E402
from momoe_titan.moe.balancing import bias_delta, quantile_delta  # noqa: E402

VOCAB, LENGTH = 2048, 16
NAME = "momoe_titan.adapters.torchtitan_03.momoe_experts"
ROUTER = "momoe_titan.adapters.torchtitan_03.momoe_router"
BALANCING = "momoe_titan.adapters.torchtitan_03.momoe_balancing"


class PlainAttention(nn.Module):
    """Causal attention in place of flex attention, which has no kernels for the CPU."""

    def forward(self, q, k, v, *, attention_masks, scale, enable_gqa):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


@pytest.fixture(autouse=True)
def stock_experts_in_float32(monkeypatch):
    """TorchTitan's experts round to bfloat16, whose errors would hide others."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda t: t)


def build(*imports):
    """The debug model of qwen3, with two of its layers."""
    spec = model_registry("debugmodel_moe", attn_backend="flex")
    spec.model.layers = spec.model.layers[:2]
    if imports:
        apply_overrides(OverrideConfig(imports=list(imports)), spec.model)
    torch.manual_seed(0)
    model = spec.model.build()
    model.init_states(buffer_device=torch.device("cpu"))
    torch.manual_seed(0)
    for layer in model.layers.values():
        layer.attention.inner_attention = PlainAttention()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.train()


def loss_of(model) -> torch.Tensor:
    rows = torch.randint(0, VOCAB, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    logits = model(rows[:, :-1], positions=torch.arange(LENGTH).expand(2, LENGTH))
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def test_gradients_and_state_are_those_of_the_stock_model():
    stock, ours = build(), build((NAME, {"save_percent": 50}))
    experts = [layer.moe.routed_experts for layer in ours.layers.values()]
    assert all(isinstance(e, MomoeRoutedExperts) and e.inner_experts.save_percent == 50 for e in experts)
    of_stock, of_ours = stock.state_dict(), ours.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in of_ours.items()} == {k: (v.shape, v.dtype) for k, v in of_stock.items()}
    wanted, found = loss_of(stock), loss_of(ours)
    wanted.backward()
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=2e-5 * p.grad.abs().max().item(), msg=name)


class OneRank:
    ep_enabled, tp = False, 1

    def get_optional_mesh(self, name):
        return None


def optimizers_of(model, **fields):
    """The optimizers as the trainer builds them, with our balancing if there are fields, and with TorchTitan's hook."""
    config = default_adamw(lr=1e-4, implementation="for-loop")
    config = momoe_balancing(config, **fields) if fields else config
    optimizers = config.build(model_parts=[model])
    register_moe_load_balancing_hook(optimizers, [model], OneRank())
    return optimizers


def train(model, optimizers, steps=3) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


def test_it_trains_with_equal_losses_and_balancing():
    losses, biases = [], []
    for imports in ([], [NAME], [NAME, ROUTER]):
        model = build(*imports)
        losses.append(train(model, optimizers_of(model)))
        biases.append(model.layers["0"].moe.expert_bias_E.clone())
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], rel=1e-4)
        torch.testing.assert_close(biases[other], biases[0])
    assert losses[0][-1] < losses[0][0]
    assert biases[0].abs().max() > 0


@pytest.mark.parametrize("rule", ["sign", "proportional", "quantile"])
def test_our_rules_move_the_bias_as_beside_02(rule):
    """By the functions of `moe.balancing`, from exact counts, of two microbatches; the losses stay what they were."""
    model = build(NAME, ROUTER)
    assert all(isinstance(layer.moe.router, MomoeRouter) for layer in model.layers.values())
    optimizers = optimizers_of(model, load_balance_rule=rule, load_balance_rate=0.05, load_balance_average=0.5)
    assert isinstance(optimizers, BalancingOptimizers)
    for _ in range(2):
        loss = loss_of(model)
        loss.backward()
    assert loss.item() == pytest.approx(loss_of(build().eval()).item(), rel=1e-4)
    moe = model.layers["1"].moe
    counts_E, margins_EB = moe.router.tokens_per_expert.clone(), moe.router.margins_EB
    assert counts_E.tolist() == moe.tokens_per_expert_E.tolist()
    assert counts_E.sum() == 2 * 2 * LENGTH * moe.router.top_k
    if rule == "quantile":
        assert margins_EB.shape == (64, NUM_BINS)
        expected_E = quantile_delta(margins_EB[None].clone(), torch.zeros(1, 64), moe.router.top_k, 0.5)[0]
        for part in optimizers.optimizers:
            part.param_groups[0]["lr"] = 0.0  # no gate moves, which the bias would follow
    else:
        assert margins_EB is None
        expected_E = bias_delta(counts_E, 0.05, rule)
    optimizers.step()
    torch.testing.assert_close(moe.expert_bias_E, expected_E)
    assert expected_E.abs().max() > 0.001
    assert moe.router.tokens_per_expert.sum() == moe.tokens_per_expert_E.sum() == 0


def test_quantile_balancing_evens_out_the_load_and_follows_the_gates():
    model = build(NAME, ROUTER)
    optimizers = optimizers_of(model, load_balance_rule="quantile", load_balance_average=1.0)
    loads = []
    for _ in range(5):
        train(model, optimizers, steps=1)
        loads.append(optimizers.load_balancer.counts_LE.max(dim=1).values.float().mean().item())
    assert loads[-1] < 0.7 * loads[0]


def test_the_state_is_that_of_the_stock_model_beside_balancing():
    stock, ours = build().state_dict(), build(NAME, ROUTER)
    optimizers_of(ours, load_balance_rule="quantile")
    assert {k: (v.shape, v.dtype) for k, v in ours.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in stock.items()
    }


def test_rows_from_a_dispatcher_give_the_same():
    """What expert parallelism calls: rows sorted by expert, with their counts."""
    experts = build(NAME).layers["0"].moe.routed_experts
    x, ids = torch.randn(10, 256), torch.rand(10, 64).topk(8).indices
    scores = torch.rand(10, 8)
    counts = torch.bincount(ids.flatten(), minlength=64)
    rows, _, metadata = experts.token_dispatcher.dispatch(x, scores, ids, counts)
    out = experts.token_dispatcher.combine(experts.inner_experts(rows, counts), metadata, x)
    torch.testing.assert_close(out, experts.inner_experts(x, ids, scores), rtol=1e-4, atol=1e-5)


@dataclass(kw_only=True, slots=True)
class Job(Configurable.Config):
    """The part of a job's configuration that overrides change; all of it needs the packages of its data."""

    model: Configurable.Config
    optimizer: Configurable.Config


def test_the_commands_of_the_page_name_what_there_is():
    """Applied to the model that they name and its optimizer, as TorchTitan's trainer does; nothing is built."""
    page = (Path(__file__).parents[2] / "docs/use_it_in_your_model.md").read_text()
    commands = [block.split("--override.imports", 1) for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)]
    overrides = [shlex.split(after.replace("\\\n", " ")) for _, *rest in commands for after in rest]
    assert len(overrides) == 2
    for balancing, tokens in enumerate(overrides):
        job = Job(model=model_registry("30B-A3B").model, optimizer=default_adamw(lr=1e-3))
        apply_overrides(OverrideConfig(imports=parse_cli_imports(tokens)), job)
        assert (type(job.optimizer) is BalancingOptimizers.Config) == bool(balancing)
        for layer in job.model.layers:
            assert type(layer.moe.routed_experts) is MomoeRoutedExperts.Config
            assert (type(layer.moe.router) is MomoeRouter.Config) == bool(balancing)


def test_what_it_does_not_know_is_refused_by_name():
    spec = model_registry("debugmodel_moe", attn_backend="flex")
    cfg = spec.model.layers[0].moe.routed_experts
    with pytest.raises(ValueError, match="save_percent must be a number from 0 to 100, got 120"):
        momoe_experts(cfg, save_percent=120)
    cfg.inner_experts = momoe_experts(cfg).inner_experts
    with pytest.raises(ValueError, match="knows GroupedExperts, got MomoeGroupedExperts.Config"):
        momoe_experts(cfg)
    with pytest.raises(ValueError, match="load_balance_rule is 'even', must be one of"):
        momoe_balancing(default_adamw(lr=1e-3), load_balance_rule="even")
    with pytest.raises(ValueError, match="load_balance_average is 2.0, must be above 0 and at most 1"):
        momoe_balancing(default_adamw(lr=1e-3), load_balance_average=2.0)
    of_groups = dataclasses.replace(spec.model.layers[0].moe.router, num_expert_groups=8)
    with pytest.raises(ValueError, match="num_limited_groups must be set where num_expert_groups is, 8"):
        momoe_router(of_groups).build()
    with pytest.raises(ValueError, match="momoe_balancing needs momoe_router beside it, found TokenChoiceTopKRouter"):
        optimizers_of(build(), load_balance_rule="sign")
