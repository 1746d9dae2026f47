"""Tensor parallelism: TorchTitan's for everything but the MoE layers, and ours for these.

Between the layers a rank holds its part of the sequence. What an MoE layer does:

1. The router works on the rank's own part of the tokens, while all parts are gathered. Each token
   is routed on one rank, so that the ranks cannot disagree about it.
2. The rank computes its columns of every expert's hidden dimension, for all tokens.
3. One reduce-scatter sums the partial outputs and leaves each rank its part of the sequence.

In the backward, every gradient of a gathered tensor is a partial sum: that of x, and also that of
the scores, which is <dact, act> over the rank's columns. The backward of each gather sums them by a
reduce-scatter. The gradient of the router's weights comes from the rank's own tokens: `local_weight`
has it summed.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import PrepareModuleInput, SequenceParallel, parallelize_module
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama4.infra.parallelize import apply_non_moe_tp

from momoe_titan.model.model import blocks_of
from momoe_titan.model.moe import BalancedMoE
from momoe_titan.model.output import OutputLayer
from momoe_titan.model.stock_moe import StockMoE


def apply_tp(model: nn.Module, parallel_dims: ParallelDims, loss_parallel: bool) -> None:
    """Apply tensor and sequence parallelism to a model, or to a pipeline stage of it.

    To be called after expert parallelism, which shards the experts' weights itself.
    """
    mesh = parallel_dims.get_mesh("tp")
    output: OutputLayer | None = model.output  # pyright: ignore[reportAssignmentType] - of the model's
    if output is not None:
        # The layer gathers its input itself: TorchTitan's style would take the loss that it returns for logits.
        model.output = nn.Linear(1, mesh.size(), bias=False, device="meta")
    apply_non_moe_tp(model, mesh, loss_parallel, enable_float8_tensorwise_tp=False)
    if output is not None:
        model.output = output
        shard(output, mesh, {"weight": Shard(0)})
        output.gathers_logits = not loss_parallel
    for block in blocks_of(model):
        if block.attention.q_norm is not None:
            # A norm over each head is sharded by heads, dimension 2 of (B, L, heads, head_dim), as
            # the other norms are by the sequence.
            per_head = SequenceParallel(sequence_dim=2, use_local_output=True)
            parallelize_module(block.attention, mesh, {"q_norm": per_head, "k_norm": per_head})
        if block.moe_enabled:
            _apply_moe_tp(block.moe, mesh, parallel_dims)


def _apply_moe_tp(moe: BalancedMoE, mesh: DeviceMesh, parallel_dims: ParallelDims) -> None:
    # ffn_norm gives a DTensor
    parallelize_module(
        moe,
        mesh,
        PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Shard(1),), use_local_output=True),
    )
    shard(moe.router.gate, mesh, {"weight": Replicate(), "bias": Replicate()})
    if not parallel_dims.ep_enabled:
        shard(moe.experts, mesh, moe.experts_tp_placements)
    # Where expert parallelism uses these ranks as its own, each sends the tokens of its part of the
    # sequence: nothing is gathered, and the shared experts work on this part too.
    ep_uses_tp_ranks = parallel_dims.ep_enabled and not parallel_dims.etp_enabled
    moe.tp_mesh = None if ep_uses_tp_ranks else mesh
    # TorchTitan's layer gathers the sequences before its router.
    moe.router.sequence_mesh = None if isinstance(moe, StockMoE) else mesh
    if moe.shared_experts is not None:
        for name, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
            placement = Replicate() if ep_uses_tp_ranks else Shard(dim)
            shard(getattr(moe.shared_experts, name), mesh, {"weight": placement})


def shard(module: nn.Module, mesh: DeviceMesh, placements: dict[str, Placement]) -> None:
    """Turn a module's own parameters into DTensors, placed as `placements` says by name."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        sharded = distribute_tensor(parameter, mesh, [placements[name]])
        module.register_parameter(name, nn.Parameter(sharded))
