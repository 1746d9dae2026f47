"""What the benchmark of the loss takes for the loss's own memory, with counted bytes in place of a GPU's."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_loss_before_are_not_memory_of_this_one(dtype, monkeypatch):
    inputs = [
        torch.ones(4, 512, dtype=torch.bfloat16).requires_grad_(),
        torch.ones(2048, 512, dtype=dtype).requires_grad_(),
    ]
    gradients, held = 4 * 512 * 2 + 2048 * 512 * 4, 5 * 2**20

    def allocated() -> int:
        return sum(t.nbytes + (0 if t.grad is None else t.grad.nbytes) for t in inputs)

    fakes = {
        "memory_allocated": allocated,
        "max_memory_allocated": lambda: sum(t.nbytes for t in inputs) + gradients + held,
        "Event": lambda enable_timing: SimpleNamespace(record=lambda: None, elapsed_time=lambda end: 1.0),
    }
    fakes |= {name: lambda: None for name in ("empty_cache", "reset_peak_memory_stats", "synchronize")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for _ in range(2):
        found = loss.measure(lambda: (inputs[0] @ inputs[1].to(torch.bfloat16).T).float().sum(), inputs, repeats=1)
        assert found == {"ms": 1.0, "mib": 5}
