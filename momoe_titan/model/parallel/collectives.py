"""Collectives of an MoE layer under tensor parallelism: gather, sum and scatter rows.

Without tensor parallelism the mesh is None and weights are plain tensors; everything passes through.
"""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def gather_rows(x_tD: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """(t, ...) of each rank -> (T, ...) on all ranks, the rows of rank 0 first.

    Does not wait: the gather runs until the result is used. The backward sums the ranks' gradients,
    each of which is a partial sum, and scatters them.
    """
    if mesh is None:
        return x_tD
    x_TD = DTensor.from_local(x_tD, mesh, [Shard(0)], run_check=False)
    x_TD = x_TD.redistribute(placements=[Replicate()], async_op=True)
    return x_TD.to_local(grad_placements=[Partial()])


def sum_and_scatter_rows(x_TD: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """(T, ...) of each rank -> (t, ...), this rank's rows of the sum over the ranks."""
    if mesh is None:
        return x_TD
    x_TD = DTensor.from_local(x_TD, mesh, [Partial()], run_check=False)
    return x_TD.redistribute(placements=[Shard(0)]).to_local()


def local_weight(weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this rank computes with: its shard, or all of a replicated weight.

    The gradient of a replicated weight comes from this rank's tokens alone and is summed over the
    ranks.
    """
    if not isinstance(weight, DTensor):
        return weight
    grads = [Partial() if p.is_replicate() else p for p in weight.placements]
    return weight.to_local(grad_placements=grads)
