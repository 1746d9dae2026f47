"""The optimizer around AdamW's kernel: torch's state, torch's step where the kernel cannot run, clipping, skipping."""

import contextlib
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from momoe_titan.components import adamw as component
from momoe_titan.components.adamw import AdamW
from momoe_titan.components.gradient_norm import GradientNorm
from momoe_titan.kernels import adamw, gpu, multi_tensor
from tests.support.tiny import build, optimizers_for, tiny_args

BFLOAT16 = torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture
def kernel_runs(monkeypatch):
    """In the interpreter, in small chunks."""
    if not gpu.interpreting():
        pytest.skip("Triton runs on the GPU here, not in its interpreter")
    monkeypatch.setattr(component, "runs_here", lambda t: True)
    for module in (adamw, multi_tensor):
        monkeypatch.setattr(module, "CHUNK", 32)
        monkeypatch.setattr(module, "BLOCK", 16)


def groups() -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    new = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((3, 5), (40,), (2, 2))]
    return [{"params": new[:2]}, {"params": new[2:], "lr": 0.3, "weight_decay": 0.0}]


def set_gradients(optimizer, step: int, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(step)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        # as a transposed product leaves it
        p.grad = torch.randn(p.shape[::-1], generator=generator).mul_(scale).permute(*reversed(range(p.dim())))
    return parameters


def everything(optimizer) -> list[torch.Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [t.detach().clone() for p in parameters for t in (p, *(v for _, v in sorted(optimizer.state[p].items())))]


@pytest.mark.parametrize("on_kernel", [True, False])
def test_steps_and_state_are_those_of_torch(on_kernel, request):
    """Groups with rates of their own, gradients laid out otherwise, clipping, a schedule."""
    if on_kernel:
        request.getfixturevalue("kernel_runs")
    ours, torchs = AdamW(groups(), lr=0.1), torch.optim.AdamW(groups(), lr=0.1, fused=True)
    for step in range(3):
        set_gradients(ours, step)
        for p in set_gradients(torchs, step, 0.5):
            p.grad = p.grad.contiguous()
        ours.clip_coefficient = torch.tensor(0.5)
        for optimizer in (ours, torchs):
            optimizer.param_groups[1]["lr"] *= 0.9
            optimizer.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if on_kernel else {"rtol": 0, "atol": 0}
    for got, expected in zip(everything(ours), everything(torchs), strict=True):
        torch.testing.assert_close(got, expected, **tolerance)
    mine, others = ours.state_dict(), torchs.state_dict()
    assert mine["param_groups"][0].keys() == others["param_groups"][0].keys()
    assert {i: list(s) for i, s in mine["state"].items()} == {i: list(s) for i, s in others["state"].items()}


@pytest.mark.parametrize("on_kernel", [True, False])
def test_a_skipped_step_leaves_everything(on_kernel, request):
    if on_kernel:
        request.getfixturevalue("kernel_runs")
    optimizer = AdamW(groups(), lr=0.1)
    for step, found_inf in enumerate((0.0, 1.0)):
        before = everything(optimizer)
        parameters = set_gradients(optimizer, step)
        parameters[0].grad[0] = float("nan") if found_inf else 0
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
    assert all(map(torch.equal, everything(optimizer), before))


def test_the_state_of_torchs_optimizer_goes_on(kernel_runs):
    torchs = torch.optim.AdamW(groups(), lr=0.1, fused=True)
    set_gradients(torchs, 0)
    torchs.step()
    ours = AdamW(copy.deepcopy(torchs.param_groups), lr=0.1)
    ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert all(map(torch.equal, everything(ours), everything(torchs)))
    for optimizer in (ours, torchs):
        for p in set_gradients(optimizer, 1):
            p.grad = p.grad.contiguous()
        optimizer.step()
    for got, expected in zip(everything(ours), everything(torchs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_copies_are_written_with_the_parameters(kernel_runs):
    """Of parameters with a gradient; a narrow gradient is read as it is."""
    optimizer = AdamW(groups(), lr=0.1)
    parameters = set_gradients(optimizer, 0)
    optimizer.copies = {p: torch.zeros_like(p, dtype=BFLOAT16) for p in parameters}
    parameters[0].grad_dtype = None
    parameters[0].grad = parameters[0].grad.bfloat16()
    parameters[2].grad = None
    optimizer.step()
    assert optimizer.wrote_copies
    for p in parameters[:2]:  # the interpreter rounds towards zero
        torch.testing.assert_close(optimizer.copies[p], p.detach().bfloat16(), rtol=2**-7, atol=0)
    assert not optimizer.copies[parameters[2]].any() and not optimizer.state[parameters[2]]


class NoDTensors(TorchDispatchMode):
    """Fails where an operation is asked of DTensors, each of which has its sharding worked out."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(issubclass(kind, DTensor) for kind in types), func
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["kernel", "torch"])
def two_ranks(request):
    """Whether the kernel steps, and a mesh of two ranks, of which this process is the first."""
    if request.param:
        request.getfixturevalue("kernel_runs")
    dist.init_process_group("fake", rank=0, world_size=2)
    yield request.param, init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_each_rank_steps_on_its_shards(two_ranks):
    """As without ranks on the same numbers, state and all."""
    _, mesh = two_ranks
    shard, gradients = torch.randn(3, 5), torch.randn(2, 3, 5)
    alone = nn.Parameter(shard.clone())
    shared = nn.Parameter(DTensor.from_local(shard.clone(), mesh, [Shard(0)]))
    optimizers = AdamW([alone], lr=0.1), AdamW([shared], lr=0.1)
    for step, gradient in enumerate(gradients):
        alone.grad = gradient.clone()
        shared.grad = DTensor.from_local(gradient.clone(), mesh, [Shard(0)])
        optimizers[0].step()
        with NoDTensors() if step else contextlib.nullcontext():  # the first step makes the state
            optimizers[1].step()
    mine, its = (optimizer.state[p] for optimizer, p in zip(optimizers, (alone, shared), strict=True))
    assert torch.equal(component.local(shared), alone) and its["exp_avg"].placements == shared.placements
    assert all(torch.equal(component.local(its[name]), mine[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_parts_of_a_sum_are_added_up_over_ranks(two_ranks):
    """Under tensor parallelism without FSDP autograd leaves the gradients of norms so."""
    on_kernel, mesh = two_ranks
    norm = parallelize_module(nn.RMSNorm(8), mesh, SequenceParallel())
    optimizer = AdamW(norm.parameters(), lr=0.1)
    norm(DTensor.from_local(torch.randn(1, 4, 8), mesh, [Shard(1)])).to_local().sum().backward()
    assert any(placement.is_partial() for placement in norm.weight.grad.placements)
    with CommDebugMode() as counted:
        optimizer.step()
    assert optimizer.wrote_copies == on_kernel
    assert counted.get_total_counts() == 1


def test_where_the_kernel_cannot_run_narrow_gradients_are_widened():
    """On a CPU, and for parameters that are not contiguous on a GPU."""
    ours, torchs = AdamW(groups(), lr=0.1), torch.optim.AdamW(groups(), lr=0.1, fused=True)
    for p in set_gradients(ours, 0):
        p.grad_dtype = None
        p.grad = p.grad.bfloat16()
    for p in set_gradients(torchs, 0):
        p.grad = p.grad.bfloat16().float().contiguous()
    ours.step()
    torchs.step()
    assert not ours.wrote_copies
    assert all(map(torch.equal, everything(ours), everything(torchs)))


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_options_that_the_kernel_lacks_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is True, must be False"):
        AdamW(groups(), **{option: True})


def test_which_jobs_get_it():
    model = build(tiny_args())

    def chosen(**fields):
        return {type(optimizer) for optimizer in optimizers_for(model, **fields)}

    assert chosen(implementation="fused") == {AdamW}
    assert chosen(implementation="foreach") == chosen(implementation="for-loop") == {torch.optim.AdamW}
    assert chosen(implementation="fused", name="Adam") == {torch.optim.Adam}
    assert chosen(implementation="fused", early_step_in_backward=True) == {torch.optim.AdamW}


def test_the_norm_is_that_of_torch():
    parameters = set_gradients(AdamW(groups()), 0)
    norm = GradientNorm()
    expected = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    torch.testing.assert_close(norm(parameters, CPU), expected, rtol=1e-6, atol=0)
    assert norm([nn.Parameter(torch.ones(2))], CPU) == 0 and norm([], CPU) == 0
    for value in (float("nan"), float("inf"), -float("inf")):
        parameters[1].grad[3] = value
        assert not norm(parameters, CPU).isfinite()
