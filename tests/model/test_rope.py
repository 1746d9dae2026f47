"""Rotary embeddings of real numbers, which compiled blocks use, beside TorchTitan's of complex ones."""

import pytest
import torch
from torchtitan.models.llama3.model.model import apply_rotary_emb, precompute_freqs_cis

from momoe_titan.model.rope import rotate


@pytest.mark.parametrize("positions", [None, [[3, 0, 1, 2, 5]], [[3, 0, 1, 2, 5], [0, 0, 6, 1, 7]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_numbers_equal_complex_ones(positions, dtype, monkeypatch):
    torch.manual_seed(0)
    freqs = precompute_freqs_cis(8, 16, 10_000.0)
    xq, xk = (torch.randn(2, 5, heads, 8).to(dtype).requires_grad_() for heads in (4, 2))
    positions = None if positions is None else torch.tensor(positions)
    results = []
    for function, traced in ((apply_rotary_emb, False), (rotate, False), (rotate, True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda traced=traced: traced)
        out = function(xq, xk, freqs, positions)
        grads = torch.autograd.grad(out, (xq, xk), [torch.ones_like(o).cumsum(0) for o in out])
        results.append((*out, *grads))
    for want, plain, real in zip(*results, strict=True):
        assert torch.equal(want, plain)
        assert real.dtype == want.dtype and real.shape == want.shape
        torch.testing.assert_close(real, want, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_a_compiled_graph_multiplies_no_complex_numbers():
    seen = []

    def backend(module, inputs):
        seen.extend(node for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    x = torch.randn(2, 5, 4, 8)
    torch.compile(rotate, backend=backend, fullgraph=True)(x, x, precompute_freqs_cis(8, 16, 10_000.0))
    values = [(node.op, node.meta.get("example_value")) for node in seen]
    assert [op for op, value in values if isinstance(value, torch.Tensor) and value.is_complex()] == ["placeholder"]
