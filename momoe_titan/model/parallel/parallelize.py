"""Applies parallelism, activation checkpointing and torch.compile to a model, with TorchTitan's functions."""

from typing import Any

import torch
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.context_parallel import apply_cp_to_attention_module
from torchtitan.distributed.tensor_parallel import maybe_enable_async_tp
from torchtitan.models.llama3.infra.parallelize import apply_compile as compile_whole_blocks
from torchtitan.models.llama3.infra.parallelize import apply_ddp
from torchtitan.models.llama4.infra.parallelize import apply_compile

from momoe_titan.config.compile import compiles_model
from momoe_titan.config.section import STOCK_BACKEND
from momoe_titan.model.experts import MomoeExperts
from momoe_titan.model.model import MomoeLlama, blocks_of
from momoe_titan.model.parallel.activation_checkpoint import apply_activation_checkpointing
from momoe_titan.model.parallel.expert import apply_expert_parallel
from momoe_titan.model.parallel.fsdp import apply_fsdp
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
        if parallel_dims.ep_enabled and model.model_args.backend != STOCK_BACKEND:
            checkpointing = job_config.activation_checkpoint.mode != "none"
            _compile_around_experts(model, job_config, in_two_parts=not (checkpointing or parallel_dims.tp_enabled))
        else:
            _compile(model, job_config, parallel_dims.ep_enabled)

    if parallel_dims.fsdp_enabled:
        apply_fsdp(model, parallel_dims, job_config)
    elif parallel_dims.dp_replicate_enabled:
        apply_ddp(model, parallel_dims.get_mesh("dp_replicate"), enable_compile=compiled)
    return model


def _compile(model: MomoeLlama, job_config: JobConfig, ep_enabled: bool) -> None:
    """Compile each block as a whole, which works because our experts are one op and break no graph.

    Blocks with the same save_percent share one graph. Stock MoE layers get what TorchTitan does.
    """
    config = job_config.compile
    if model.model_args.backend == STOCK_BACKEND:
        apply_compile(model, config, ep_enabled)
    else:
        dynamo = torch._dynamo.config
        # Otherwise a second value of save_percent would become a run-time value of the graph.
        dynamo.specialize_float = True
        # Each value has graphs for training and for validation, with two numbers of tokens in each.
        experts = [block.moe.experts for block in blocks_of(model) if block.moe_enabled]
        values = {layer.save_percent for layer in experts if isinstance(layer, MomoeExperts)}
        dynamo.recompile_limit = max(dynamo.recompile_limit, 4 * (1 + len(values)))
        compile_whole_blocks(model, config)


def _compile_around_experts(model: MomoeLlama, job_config: JobConfig, in_two_parts: bool) -> None:
    """Compile each block up to its experts and from there on, or else attention and shared experts one by one.

    Under expert parallelism the experts are an FSDP module of their own, whose hooks no graph can hold. Nor can one
    hold a layer that sends tokens to chosen ranks: their number differs from step to step.

    Args:
        in_two_parts: whether a block with a gatherer may be compiled in two parts. Not where activation checkpointing
            records ops inside of the layer, and not where tensor parallelism has hooks around it.
    """
    backend = job_config.compile.backend
    dynamo: Any = torch._dynamo.config
    # Graphs for training and for validation, with two numbers of tokens in each, and layers with and without balancing.
    dynamo.recompile_limit = max(dynamo.recompile_limit, 16)
    for block in blocks_of(model):
        if in_two_parts and block.moe_enabled and block.moe.gatherer is not None:
            block.compile_parts(backend)
            continue
        ffn = block.moe.shared_experts if block.moe_enabled else block.feed_forward
        # Not the norms: their forward is torch's own, which dynamo does not compile on its own.
        for part in (block.attention, ffn):
            if part is not None:
                part.compile(backend=backend, fullgraph=True)
