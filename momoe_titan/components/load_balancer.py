"""Finds the MoE layers of a model whose biases an optimizer step moves."""

from torch import nn
from torch.distributed import ProcessGroup

from momoe_titan.model.moe import BalancedMoE
from momoe_titan.moe.load_balancer import LoadBalancer


class ExpertLoadBalancer(LoadBalancer):
    """The `LoadBalancer` of all MoE layers of a model.

    Args:
        model_parts: modules to search for MoE layers.
        process_group: the data- and context-parallel ranks, or None for one.
        tp_group: the tensor-parallel ranks, if each counts tokens of its own, which is so where
            expert parallelism uses them as its ranks; None if all of them count the same tokens.
        router_group: the tensor-parallel ranks, if they count the same tokens but each router sees
            tokens of its own.
    """

    layers: list[BalancedMoE]

    def __init__(
        self,
        model_parts: list[nn.Module],
        process_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
        router_group: ProcessGroup | None = None,
    ):
        layers = [module for part in model_parts for module in part.modules() if isinstance(module, BalancedMoE)]
        super().__init__(layers, [group for group in (process_group, tp_group) if group is not None], router_group)
