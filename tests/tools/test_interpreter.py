"""What the tests replace in Triton's interpreter to save time (tests/support/interpreter.py) changes no result."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from momoe_titan.kernels import momoe_mlp
from momoe_titan.kernels.gpu import interpreting
from tests.support.forks import in_forks
from tests.support.interpreter import _ReplacedOnce
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
    if not isinstance(interpreter._patch_lang, _ReplacedOnce):
        pytest.skip("nothing is replaced in this version of Triton")
    mine = results(dtype, kind)
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.replace)
    monkeypatch.setattr(interpreter, "_get_np_dtype", interpreter._get_np_dtype.__wrapped__)
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
    for a, b in zip(mine, results(dtype, kind), strict=True):
        assert torch.equal(a, b)


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
