"""Modules compute with narrow copies, and everything else sees the parameters."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from momoe_titan.components.compute_weights import ComputeWeights
from tests.support.tiny import batch, build, loss_of, tiny_args


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters()}


def backward(model, weights, *seeds) -> None:
    with weights:
        for seed in seeds:
            loss_of(model, *batch(seed)).backward()


@pytest.mark.parametrize("tied", [False, True])
def test_modules_see_copies_inside_only(tied):
    model = build(tiny_args(tie_word_embeddings=tied))
    parameters, state = dict(model.named_parameters()), model.state_dict()
    weights = ComputeWeights([model], torch.bfloat16)
    with weights, weights:
        seen = dict(model.named_parameters())
        assert seen.keys() == parameters.keys()
        assert all(torch.equal(seen[name], p.bfloat16()) for name, p in parameters.items())
        assert (model.output.weight is model.tok_embeddings.weight) == tied
        assert model(batch(0)[0]).dtype == torch.bfloat16
        assert all(b.dtype != torch.bfloat16 for b in model.buffers())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert not any("." in name for module in model.modules() for name in module._parameters)  # of each its own
    assert {k: v.dtype for k, v in model.state_dict().items()} == {k: v.dtype for k, v in state.items()}


def test_gradients_are_those_of_a_model_in_bfloat16():
    """One backward: as they are; several: added in float32, where a sum in bfloat16 would round each time."""
    model, narrow = build(tiny_args()), build(tiny_args())
    for module in narrow.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().bfloat16())
    expected = []
    for seed in range(4):
        loss_of(narrow, *batch(seed)).backward()
        expected.append({name: g.clone() for name, g in gradients(narrow).items()})
        narrow.zero_grad()
    backward(model, ComputeWeights([model], torch.bfloat16, sums_in_parameters_dtype=False), 0)
    assert all(g.dtype == torch.bfloat16 and torch.equal(g, expected[0][n]) for n, g in gradients(model).items())

    summed = build(tiny_args())
    weights = ComputeWeights([summed], torch.bfloat16)
    backward(summed, weights, 0, 1)
    backward(summed, weights, 2, 3)
    for name, gradient in gradients(summed).items():
        whole = torch.stack([e[name].float() for e in expected])
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, whole.sum(dim=0), rtol=1e-5, atol=1e-6 * whole.abs().max().item())
    assert not any(copy.grad is not None for copy in weights.copies.values())


def test_a_gradient_set_without_autograds_hooks_is_not_lost():
    """As zero-bubble pipeline schedules do."""
    layer = nn.Linear(2, 2, bias=False)
    weights = ComputeWeights([layer], torch.bfloat16)
    with weights:
        layer.weight.grad = torch.ones_like(layer.weight)
    assert torch.equal(layer.weight.grad, torch.ones(2, 2))


@pytest.mark.parametrize("summed", [False, True])
def test_a_weight_without_a_gradient_hides_no_other(summed):
    layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    with ComputeWeights([layers], torch.bfloat16, sums_in_parameters_dtype=summed):
        layers[1](torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    assert layers[0].weight.grad is None and torch.equal(layers[1].weight.grad, torch.ones(2, 2))


@pytest.mark.parametrize("fused", [True, False])
def test_copies_follow_the_parameters(fused):
    """An optimizer that is not ours, and a checkpoint that is loaded."""
    layer = nn.Linear(3, 3)
    weights = ComputeWeights([layer], torch.bfloat16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
    parameter = layer.weight
    for _ in range(3):
        with weights:
            layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        with weights:
            assert torch.equal(layer.weight, parameter.bfloat16())
    weights.written = True
    with torch.no_grad():
        parameter.copy_(torch.arange(9.0).view(3, 3))
    with weights:
        assert torch.equal(layer.weight, parameter.bfloat16())
        weights.copies[parameter].detach().zero_()
    with weights:  # nothing has changed, and the optimizer is said to have written it
        assert not layer.weight.any()


def test_nothing_is_copied_in_the_dtype_that_parameters_have():
    layer = nn.Linear(3, 3)
    weights = ComputeWeights([layer], torch.float32)
    with weights:
        layer(torch.ones(1, 3)).sum().backward()
    assert not weights.copies and layer.weight.grad.any()


def test_a_compiled_model_is_compiled_once():
    layer = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    weights = ComputeWeights([layer], torch.bfloat16, sums_in_parameters_dtype=False)
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        with weights:
            compiled(torch.ones(2, 4, dtype=torch.bfloat16)).square().sum().backward()
        for p in layer.parameters():
            p.grad = p.grad.float()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
