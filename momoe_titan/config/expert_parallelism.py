"""What of a job's expert parallelism does not work, found when the configuration is read."""

import os

import torch
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.model_args import ModelArgs
from momoe_titan.config.section import OUR_BACKENDS


def check_expert_parallel(model_args: ModelArgs, job_config: JobConfig) -> None:
    """Refuse an expert parallelism that cannot work.

    Raises:
        ValueError: names the field and its value.
    """
    config = job_config.parallelism
    ep, etp = config.expert_parallel_degree, config.expert_tensor_parallel_degree
    tp, num_experts = config.tensor_parallel_degree, model_args.moe_args.num_experts
    section = "parallelism."
    if ep < 1:
        raise ValueError(f"{section}expert_parallel_degree is {ep}, must be at least 1")
    if ep == 1:
        if etp != 1:
            logger.warning(
                f"{section}expert_tensor_parallel_degree = {etp} has no effect with {section}expert_parallel_degree = 1"
            )
        return
    if etp not in (1, tp):
        raise ValueError(
            f"{section}expert_tensor_parallel_degree is {etp}, must be 1 or {section}tensor_parallel_degree, {tp}"
        )
    if model_args.backend not in OUR_BACKENDS and tp > 1:
        raise ValueError(
            f"{section}expert_parallel_degree is {ep}, must be 1 for momoe.backend = "
            f"{model_args.backend!r} with {section}tensor_parallel_degree above 1"
        )
    if num_experts % ep:
        raise ValueError(
            f"{section}expert_parallel_degree is {ep}, must divide the number of experts, "
            f"moe_args.num_experts = {num_experts}"
        )
    if config.expert_parallel_comm_backend != "standard":
        raise ValueError(
            f"{section}expert_parallel_comm_backend is {config.expert_parallel_comm_backend!r}, "
            "must be 'standard': momoe_titan has a dispatch of its own"
        )
    overlap = config.pipeline_parallel_expert_parallel_overlap
    schedule = config.pipeline_parallel_schedule
    if config.pipeline_parallel_degree > 1 and overlap and schedule.lower() == "dualpipev":
        raise ValueError(
            f"{section}pipeline_parallel_expert_parallel_overlap is {overlap}, must be false: "
            f"{section}pipeline_parallel_schedule = {schedule!r} cannot interleave with our dispatch"
        )
    if job_config.optimizer.early_step_in_backward:
        raise ValueError(
            f"optimizer.early_step_in_backward is True, must be False where {section}expert_parallel_degree is above 1"
        )
    if model_args.backend not in OUR_BACKENDS and not torch.cuda.is_available():
        raise ValueError(
            f"{section}expert_parallel_degree is {ep}, must be 1 for momoe.backend = "
            f"{model_args.backend!r} on a CPU: TorchTitan's dispatch has a kernel for GPUs only"
        )

    shard = config.data_parallel_shard_degree
    outer = config.data_parallel_replicate_degree * config.pipeline_parallel_degree
    if shard == -1:
        if "WORLD_SIZE" not in os.environ:
            return
        inner = config.context_parallel_degree * tp
        shard = int(os.environ["WORLD_SIZE"]) // (outer * inner)
    fsdp = shard * config.context_parallel_degree
    if fsdp == 1:
        raise ValueError(
            f"{section}expert_parallel_degree is {ep}, must be 1 without FSDP: "
            f"{section}data_parallel_shard_degree is {shard}"
        )
    if (fsdp * tp) % (ep * etp):
        raise ValueError(
            f"{section}expert_parallel_degree is {ep}, must divide the {fsdp * tp // etp} ranks of "
            "data_parallel_shard_degree * context_parallel_degree * tensor_parallel_degree / "
            "expert_tensor_parallel_degree"
        )
    copies = fsdp * tp // (ep * etp)
    widths = {"dim": model_args.dim, "moe_hidden_dim": model_args.moe_hidden_dim}
    if copies * ep > num_experts and any(width % copies for width in widths.values()):
        # TorchTitan then shards the experts' second dimension, which FSDP cannot do unevenly.
        raise ValueError(
            f"{section}expert_parallel_degree is {ep}, which leaves {copies} ranks to share "
            f"{num_experts // ep} experts: {copies} must divide all of {widths}"
        )
