"""Rows that the ranks of tensor parallelism gather, sum and scatter, and what a pipeline's stages do around a probe."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from momoe_titan.model.parallel import pipeline
from momoe_titan.model.parallel.collectives import gather_rows, local_weight, sum_and_scatter_rows
from momoe_titan.moe.expert_stats import record_counts
from tests.support.forks import in_gloo_forks

RANKS, ROWS = 2, 3


def of_rank(seed: int, rank: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(10 * seed + rank))


def with_gradient(function, x: torch.Tensor, dout: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x.requires_grad_()
    out = function(x)
    (dx,) = torch.autograd.grad(out, x, dout)
    return out.detach(), dx


def compare() -> None:
    rank, whole = dist.get_rank(), RANKS * ROWS
    mesh = init_device_mesh("cpu", (RANKS,))
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    parts, wholes = ([of_rank(seed, r, rows) for r in range(RANKS)] for seed, rows in ((1, ROWS), (2, whole)))
    out, dx = with_gradient(lambda x: gather_rows(x, mesh), parts[rank].clone(), wholes[rank])
    torch.testing.assert_close(out, torch.cat(parts))
    torch.testing.assert_close(dx, sum(wholes)[mine])  # each rank's is of its part of the work
    out, dx = with_gradient(lambda x: sum_and_scatter_rows(x, mesh), wholes[rank].clone(), parts[rank])
    torch.testing.assert_close(out, sum(wholes)[mine])
    torch.testing.assert_close(dx, torch.cat(parts))
    weight = distribute_tensor(of_rank(3, 0, whole), mesh, [Replicate()]).requires_grad_()
    local_weight(weight).backward(wholes[rank])
    torch.testing.assert_close(local_weight(weight).detach(), of_rank(3, 0, whole))
    torch.testing.assert_close(weight.grad.full_tensor(), sum(wholes))  # of the tokens of all ranks
    weight = distribute_tensor(of_rank(3, 0, whole), mesh, [Shard(0)]).requires_grad_()
    local_weight(weight).backward(parts[rank])
    torch.testing.assert_close(local_weight(weight).detach(), of_rank(3, 0, whole)[mine])
    torch.testing.assert_close(weight.grad.full_tensor(), torch.cat(parts))


def test_rows_and_gradients_are_those_of_all_ranks(tmp_path):
    assert in_gloo_forks(RANKS, tmp_path / "store", compare)


def test_without_tensor_parallelism_all_passes_through():
    x = torch.ones(2, 3)
    assert gather_rows(x, None) is sum_and_scatter_rows(x, None) is local_weight(x) is x


@pytest.mark.parametrize("several", [False, True])
def test_what_a_stage_probes_shapes_with_is_not_counted(several, monkeypatch):
    total = torch.zeros(2, dtype=torch.int64)

    class Stage:
        def _prepare_forward_infra(self, *args, **options):
            record_counts(nn.Module(), total, torch.tensor([1, 2]))
            return args, options

    stages = [Stage() for _ in range(1 + several)]
    schedule = SimpleNamespace(_stages=stages) if several else SimpleNamespace(_stage=stages[0])
    given = (schedule, ["a part"], True, False)
    monkeypatch.setattr(pipeline, "pipeline_llm", lambda *args: given if args == ("the model", 1, 2) else None)
    assert pipeline.pipeline_momoe_llama("the model", 1, 2) == given
    assert pipeline.stages_of(schedule) == stages
    for stage in stages:
        assert stage._prepare_forward_infra(3, microbatches=4) == ((3,), {"microbatches": 4})
    assert not total.any()
