"""Checks the expert parallelism in `[parallelism]`."""

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.machine import Machine
from momoe_titan.config.model_args import ModelArgs
from momoe_titan.config.section import OUR_BACKENDS, Momoe


def check_expert_parallel(args: ModelArgs, job_config: JobConfig, machine: Machine) -> None:
    """Refuse an expert parallelism that cannot work.

    Raises:
        ValueError: names the field and its value.
    """
    config = job_config.parallelism
    ep, etp = config.expert_parallel_degree, config.expert_tensor_parallel_degree
    if ep < 1:
        raise ValueError(f"parallelism.expert_parallel_degree is {ep}, must be at least 1")
    if ep == 1:
        if etp != 1:
            logger.warning(
                f"parallelism.expert_tensor_parallel_degree = {etp} has no effect with "
                "parallelism.expert_parallel_degree = 1"
            )
        return
    _check_model(args, job_config)
    _check_settings_beside(args, job_config, machine)
    _check_ranks(args, job_config, machine)


def _check_model(args: ModelArgs, job_config: JobConfig) -> None:
    config = job_config.parallelism
    ep, etp, tp = (
        config.expert_parallel_degree,
        config.expert_tensor_parallel_degree,
        config.tensor_parallel_degree,
    )
    if etp not in (1, tp):
        raise ValueError(
            f"parallelism.expert_tensor_parallel_degree is {etp}, must be 1 or parallelism.tensor_parallel_degree, {tp}"
        )
    dispatch = getattr(job_config, "momoe", Momoe()).expert_dispatch
    if args.backend not in OUR_BACKENDS and dispatch != Momoe.expert_dispatch:
        logger.warning(f"momoe.expert_dispatch has no effect with momoe.backend = {args.backend!r}")
    if args.backend not in OUR_BACKENDS and tp > 1:
        raise ValueError(
            f"parallelism.expert_parallel_degree is {ep}, must be 1 for momoe.backend = "
            f"{args.backend!r} with parallelism.tensor_parallel_degree above 1"
        )
    if (num_experts := args.moe_args.num_experts) % ep:
        raise ValueError(
            f"parallelism.expert_parallel_degree is {ep}, must divide the number of experts, "
            f"moe_args.num_experts = {num_experts}"
        )


def _check_settings_beside(args: ModelArgs, job_config: JobConfig, machine: Machine) -> None:
    config = job_config.parallelism
    if (backend := config.expert_parallel_comm_backend) != "standard":
        raise ValueError(
            f"parallelism.expert_parallel_comm_backend is {backend!r}, must be 'standard': momoe_titan has a dispatch "
            "of its own"
        )
    overlap = config.pipeline_parallel_expert_parallel_overlap
    schedule = config.pipeline_parallel_schedule
    if config.pipeline_parallel_degree > 1 and overlap and schedule.lower() == "dualpipev":
        raise ValueError(
            f"parallelism.pipeline_parallel_expert_parallel_overlap is {overlap}, must be false: "
            f"parallelism.pipeline_parallel_schedule = {schedule!r} cannot interleave with our dispatch"
        )
    if job_config.optimizer.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward is True, must be False where parallelism.expert_parallel_degree is "
            "above 1"
        )
    if args.backend not in OUR_BACKENDS and not machine.has_gpu:
        raise ValueError(
            f"parallelism.expert_parallel_degree is {config.expert_parallel_degree}, must be 1 for momoe.backend = "
            f"{args.backend!r} on a CPU: TorchTitan's dispatch has a kernel for GPUs only"
        )


def _check_ranks(args: ModelArgs, job_config: JobConfig, machine: Machine) -> None:
    """The ranks that share the experts, where their number is known."""
    config = job_config.parallelism
    ep, etp, tp = (
        config.expert_parallel_degree,
        config.expert_tensor_parallel_degree,
        config.tensor_parallel_degree,
    )
    shard = config.data_parallel_shard_degree
    if shard == -1:
        if machine.world_size is None:
            return
        outer = config.data_parallel_replicate_degree * config.pipeline_parallel_degree
        shard = machine.world_size // (outer * config.context_parallel_degree * tp)
    fsdp = shard * config.context_parallel_degree
    if fsdp == 1:
        raise ValueError(
            f"parallelism.expert_parallel_degree is {ep}, must be 1 without FSDP: "
            f"parallelism.data_parallel_shard_degree is {shard}"
        )
    if (fsdp * tp) % (ep * etp):
        raise ValueError(
            f"parallelism.expert_parallel_degree is {ep}, must divide the {fsdp * tp // etp} ranks of "
            "data_parallel_shard_degree * context_parallel_degree * tensor_parallel_degree / "
            "expert_tensor_parallel_degree"
        )
    copies, num_experts = fsdp * tp // (ep * etp), args.moe_args.num_experts
    widths = {"dim": args.dim, "moe_hidden_dim": args.moe_hidden_dim}
    if copies * ep > num_experts and any(width % copies for width in widths.values()):
        # FSDP then shards the experts' second dimension, which it cannot do unevenly.
        raise ValueError(
            f"parallelism.expert_parallel_degree is {ep}, which leaves {copies} ranks to share "
            f"{num_experts // ep} experts: {copies} must divide all of {widths}"
        )
