"""Gradients that are sent as narrow as they were computed have the sums of FSDP's own float32 reduction."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from momoe_titan.model.parallel.fsdp import reduce_by_sums
from momoe_titan.model.parallel.reduce_scatter import NarrowReduceScatter
from tests.support.forks import in_gloo_forks


def gradients(narrow: bool) -> list[torch.Tensor]:
    """Of two backwards, added up, of a model whose last layer has fewer rows than there are ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    reduce_by_sums(model)
    for module in (model[0], model[2], model):
        module.set_gradient_divide_factor(1.0)
        if narrow:
            module.set_custom_reduce_scatter(NarrowReduceScatter(torch.bfloat16))
    for _ in range(2):
        torch.manual_seed(dist.get_rank())
        model(torch.randn(5, 6)).square().sum().backward()
    return [parameter.grad.to_local().clone() for parameter in model.parameters()]


def sums_are_the_same() -> None:
    wide, narrow = gradients(False), gradients(True)
    for one, other in zip(wide, narrow, strict=True):
        assert other.dtype == torch.float32
        # of two summands in any order; of three in another order than gloo's
        tolerance = {"rtol": 0, "atol": 0} if dist.get_world_size() == 2 else {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(other, one, **tolerance)


def test_sums_are_those_of_a_float32_reduction(tmp_path):
    for world in (2, 3):
        assert in_gloo_forks(world, tmp_path / f"store{world}", sums_are_the_same)
