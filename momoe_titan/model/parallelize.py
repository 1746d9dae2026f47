"""Activation checkpointing, torch.compile and parallelism, by TorchTitan's pieces."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import JobConfig, TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.models.llama3.infra.parallelize import apply_ddp
from torchtitan.models.llama4.infra.parallelize import (
    _op_sac_save_list as LLAMA4_SAVED_OPS,
    apply_compile,
    apply_fsdp,
)
from torchtitan.tools.logging import logger

from momoe_titan.kernels import momoe_mlp  # noqa: F401 - registers the op below

from .checkpoint import allow_missing_balance_state
from .expert_parallel import apply_expert_parallel

# What selective checkpointing by op keeps. With the op's outputs kept, save_percent decides what
# the backward computes again of the experts.
SAVED_OPS = frozenset(LLAMA4_SAVED_OPS) | {torch.ops.momoe_titan.moe_forward.default}


def parallelize_momoe_llama(
    model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    """Apply what the job asks for, in TorchTitan's order, to a model on the meta device.

    Other parallelisms than data and expert parallelism are refused by `MomoeLlamaArgs.update_from_config`.
    """
    allow_missing_balance_state(model, job_config)

    if parallel_dims.ep_enabled:
        apply_expert_parallel(model, parallel_dims)

    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if job_config.activation_checkpoint.mode != "none":
        apply_ac(
            model,
            job_config.activation_checkpoint,
            model_compile_enabled=compiled,
            op_sac_save_list=set(SAVED_OPS),
            base_folder=job_config.job.dump_folder,
        )
    if compiled:
        apply_compile(model, job_config.compile, parallel_dims.ep_enabled)

    if parallel_dims.fsdp_enabled:
        replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
        mesh = parallel_dims.get_mesh([*replicate, "fsdp"])
        apply_fsdp(
            model,
            mesh,
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=False,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
            ep_degree=parallel_dims.ep,
            edp_mesh=parallel_dims.get_optional_mesh([*replicate, "efsdp"]),
            gradient_divide_factor=parallel_dims.fsdp_gradient_divide_factor,
        )
        if mesh.device_type == "cpu":
            _reduce_by_sums(model)
        logger.info(f"Applied {'HSDP' if replicate else 'FSDP'} to the model")
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=compiled)
    return model


def _reduce_by_sums(model: nn.Module) -> None:
    """TorchTitan asks FSDP for gradients divided by 1, which FSDP takes to a reduction that
    gloo does not have; as a sum it does."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
