"""TorchTitan 0.3's models with our experts. Runs where 0.3 is installed: `scripts/test_torchtitan_03.sh` makes such a
place; skipped beside 0.2.2, for which all other tests are."""

import importlib.metadata

import pytest
import torch
from torch import nn

VERSION = importlib.metadata.version("torchtitan")
if not VERSION.startswith("0.3"):
    pytest.skip(f"needs torchtitan 0.3, found {VERSION}", allow_module_level=True)

from torchtitan.components.optimizer import register_moe_load_balancing_hook  # noqa: E402
from torchtitan.config import OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.models.qwen3 import model_registry  # noqa: E402

from momoe_titan.adapters.torchtitan_03 import MomoeRoutedExperts, momoe_experts  # noqa: E402

VOCAB, LENGTH = 2048, 16
NAME = "momoe_titan.adapters.torchtitan_03.momoe_experts"


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
    assert all(isinstance(layer.moe.routed_experts, MomoeRoutedExperts) for layer in ours.layers.values())
    of_stock, of_ours = stock.state_dict(), ours.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in of_ours.items()} == {k: (v.shape, v.dtype) for k, v in of_stock.items()}
    wanted, found = loss_of(stock), loss_of(ours)
    wanted.backward()
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    for (name, p), q in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=2e-5 * p.grad.abs().max().item(), msg=name)


def test_it_trains_with_equal_losses_and_balancing():
    class OneRank:
        ep_enabled, tp = False, 1

        def get_optional_mesh(self, name):
            return None

    losses, biases = [], []
    for imports in ([], [NAME]):
        model = build(*imports)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        register_moe_load_balancing_hook(optimizer, [model], OneRank())
        losses.append([])
        for _ in range(3):
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        biases.append(model.layers["0"].moe.expert_bias_E.clone())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert biases[0].abs().max() > 0
    torch.testing.assert_close(biases[1], biases[0])


def test_rows_from_a_dispatcher_give_the_same():
    """What expert parallelism calls: rows sorted by expert, with their counts."""
    experts = build(NAME).layers["0"].moe.routed_experts
    x, ids = torch.randn(10, 256), torch.rand(10, 64).topk(8).indices
    scores = torch.rand(10, 8)
    counts = torch.bincount(ids.flatten(), minlength=64)
    rows, _, metadata = experts.token_dispatcher.dispatch(x, scores, ids, counts)
    out = experts.token_dispatcher.combine(experts.inner_experts(rows, counts), metadata, x)
    torch.testing.assert_close(out, experts.inner_experts(x, ids, scores), rtol=1e-4, atol=1e-5)


def test_what_it_does_not_know_is_refused_by_name():
    spec = model_registry("debugmodel_moe", attn_backend="flex")
    cfg = spec.model.layers[0].moe.routed_experts
    with pytest.raises(ValueError, match="save_percent must be a number from 0 to 100, got 120"):
        momoe_experts(cfg, save_percent=120)
    cfg.inner_experts = momoe_experts(cfg).inner_experts
    with pytest.raises(ValueError, match="knows GroupedExperts, got MomoeGroupedExperts.Config"):
        momoe_experts(cfg)
