"""The optimizers of a job, with load balancing and the guard against NaN gradients as step hooks."""

from torch import nn
from torchtitan.components.ft import FTManager
from torchtitan.components.optimizer import OptimizersContainer, build_optimizers
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims

from momoe_titan.components.adamw import AdamW
from momoe_titan.components.load_balancer import ExpertLoadBalancer
from momoe_titan.components.non_finite import NonFiniteGuard


def build_momoe_optimizers(
    model_parts: list[nn.Module],
    optimizer_config: OptimizerConfig,
    parallel_dims: ParallelDims,
    ft_manager: FTManager | None = None,
) -> OptimizersContainer:
    """TorchTitan's optimizers, with our AdamW as the fused one and our step hooks registered.

    Before a step run `non_finite_guard` and then `load_balancer`, both also attributes of the
    result. After a step run `load_balancer.follow_gates` and each model part's `auto_save_percent`,
    where it has one.
    """
    optimizers = _build(model_parts, optimizer_config, parallel_dims, ft_manager)
    loss_mesh = parallel_dims.get_optional_mesh("loss")
    group = None if loss_mesh is None else loss_mesh.get_group()
    tp_group = router_group = None
    if parallel_dims.tp_enabled:
        router_group = parallel_dims.get_mesh("tp").get_group()
        if parallel_dims.ep_enabled and not parallel_dims.etp_enabled:
            tp_group, router_group = router_group, None
    balancer = ExpertLoadBalancer(model_parts, group, tp_group, router_group)
    pp_mesh = parallel_dims.get_optional_mesh("pp")
    guard = NonFiniteGuard(None if pp_mesh is None else pp_mesh.get_group())
    for name, hook in (("non_finite_guard", guard), ("load_balancer", balancer)):
        setattr(optimizers, name, hook)
        optimizers.register_step_pre_hook(hook)
    if balancer.solved:
        optimizers.register_step_post_hook(balancer.follow_gates)
    for part in model_parts:
        if (auto := getattr(part, "auto_save_percent", None)) is not None:
            optimizers.register_step_post_hook(auto)
    return optimizers


def _build(
    model_parts: list[nn.Module],
    config: OptimizerConfig,
    parallel_dims: ParallelDims,
    ft_manager: FTManager | None,
) -> OptimizersContainer:
    """Our AdamW where the job asks for a fused one that steps after the backward, or TorchTitan's choice."""
    with_torchft = ft_manager is not None and ft_manager.enabled
    is_ours = config.name == "AdamW" and config.implementation == "fused"
    if not is_ours or config.early_step_in_backward or with_torchft:
        return build_optimizers(model_parts, config, parallel_dims, ft_manager)
    options = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    return OptimizersContainer(model_parts, AdamW, options)
