"""AdamW's kernel and the sum of squares: against float64 and torch, for many tensors of any size in one launch."""

import pytest
import torch

from momoe_titan.kernels import adamw, multi_tensor
from momoe_titan.kernels.adamw import Adamw, Rates, Updated
from momoe_titan.kernels.multi_tensor import SquareSum

# around a chunk of 64 in blocks of 32, as the interpreter has it; the last one begins 4 bytes after a multiple of 16
SIZES = [(1,), (7,), (64,), (65,), (3, 50), (0,), (4, 4, 8), (33,)]
RATES = Rates(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, device):
    if device == "cpu":
        for module in (adamw, multi_tensor):
            monkeypatch.setattr(module, "CHUNK", 64)
            monkeypatch.setattr(module, "BLOCK", 32)


def random(size, dtype, device) -> torch.Tensor:
    return torch.randn(size, device=device).to(dtype)


def parameters(dtype, device) -> list[torch.Tensor]:
    *some, (last,) = SIZES
    return [random(size, dtype, device) for size in some] + [random(last + 1, dtype, device)[1:]]


def updated(parameters, copy: torch.dtype | None = None) -> list[Updated]:
    return [
        Updated(
            parameter=p,
            gradient=torch.empty(0),
            exp_avg=torch.zeros_like(p),
            exp_avg_sq=torch.zeros_like(p),
            step=torch.zeros((), device=p.device),
            copy=None if copy is None else torch.zeros_like(p, dtype=copy),
        )
        for p in parameters
    ]


def error(values, expected) -> float:
    return ((values.double() - expected).norm() / expected.norm()).item()


def state_of(updated: list[Updated]) -> list[torch.Tensor]:
    return [t.clone() for u in updated for t in u if t is not None and t is not u.gradient]


@pytest.mark.parametrize(
    "dtype, gradient_dtype, copy_dtype",
    [
        (torch.float32, torch.float32, None),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, None),
    ],
)
def test_steps_are_as_exact_as_those_of_torch(dtype, gradient_dtype, copy_dtype, device):
    """Against float64, over four steps at changing rates, of which one is skipped."""
    ours = updated(parameters(dtype, device), copy_dtype)
    exact = [torch.nn.Parameter(u.parameter.double()) for u in ours]
    torchs = [torch.nn.Parameter(u.parameter.clone()) for u in ours]
    options = {**RATES._asdict(), "fused": True}
    references = torch.optim.AdamW(torchs, **options), torch.optim.AdamW(exact, **options)
    kernel, scale = Adamw(), torch.tensor(0.7, device=device)
    for step in range(4):
        rates = RATES._replace(lr=RATES.lr * (step + 1))
        ours = [u._replace(gradient=random(u.parameter.shape, gradient_dtype, device)) for u in ours]
        is_skipped = step == 2
        before = state_of(ours)
        kernel.step(ours, rates, scale, torch.tensor(float(is_skipped), device=device))
        if is_skipped:
            assert all(map(torch.equal, state_of(ours), before))
            continue
        for optimizer, kind in zip(references, (torchs, exact), strict=True):
            for p, u in zip(kind, ours, strict=True):
                p.grad = (u.gradient.double() * 0.7).to(p.dtype)
            optimizer.param_groups[0]["lr"] = rates.lr
            optimizer.step()
    # The interpreter rounds to bfloat16 towards zero, and has no multiplication and addition with one rounding.
    margin = {torch.float32: 1.3, torch.bfloat16: 5}[dtype] if device == "cpu" else 1.1
    for name in ("parameter", "exp_avg", "exp_avg_sq"):
        mine = torch.cat([getattr(u, name).flatten() for u in ours])
        others, wanted = (
            torch.cat([(p.detach() if name == "parameter" else o.state[p][name]).flatten() for p in kind])
            for o, kind in zip(references, (torchs, exact), strict=True)
        )
        assert error(mine, wanted) <= margin * error(others, wanted), name
    assert all(u.step.item() == 3 for u in ours)
    for u in ours:
        if u.copy is not None:
            rounding = 2**-7 if device == "cpu" else 0
            torch.testing.assert_close(u.copy, u.parameter.to(copy_dtype), rtol=rounding, atol=0)


def test_tables_are_sent_where_a_tensor_has_moved(device):
    """Gradients that are where they were in the last step cost nothing, others one table."""
    aligned = [p.clone() for p in parameters(torch.float32, device)]
    ours = [u._replace(gradient=torch.ones_like(u.parameter)) for u in updated(aligned)]
    kernel, number = Adamw(), torch.ones((), device=device)
    for _ in range(2):
        kernel.step(ours, RATES, number, number - 1)
    (tables,) = kernel._launches.values()
    assert (tables.table.sent, tables.gradients.sent) == (1, 1)
    ours[3] = ours[3]._replace(gradient=ours[3].gradient.clone())
    kernel.step(ours, RATES, number, number - 1)
    assert (tables.table.sent, tables.gradients.sent) == (1, 2)
    assert all(u.step.item() == 3 for u in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_sum(dtype, device):
    tensors = parameters(dtype, device)
    square_sum = SquareSum()
    expected = sum((t.double() ** 2).sum() for t in tensors)
    for _ in range(2):
        torch.testing.assert_close(square_sum(tensors).double(), expected, rtol=1e-6, atol=0)
    for value in (float("nan"), float("inf"), -float("inf")):
        tensors[4][-1, -1] = value
        assert not square_sum(tensors).isfinite()


@pytest.mark.gpu
def test_a_new_rate_compiles_nothing():
    """And neither does a clip coefficient, or another number of tensors."""
    ours = [u._replace(gradient=torch.ones_like(u.parameter)) for u in updated(parameters(torch.float32, "cuda"))]
    kernel, number = Adamw(), torch.ones((), device="cuda")
    kernel.step(ours, RATES, number, number - 1)
    before = [len(kernels[0]) for kernels in adamw._adamw_kernel.device_caches.values()]
    for step in range(3):
        kernel.step(ours[: 5 + step], RATES._replace(lr=0.1 * step, weight_decay=0.3 * step), number, number - 1)
    assert [len(kernels[0]) for kernels in adamw._adamw_kernel.device_caches.values()] == before
