"""Parallelism, activation checkpointing and torch.compile, by TorchTitan's pieces."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.models.llama3.infra.parallelize import (
    apply_compile as compile_whole_blocks,
)
from torchtitan.models.llama3.infra.parallelize import apply_ddp
from torchtitan.models.llama4.infra.parallelize import apply_compile, apply_fsdp
from torchtitan.tools.logging import logger

from momoe_titan.config.activation_checkpoint import compiles_model
from momoe_titan.config.section import STOCK_BACKEND
from momoe_titan.model.parallel.activation_checkpoint import (
    apply_activation_checkpointing,
)
from momoe_titan.model.parallel.expert import apply_expert_parallel
from momoe_titan.model.parallel.tensor import apply_tp


def parallelize_momoe_llama(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Apply what the job asks for, in TorchTitan's order, to a model on the meta device, or to a
    pipeline stage of it. What cannot work is refused by `MomoeLlamaArgs.update_from_config`.
    """
    if parallel_dims.ep_enabled:
        apply_expert_parallel(model, parallel_dims)
    if parallel_dims.tp_enabled:
        apply_tp(model, parallel_dims, not job_config.parallelism.disable_loss_parallel)
        maybe_enable_async_tp(job_config, parallel_dims.get_mesh("tp"))
    if parallel_dims.cp_enabled:
        apply_cp_to_attention_module(
            [block.attention.inner_attention for block in model.layers.values()],
            parallel_dims.get_mesh("cp"),
            model.model_args.attn_type,
        )

    compiled = compiles_model(job_config)
    whole = compiled and not parallel_dims.ep_enabled
    apply_activation_checkpointing(model, job_config, blocks_compiled=whole)
    if compiled:
        if parallel_dims.tp_enabled and model.tok_embeddings is not None:
            # A compiled block given a tensor that is still under way loses its gradient's layout
            # (torch 2.13); a copy is waited for.
            model.tok_embeddings.register_forward_hook(lambda module, args, out: out.clone())
        _compile(model, job_config, parallel_dims.ep_enabled)

    if parallel_dims.fsdp_enabled:
        replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
        mesh = parallel_dims.get_mesh([*replicate, "fsdp"])
        apply_fsdp(
            model,
            mesh,
            param_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
            pp_enabled=parallel_dims.pp_enabled,
            cpu_offload=job_config.training.enable_cpu_offload,
            reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
            ep_degree=parallel_dims.ep,
            edp_mesh=parallel_dims.get_optional_mesh([*replicate, "efsdp"]),
            gradient_divide_factor=parallel_dims.fsdp_gradient_divide_factor,
        )
        if mesh.device_type == "cpu":
            _reduce_by_sums(model)
        _warn_of_ranks_without_experts(model, parallel_dims)
        logger.info(f"Applied {'HSDP' if replicate else 'FSDP'} to the model")
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=compiled)
    return model


def _warn_of_ranks_without_experts(model: nn.Module, parallel_dims: ParallelDims) -> None:
    """FSDP shards experts by expert, so that no more ranks hold any than there are experts."""
    ranks = parallel_dims.fsdp_enabled and parallel_dims.get_mesh("fsdp").size()
    experts = [block.moe.experts.num_experts for block in model.layers.values() if block.moe_enabled]
    if experts and not parallel_dims.ep_enabled and ranks > min(experts):
        logger.warning(
            f"FSDP over {ranks} ranks leaves {ranks - min(experts)} of them without any of the {min(experts)} experts, and the "
            "others with that much more: set parallelism.expert_parallel_degree, or replicate (HSDP)"
        )


def _compile(model: nn.Module, job_config: JobConfig, ep_enabled: bool) -> None:
    """Compile each block whole: our experts are one op and break no graph. Blocks that differ in
    save_percent get a graph each, others share one.

    Under expert parallelism the experts are an FSDP module of their own, whose hooks no graph can
    hold: what is around them is compiled in parts, and the MoE, whose token counts differ from
    step to step, is not. Stock MoE layers get what TorchTitan does.
    """
    config = job_config.compile
    if model.model_args.backend == STOCK_BACKEND:
        apply_compile(model, config, ep_enabled)
    elif ep_enabled:
        for block in model.layers.values():
            ffn = block.moe.shared_experts if block.moe_enabled else block.feed_forward
            # not the norms, whose forward is torch's own, which dynamo does not compile by itself
            for part in (block.attention, ffn):
                if part is not None:
                    part.compile(backend=config.backend, fullgraph=True)
    else:
        dynamo = torch._dynamo.config
        # Else the second save_percent that a layer comes with would turn into a run-time value.
        dynamo.specialize_float = True
        # Each has graphs for training and validation, and for another number of tokens in each.
        differ = {b.moe.experts.save_percent for b in model.layers.values() if b.moe_enabled}
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * (1 + len(differ)))
        compile_whole_blocks(model, config)


def _reduce_by_sums(model: nn.Module) -> None:
    """TorchTitan asks FSDP for gradients divided by 1, which FSDP takes to a reduction that
    gloo does not have; as a sum it does."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
