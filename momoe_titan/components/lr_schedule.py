"""TorchTitan's learning-rate schedules, which quantile balancing follows."""

from torch.optim.lr_scheduler import LambdaLR
from torchtitan.components.lr_scheduler import LRSchedulersContainer, build_lr_schedulers
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import LRScheduler as LRSchedulerConfig

from momoe_titan.components.load_balancer import ExpertLoadBalancer


def build_momoe_lr_schedulers(
    optimizers: OptimizersContainer, lr_scheduler_config: LRSchedulerConfig, training_steps: int
) -> LRSchedulersContainer:
    """TorchTitan's schedules; the load balancer of the optimizers averages by them (see `averages_by`)."""
    schedulers = build_lr_schedulers(optimizers, lr_scheduler_config, training_steps)
    balancer, schedule = getattr(optimizers, "load_balancer", None), schedulers.schedulers[0]
    if isinstance(balancer, ExpertLoadBalancer) and isinstance(schedule, LambdaLR):
        averages_by(balancer, schedule, int(lr_scheduler_config.warmup_steps))
    return schedulers


def averages_by(balancer: ExpertLoadBalancer, schedule: LambdaLR, warmup_steps: int) -> None:
    """Let the balancer average over more steps as the learning rate falls behind its warm-up.

    The solved bias moves from step to step for two reasons: the weights move, in proportion to the
    learning rate, and each step has other tokens. An average follows the first and evens out the
    second. The less the weights move, the longer it may be, so that at the end of a schedule the
    bias fits the text and not the last step. The schedule's position is in the checkpoint.
    """

    def factor() -> float:
        step = schedule.last_epoch
        return 1.0 if step < warmup_steps else schedule.lr_lambdas[0](step)

    balancer.average_factor = factor
