"""What the tests replace in Triton's interpreter to save time (tests/support/interpreter.py) changes no result."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from momoe_titan.kernels import momoe_mlp
from momoe_titan.kernels.gpu import interpreting
from tests.support.forks import in_forks
from tests.support.interpreter import REPLACED
from tests.trust import cases

pytestmark = pytest.mark.skipif(not interpreting(), reason="Triton's interpreter is off")


def results(dtype: str, kind: str) -> list[torch.Tensor]:
    """Output and all gradients of a small call of the op, by its kernels."""
    case = cases.ragged(11, (17, 16, 4, 3), dtype, kind, save_percent=37)

    def op(leaves, ids):
        tensors, options = cases.arguments(case, leaves)
        return momoe_mlp(*tensors, ids, leaves["scores"], case.save_percent, backend="triton", **options)[0]

    return list(cases.results(case, cases.make_inputs(case, "cpu"), op).values())


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "plain"), ("bfloat16", "gpt-oss")])
def test_results_are_those_of_triton_s_own_parts(monkeypatch, dtype, kind):
    if not REPLACED:
        pytest.skip("nothing is replaced in this version of Triton")
    mine = results(dtype, kind)
    with own_parts(monkeypatch):
        own = results(dtype, kind)
    for a, b in zip(mine, own, strict=True):
        assert torch.equal(a, b)


@contextmanager
def own_parts(monkeypatch):
    with monkeypatch.context() as patch:
        for of, name, own in REPLACED:
            if name == "__new__":  # Python's own takes no arguments once a class has had another
                own = lambda cls, *args: object.__new__(cls)  # noqa: E731
            patch.setattr(of, name, own)
        yield


OPERANDS = {
    "int32": lambda: torch.tensor([[-7, 3], [2, 2**31 - 1]], dtype=torch.int32),
    "int64": lambda: torch.tensor([[-7, 3], [2, 2**40]]),
    "int8": lambda: torch.tensor([[-7, 3], [2, 127]], dtype=torch.int8),
    "uint8": lambda: torch.tensor([[7, 3], [2, 255]], dtype=torch.uint8),
    "float16": lambda: torch.tensor([[-7.5, 3], [0.1, 6e4]], dtype=torch.float16),
    "bfloat16": lambda: torch.tensor([[-7.5, 3], [0.1, 6e4]], dtype=torch.bfloat16),
    "float32": lambda: torch.tensor([[-7.5, 3], [0.1, 1e30]]),
    "float64": lambda: torch.tensor([[-7.5, 3], [0.1, 1e300]], dtype=torch.float64),
}


@triton.jit
def operations_kernel(a, b, out, DIVIDES: tl.constexpr, OUT: tl.constexpr):
    rows, columns = tl.arange(0, 2)[:, None], tl.arange(0, 2)[None, :]
    x, y = tl.load(a + rows * 2 + columns), tl.load(b + rows * 2 + columns)
    row = tl.load(b + tl.arange(0, 2))
    if DIVIDES:
        results = (x / y, x / 3, y / 0.5, x / row, 2 / y, x / tl.load(b), tl.load(a) / tl.load(b))
    else:
        results = (x + y, x * 3, 2 - y, x + row, x < y, x + tl.load(b), tl.maximum(tl.load(a), tl.load(b)) + x)
    for i in tl.static_range(7):
        # as bits: what a type holds, not what another makes of it
        tl.store(out + i * 4 + rows * 2 + columns, (results[i] + tl.zeros((2, 2), x.dtype)).to(OUT))


@pytest.mark.parametrize("first", OPERANDS)
def test_operands_are_cast_and_broadcast_as_triton_s_own_parts_do(monkeypatch, first):
    def run(second, divides, dtype):
        out = torch.zeros(7, 2, 2, dtype=dtype)
        out_type = {torch.int64: tl.int64, torch.float64: tl.float64}[dtype]
        try:
            operations_kernel[(1,)](OPERANDS[first](), OPERANDS[second](), out, divides, out_type)
        except Exception as e:
            return str(e)
        return out

    cases = [(second, divides) for second in OPERANDS for divides in (False, True)]
    cases = [(*case, torch.float64 if "float" in first + case[0] or case[1] else torch.int64) for case in cases]
    with np.errstate(all="ignore"):
        mine = [run(*case) for case in cases]
        with own_parts(monkeypatch):
            own = [run(*case) for case in cases]
    for case, a, b in zip(cases, mine, own, strict=True):
        assert type(a) is type(b), (case, a, b)
        assert a == b if isinstance(a, str) else torch.equal(a.view(torch.int64), b.view(torch.int64)), case
    assert sum(isinstance(one, torch.Tensor) for one in mine) >= 8


@triton.jit
def twice(x):
    return x * 2


@triton.jit
def twice_kernel(numbers, end):
    tl.device_assert(end > 0)
    for i in range(end):
        tl.store(numbers + i, twice(tl.load(numbers + i)))
    tl.static_assert(end < 4)


def test_a_kernel_runs_after_one_that_failed_and_after_a_function_outside_of_any():
    def work(rank: int) -> None:  # in a fork: Triton leaves its language replaced after a function outside of kernels
        numbers = torch.arange(4)
        with pytest.raises(Exception, match="AssertionError"):
            twice_kernel[(1,)](numbers, 4)
        assert tl.static_assert.__module__ == "triton.language.core"
        twice_kernel[(1,)](numbers, 3)
        assert numbers.tolist() == [0, 4, 8, 6]
        assert twice(3) == 6
        twice_kernel[(1,)](numbers, 2)
        assert numbers.tolist() == [0, 8, 8, 6]

    assert in_forks(1, work)
