"""Expert parallelism applied to a model: which rank owns which experts.

gathered.py or dispatch.py moves the tokens.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.expert_parallel import ExpertParallel as TitanExpertParallel

from momoe_titan.model.args import MomoeLlamaArgs
from momoe_titan.model.model import blocks_of
from momoe_titan.model.moe import MomoeMoE
from momoe_titan.model.parallel.dispatch import Dispatcher
from momoe_titan.model.parallel.gathered import TokenGatherer, gathers_tokens


class ExpertParallel(ParallelStyle):
    """Gives each rank E/P experts of a `MomoeExperts`, which is then called as (x_MD, ReceivedChoice).

    Args:
        tp_placements: how each weight is sharded over the mesh's second dimension, where there is
            one: the tensor-parallel ranks that split an expert's hidden dimension.
    """

    def __init__(self, tp_placements: dict[str, Placement]):
        self.tp_placements = tp_placements

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            self._partition,
            self._unpack,  # pyright: ignore[reportArgumentType] - typed as returning None; its result is used
        )

    def _partition(self, _: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in list(module.named_parameters(recurse=False)):
            placements = [Shard(0)] if mesh.ndim == 1 else [Shard(0), self.tp_placements[name]]
            sharded = distribute_tensor(parameter, mesh, placements)
            module.register_parameter(name, nn.Parameter(sharded))

    @staticmethod
    def _unpack(module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> tuple:
        x_MD, choice = inputs
        return x_MD, choice.ids_MK, choice.scores_MK, choice.num_rows, choice.usual_rows, choice.outlet


def apply_expert_parallel(model: nn.Module, parallel_dims: ParallelDims) -> None:
    """Spread the experts of all MoE layers over the expert-parallel ranks of `parallel_dims`.

    TorchTitan's own layer gets TorchTitan's own expert parallelism.
    """
    mesh = parallel_dims.get_mesh("ep")
    experts_mesh = parallel_dims.get_optional_mesh(["ep", "etp"]) or mesh
    for block in blocks_of(model):
        if not block.moe_enabled:
            continue
        moe = block.moe
        if isinstance(moe, MomoeMoE):
            args: MomoeLlamaArgs = model.model_args  # pyright: ignore[reportAssignmentType] - of every model of ours
            spread_experts(moe, mesh, experts_mesh, args.expert_dispatch)
        else:
            parallelize_module(moe.experts, mesh, TitanExpertParallel())


def spread_experts(moe: MomoeMoE, mesh: DeviceMesh, experts_mesh: DeviceMesh, dispatch: str) -> None:
    """Give each rank its experts of one layer, and the layer what moves tokens between the ranks.

    Args:
        moe: the layer, with all experts.
        mesh: the expert-parallel ranks.
        experts_mesh: the same, or those and the ranks that split an expert's hidden dimension.
        dispatch: `momoe.expert_dispatch`.
    """
    how = mesh.get_group(), moe.num_experts, moe.experts.backend
    if gathers_tokens(dispatch, mesh.size(), moe.router.top_k, moe.num_experts):
        moe.gatherer = TokenGatherer(*how)
    else:
        moe.dispatcher = Dispatcher(*how)
    parallelize_module(moe.experts, experts_mesh, ExpertParallel(moe.experts_tp_placements))
