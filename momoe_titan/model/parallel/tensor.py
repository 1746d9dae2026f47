"""Tensor parallelism: TorchTitan's for all but the MoE layers, and ours for these.

Between the layers a rank holds its part of the sequence. An MoE layer lets the router work on this
part while all parts are gathered, has every rank compute its columns of all experts' hidden
dimension for all tokens, and sums and scatters the partial outputs in one reduce-scatter. Each
token is routed on one rank, so the ranks cannot disagree about it.

Inside the layer every gradient with respect to a gathered tensor is the rank's share of a sum: that
of x, and that of the scores too, as <dact, act> over the rank's columns only. The backward of each
gather sums them, as a reduce-scatter. What remains is the gradient of the router's weights, of
which each rank has the part of its own tokens: see `local_weight`.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    PrepareModuleInput,
    SequenceParallel,
    parallelize_module,
)
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama4.infra.parallelize import apply_non_moe_tp


def gather_rows(x_tD: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """(t, ...) of each rank -> (T, ...), the rows of rank 0 first; with a mesh of None, x.

    Does not wait: the gather is under way until the result is used. Gradients are taken for
    shares of a sum over the ranks.
    """
    if mesh is None:
        return x_tD
    x_TD = DTensor.from_local(x_tD, mesh, [Shard(0)], run_check=False)
    x_TD = x_TD.redistribute(placements=[Replicate()], async_op=True)
    return x_TD.to_local(grad_placements=[Partial()])


def sum_and_scatter_rows(x_TD: torch.Tensor, mesh: DeviceMesh | None) -> torch.Tensor:
    """(T, ...) of each rank -> (t, ...), the rank's rows of the sum; with a mesh of None, x."""
    if mesh is None:
        return x_TD
    x_TD = DTensor.from_local(x_TD, mesh, [Partial()], run_check=False)
    return x_TD.redistribute(placements=[Shard(0)]).to_local()


def local_weight(weight: torch.Tensor) -> torch.Tensor:
    """What a rank computes with: its shard of a weight, or the whole where it is replicated.

    The gradient of a replicated weight is that of the rank's own tokens, and is summed.
    """
    if not isinstance(weight, DTensor):
        return weight
    grads = [Partial() if p.is_replicate() else p for p in weight.placements]
    return weight.to_local(grad_placements=grads)


def apply_tp(model: nn.Module, parallel_dims: ParallelDims, loss_parallel: bool) -> None:
    """Apply tensor and sequence parallelism to a model, or to a pipeline stage of it.

    Expert parallelism, which comes first, shards the experts' weights itself.
    """
    mesh = parallel_dims.get_mesh("tp")
    apply_non_moe_tp(model, mesh, loss_parallel, enable_float8_tensorwise_tp=False)
    for block in model.layers.values():
        if block.attention.q_norm is not None:
            # a rank's heads, dimension 2 of (B, L, heads, head_dim), are to this what part of a
            # sequence is to the other norms
            per_head = SequenceParallel(sequence_dim=2, use_local_output=True)
            parallelize_module(block.attention, mesh, {"q_norm": per_head, "k_norm": per_head})
        if block.moe_enabled:
            _apply_moe_tp(block.moe, mesh, parallel_dims)


def _apply_moe_tp(moe: nn.Module, mesh: DeviceMesh, parallel_dims: ParallelDims) -> None:
    # ffn_norm hands over a DTensor
    parallelize_module(
        moe,
        mesh,
        PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Shard(1),), use_local_output=True),
    )
    shard(moe.router.gate, mesh, {"weight": Replicate(), "bias": Replicate()})
    if not parallel_dims.ep_enabled:
        shard(moe.experts, mesh, moe.experts_tp_placements)
    # Where expert parallelism borrows these ranks, each sends the tokens of its own part of the
    # sequence: nothing is gathered, and the shared experts work on this part too.
    borrowed = parallel_dims.ep_enabled and not parallel_dims.etp_enabled
    moe.tp_mesh = None if borrowed else mesh
    if moe.shared_experts is not None:
        for name, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
            placement = Replicate() if borrowed else Shard(dim)
            shard(getattr(moe.shared_experts, name), mesh, {"weight": placement})


def shard(module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Make DTensors of a module's own parameters."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        sharded = distribute_tensor(parameter, mesh, [placements[name]])
        module.register_parameter(name, nn.Parameter(sharded))
