"""Applies parallelism, activation checkpointing and torch.compile to a model, with TorchTitan's functions."""

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.models.llama3.infra.parallelize import apply_compile as compile_whole_blocks
from torchtitan.models.llama3.infra.parallelize import apply_ddp, disable_fsdp_gradient_division
from torchtitan.models.llama4.infra.parallelize import apply_compile, apply_fsdp
from torchtitan.tools.logging import logger

from momoe_titan.config.compile import compiles_model
from momoe_titan.config.section import STOCK_BACKEND
from momoe_titan.model.experts import MomoeExperts
from momoe_titan.model.model import MomoeLlama, blocks_of
from momoe_titan.model.parallel.activation_checkpoint import apply_activation_checkpointing
from momoe_titan.model.parallel.expert import apply_expert_parallel
from momoe_titan.model.parallel.tensor import apply_tp


def parallelize_momoe_llama(model: MomoeLlama, parallel_dims: ParallelDims, job_config: JobConfig) -> MomoeLlama:
    """Apply what the job asks for, in TorchTitan's order.

    The model is on the meta device, or is a pipeline stage of such a model. Settings that cannot
    work were refused before, by `MomoeLlamaArgs.update_from_config`.
    """
    if parallel_dims.ep_enabled:
        apply_expert_parallel(model, parallel_dims)
    if parallel_dims.tp_enabled:
        apply_tp(model, parallel_dims, not job_config.parallelism.disable_loss_parallel)
        model.tie_weights()  # tensor parallelism has made two weights of the shared one
        maybe_enable_async_tp(job_config, parallel_dims.get_mesh("tp"))
    if parallel_dims.cp_enabled:
        apply_cp_to_attention_module(
            [block.attention.inner_attention for block in blocks_of(model)],
            parallel_dims.get_mesh("cp"),
            model.model_args.attn_type,
        )

    compiled = compiles_model(job_config)
    whole = compiled and not parallel_dims.ep_enabled
    apply_activation_checkpointing(model, job_config, blocks_compiled=whole)
    if compiled:
        if parallel_dims.tp_enabled and model.tok_embeddings is not None:
            # torch 2.13: a compiled block whose input is still being gathered loses the layout of
            # the gradient. A copy waits for the gather.
            model.tok_embeddings.register_forward_hook(lambda module, args, out: out.clone())
        _compile(model, job_config, parallel_dims.ep_enabled)

    if parallel_dims.fsdp_enabled:
        _shard(model, parallel_dims, job_config)
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=compiled)
    return model


def _shard(model: MomoeLlama, parallel_dims: ParallelDims, job_config: JobConfig) -> None:
    """Apply FSDP or HSDP."""
    training = job_config.training
    replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    mesh = parallel_dims.get_mesh([*replicate, "fsdp"])
    param_dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    reduce_dtype = TORCH_DTYPE_MAP[training.mixed_precision_reduce]
    ends: dict[str, nn.Module] = {}
    if model.model_args.tie_word_embeddings:
        # A weight that two modules share must be in one FSDP group, and TorchTitan makes two: it does not see these.
        ends = {name: model.get_submodule(name) for name in ("tok_embeddings", "norm", "output")}
        offload = CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy()
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        # The group's modules begin and end the forward: there is nothing to free in between.
        fully_shard(
            list(ends.values()), mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False
        )
        for name in ends:
            setattr(model, name, None)
    apply_fsdp(
        model,
        mesh,
        param_dtype=param_dtype,
        reduce_dtype=reduce_dtype,
        pp_enabled=parallel_dims.pp_enabled,
        cpu_offload=training.enable_cpu_offload,
        reshard_after_forward_policy=job_config.parallelism.fsdp_reshard_after_forward,
        ep_degree=parallel_dims.ep,
        edp_mesh=parallel_dims.get_optional_mesh([*replicate, "efsdp"]),
        gradient_divide_factor=parallel_dims.fsdp_gradient_divide_factor,
    )
    for name, module in ends.items():
        setattr(model, name, module)
    disable_fsdp_gradient_division(model)  # also in the group that TorchTitan did not see
    if mesh.device_type == "cpu":
        _reduce_by_sums(model)
    _warn_of_ranks_without_experts(model, parallel_dims)
    logger.info(f"Applied {'HSDP' if replicate else 'FSDP'} to the model")


def _warn_of_ranks_without_experts(model: MomoeLlama, parallel_dims: ParallelDims) -> None:
    """Warn where FSDP, which gives each expert to one rank as a whole, has more ranks than experts."""
    ranks = parallel_dims.get_mesh("fsdp").size()
    experts = [block.moe.num_experts for block in blocks_of(model) if block.moe_enabled]
    if experts and not parallel_dims.ep_enabled and ranks > min(experts):
        logger.warning(
            f"FSDP over {ranks} ranks leaves {ranks - min(experts)} of them without any of the {min(experts)} "
            "experts, and the others with that much more: set parallelism.expert_parallel_degree, or replicate (HSDP)"
        )


def _compile(model: MomoeLlama, job_config: JobConfig, ep_enabled: bool) -> None:
    """Compile each block as a whole, which works because our experts are one op and break no graph.

    Blocks with the same save_percent share one graph. Under expert parallelism the experts are an
    FSDP module of their own, whose hooks no graph can hold, and the MoE layer's number of tokens
    differs from step to step. There the parts around the MoE layer are compiled one by one, and the
    layer itself is not. Stock MoE layers get what TorchTitan does.
    """
    config = job_config.compile
    if model.model_args.backend == STOCK_BACKEND:
        apply_compile(model, config, ep_enabled)
    elif ep_enabled:
        for block in blocks_of(model):
            ffn = block.moe.shared_experts if block.moe_enabled else block.feed_forward
            # Not the norms: their forward is torch's own, which dynamo does not compile on its own.
            for part in (block.attention, ffn):
                if part is not None:
                    part.compile(backend=config.backend, fullgraph=True)
    else:
        dynamo = torch._dynamo.config
        # Otherwise a second value of save_percent would become a run-time value of the graph.
        dynamo.specialize_float = True
        # Each value has graphs for training and for validation, with two numbers of tokens in each.
        experts = [block.moe.experts for block in blocks_of(model) if block.moe_enabled]
        values = {layer.save_percent for layer in experts if isinstance(layer, MomoeExperts)}
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * (1 + len(values)))
        compile_whole_blocks(model, config)


def _reduce_by_sums(model: MomoeLlama) -> None:
    """Make FSDP sum gradients over ranks without dividing them.

    TorchTitan asks for gradients divided by 1, for which FSDP uses a reduction that gloo lacks.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
