"""The optimizers of a job, with load balancing and the guard against NaN gradients as step hooks."""

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims

from momoe_titan.components.non_finite import NonFiniteGuard
from momoe_titan.model.moe import BalancedMoE
from momoe_titan.moe.balancing import bias_delta


class ExpertLoadBalancer:
    """Optimizer step pre-hook that moves the biases of all MoE layers by their token counts.

    The layers count tokens over all microbatches of a step. The hook sums these counts over the
    ranks that route different tokens, so that every rank moves its biases alike, and starts the
    counts again at 0. It never waits for the device. A layer with balancing off keeps its bias; its
    tokens are counted all the same.

    Where the optimizer is told to skip a step (its `found_inf` is 1, see `non_finite`), no bias
    moves, because NaN activations choose any experts. A loop that does not call the optimizer at
    all carries the counts over into the next step.

    Args:
        model_parts: modules to search for MoE layers.
        process_group: the data- and context-parallel ranks, or None for one.
        tp_group: the tensor-parallel ranks, if each counts tokens of its own, which is so where
            expert parallelism uses them as its ranks; None if all of them count the same tokens.

    Attributes:
        counts_LE: (MoE layers, E) int64 on the device, tokens per expert of the last step over all
            ranks; None before the first step or without MoE layers.

    Raises:
        ValueError: layers that differ in number of experts or rule, or, where on, in rate.
    """

    def __init__(
        self,
        model_parts: list[nn.Module],
        process_group: ProcessGroup | None = None,
        tp_group: ProcessGroup | None = None,
    ):
        self.layers = [module for part in model_parts for module in part.modules() if isinstance(module, BalancedMoE)]
        self.groups = [group for group in (process_group, tp_group) if group is not None]
        self.counts_LE: torch.Tensor | None = None
        self.balanced = [i for i, layer in enumerate(self.layers) if layer.load_balance_rate]
        rates = {self.layers[i].load_balance_rate for i in self.balanced}
        rules = {self.layers[i].load_balance_rule for i in self.balanced}
        sizes = {layer.num_experts for layer in self.layers}
        alike: dict[str, set] = {"num_experts": sizes, "load_balance_rate": rates, "load_balance_rule": rules}
        for name, values in alike.items():
            if len(values) > 1:
                raise ValueError(f"{name} must be the same in all MoE layers, got {sorted(values)}")
        self.rate, self.rule = (rates.pop(), rules.pop()) if self.balanced else (0.0, "sign")

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer | None = None, *hook_args) -> None:
        """The hook. Of its arguments it reads `optimizer.found_inf` alone, if there is one."""
        if not self.layers:
            return
        counts_LE = torch.stack([layer.tokens_per_expert for layer in self.layers])
        for group in self.groups:
            torch.distributed.all_reduce(counts_LE, group=group)
        if self.balanced:
            delta_LE = bias_delta(counts_LE, self.rate, self.rule)
            if (found_inf := getattr(optimizer, "found_inf", None)) is not None:
                delta_LE = delta_LE * (1 - found_inf)
            # In place, because checkpoints keep a reference.
            torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage] - torch has no public name for it
                [self.layers[i].expert_bias for i in self.balanced],
                [delta_LE[i] for i in self.balanced],
            )
        totals = [layer.tokens_per_expert for layer in self.layers]
        torch._foreach_zero_(totals)  # pyright: ignore[reportPrivateImportUsage] - torch has no public name for it
        self.counts_LE = counts_LE


def build_momoe_optimizers(
    model_parts: list[nn.Module],
    optimizer_config: OptimizerConfig,
    parallel_dims: ParallelDims,
    ft_manager=None,
) -> OptimizersContainer:
    """TorchTitan's optimizers, with our step hooks registered.

    Before a step run `non_finite_guard` and then `load_balancer`, both also attributes of the
    result. After a step runs each model part's `auto_save_percent`, where it has one.
    """
    optimizers = build_optimizers(model_parts, optimizer_config, parallel_dims, ft_manager)
    loss_mesh = parallel_dims.get_optional_mesh("loss")
    group = None if loss_mesh is None else loss_mesh.get_group()
    tp_group = None
    if parallel_dims.tp_enabled and parallel_dims.ep_enabled and not parallel_dims.etp_enabled:
        tp_group = parallel_dims.get_mesh("tp").get_group()
    balancer = ExpertLoadBalancer(model_parts, group, tp_group)
    for name, hook in (("non_finite_guard", NonFiniteGuard()), ("load_balancer", balancer)):
        setattr(optimizers, name, hook)
        optimizers.register_step_pre_hook(hook)
    for part in model_parts:
        if (auto := getattr(part, "auto_save_percent", None)) is not None:
            optimizers.register_step_post_hook(auto)
    return optimizers
