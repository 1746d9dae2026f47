import re
from types import SimpleNamespace

import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend

from momoe_titan.kernels import launch, launch_check
from momoe_titan.kernels.gpu import interpreting


class Compiled:
    """A compiled kernel that the interpreter runs; it gets the arguments changed by `change`."""

    def __init__(self, kernel, change):
        self.kernel, self.change = kernel, change

    def __getitem__(self, grid):
        return lambda *args: self.kernel[grid[:1]](*self.change(args))


class Kernel:
    """The probe under a Triton that compiles it once, or anew for every launch."""

    def __init__(self, once=True, by_triton=tuple, past_triton=tuple):
        self.once, self.by_triton, self.kinds = once, by_triton, []
        self.compiled = Compiled(launch_check.probe_kernel, past_triton)

    def __getitem__(self, grid):
        def run(*args, CONSTANT):
            self.kinds.append([native_specialize_impl(CUDABackend, arg, False, True, True) for arg in args])
            launch_check.probe_kernel[grid](*self.by_triton((*args, CONSTANT)))
            return self.compiled if self.once else Compiled(launch_check.probe_kernel, tuple)

        return run


def swapped(args):
    return *args[:6], args[7], args[6], *args[8:]


@pytest.mark.skipif(not interpreting(), reason="runs the kernel in Triton's interpreter")
@pytest.mark.parametrize(
    "kernel, found",
    [
        (Kernel(), None),
        (Kernel(once=False), "compiles a kernel anew for arguments that are alike"),
        (Kernel(past_triton=swapped), r"past Triton got \[1, 48, 4294967296, 7, "),
        (Kernel(past_triton=lambda args: (*args[:-1], 6)), "past Triton got .* 6, 0.* in place of .* 5, 0"),
        (Kernel(by_triton=swapped), "by Triton got "),
    ],
    ids=["none", "compiles for more", "other places", "other constant", "Triton's own"],
)
def test_what_is_not_the_same_both_ways_is_found(kernel, found):
    difference = launch_check.difference(kernel, "cpu")
    assert kernel.kinds[0] == kernel.kinds[1], "Triton would compile these arguments twice"
    if found is None:
        assert difference is None
    else:
        assert re.search(found, difference)


def test_triton_and_we_take_both_sets_of_arguments_for_alike():
    numbers = torch.arange(64, dtype=torch.int32)
    assert numbers.data_ptr() % 16 == 0
    first, second = (launch_check.arguments(i, torch.empty(2, 16), numbers) for i in range(2))
    assert launch._specialisation(first) == launch._specialisation(second)
    theirs = [[native_specialize_impl(CUDABackend, arg, False, True, True) for arg in args] for args in (first, second)]
    assert theirs[0] == theirs[1]
    # each kind of argument is there once
    kinds = [tuple(launch._specialisation([arg])) for arg in first]
    assert len(set(kinds[1:])) == len(kinds) - 1 >= 10


class Jit:
    """Stands for a kernel of Triton's and for what it compiles; counts how it is launched."""

    arg_names = ["x"]

    def __init__(self):
        self.fn, self.launches = object(), []

    def __getitem__(self, grid):
        def run(x, **options):
            self.launches.append("by Triton" if len(grid) == 1 else "past Triton")
            return self

        return run


@pytest.fixture
def jit(monkeypatch):
    monkeypatch.setattr(launch, "JITFunction", Jit)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0)))
    monkeypatch.setattr(launch, "_past_triton", None)
    monkeypatch.setattr(launch.torch.cuda, "is_current_stream_capturing", lambda: False)
    return Jit()


def launch_thrice(jit, grid=(1,)):
    for _ in range(3):
        launch.launch(jit, grid, 3)


def test_kernels_go_past_triton_once_that_is_checked(jit, monkeypatch, caplog):
    monkeypatch.setattr(launch_check, "difference", lambda: None)
    launch_thrice(jit)
    assert jit.launches == ["by Triton", "past Triton", "past Triton"] and caplog.records == []


@pytest.mark.parametrize("fails", [False, True])
def test_triton_launches_where_they_differ_and_the_log_says_so_once(jit, monkeypatch, caplog, fails):
    checks = []

    def difference():
        checks.append(1)
        if fails:
            raise TypeError("run() takes 3 arguments")
        return "arguments got lost"

    monkeypatch.setattr(launch_check, "difference", difference)
    launch_thrice(jit)
    launch_thrice(Jit())
    assert jit.launches == ["by Triton"] * 3 and len(checks) == 1
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "launches every kernel itself" in record.getMessage()
    assert ("TypeError: run() takes 3 arguments" if fails else "arguments got lost") in record.getMessage()


def test_nothing_is_checked_while_a_graph_is_captured(jit, monkeypatch, caplog):
    monkeypatch.setattr(launch.torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(launch_check, "difference", lambda: pytest.fail("would end the capture"))
    launch_thrice(jit)
    assert jit.launches == ["by Triton"] * 3 and caplog.records == []
    monkeypatch.setattr(launch.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(launch_check, "difference", lambda: None)
    launch_thrice(jit)
    assert jit.launches[3:] == ["by Triton", "past Triton", "past Triton"]


@pytest.mark.gpu
def test_on_this_gpu_both_ways_are_the_same(monkeypatch):
    assert launch_check.difference() is None
    # Triton knows multiples of 16 from other numbers: two that are not alike stand for a rule that we do not know
    unlike = (*launch_check.INTEGERS[:1], (48, 17), *launch_check.INTEGERS[2:])
    monkeypatch.setattr(launch_check, "INTEGERS", unlike)
    assert "compiles a kernel anew" in launch_check.difference()


@pytest.mark.gpu
def test_checked_beside_a_busy_stream_and_not_in_a_capture(monkeypatch):
    monkeypatch.setattr(launch, "_past_triton", None)
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(4, device="cuda")
    with torch.cuda.graph(graph):
        x += 1
        assert not launch._may_go_past_triton() and launch._past_triton is None
    graph.replay()
    torch.cuda._sleep(2_000_000_000)  # about a second on the current stream, which is not waited for
    slept = torch.cuda.Event()
    slept.record()
    assert launch._may_go_past_triton() and not slept.query()
    torch.cuda.synchronize()
    assert x.tolist() == [1.0] * 4
