"""Starts to compile a job's kernels while its model is still being built."""

import os

import torch
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig

from momoe_titan.config.compile import compiles_model
from momoe_titan.config.flavor import MODEL_NAME, configured_args
from momoe_titan.config.section import AUTOCAST, OUR_BACKENDS, Momoe
from momoe_titan.kernels import compile_ahead
from momoe_titan.kernels.gpu import PlannedGpu
from momoe_titan.moe.balancing import QUANTILE
from momoe_titan.save_percent import AUTO

SOME_PERCENT = 50.0  # "auto" mostly ends between 0 and 100, where the kernels are the same


def layer_kernels(config: JobConfig) -> compile_ahead.LayerKernels | None:
    """What the kernels of this job's MoE layers depend on; None where it has none, or ranks share the layers."""
    momoe, parallelism = getattr(config, "momoe", Momoe()), config.parallelism
    shared = parallelism.expert_parallel_degree > 1 or parallelism.tensor_parallel_degree > 1
    if config.model.name != MODEL_NAME or shared or momoe.backend not in OUR_BACKENDS or momoe.backend == "torch":
        return None
    args, training = configured_args(config), config.training
    if not args.moe_layer_ids:
        return None
    moe, first = args.moe_args, args.moe_layer_ids[0]
    return compile_ahead.LayerKernels(
        num_tokens=training.local_batch_size * training.seq_len // parallelism.context_parallel_degree,
        d_model=args.dim,
        ffn=args.moe_hidden_dim,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        save_percent=SOME_PERCENT if momoe.save_percent == AUTO else args.layer_save_percent(first),
        compiled=compiles_model(config),
        route=(moe.score_func, moe.route_norm, moe.route_scale, True),
        num_classes=args.vocab_size if momoe.loss_chunk_mib > 0 else 0,
        counts_margins=bool(args.layer_load_balance_rate(first)) and args.load_balance_rule == QUANTILE,
    )


def step_kernels(config: JobConfig, layer: compile_ahead.LayerKernels, num_ranks: int) -> compile_ahead.StepKernels:
    """What the kernels of this job's optimizer step depend on, where nothing unusual changes it.

    A wrong guess takes time only: such kernels are compiled at their first launch.
    """
    args, training, optimizer, momoe = configured_args(config), config.training, config.optimizer, config.momoe  # pyright: ignore[reportAttributeAccessIssue] - a job with our layers
    own, narrow = TORCH_DTYPE_MAP[training.dtype], TORCH_DTYPE_MAP[training.mixed_precision_param]
    has_copies = num_ranks == 1 and own != narrow and momoe.mixed_precision != AUTOCAST  # FSDP has its own
    accumulates = training.global_batch_size > training.local_batch_size
    ours = optimizer.name == "AdamW" and optimizer.implementation == "fused"
    return compile_ahead.StepKernels(
        layer=layer,
        num_layers=len(args.moe_layer_ids),
        num_balanced=sum(bool(args.layer_load_balance_rate(i)) for i in args.moe_layer_ids),
        parameter=own,
        gradient=narrow if has_copies and ours and not accumulates else own,
        copy=narrow if has_copies else None,
        betas=(optimizer.beta1, optimizer.beta2) if ours else None,
    )


def compile_kernels_ahead(config: JobConfig) -> None:
    """Start to compile on the first rank of each machine. Does nothing without a GPU."""
    if not torch.cuda.is_available() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    layer = layer_kernels(config)
    if layer is not None:
        gpu = torch.cuda.get_device_properties(0)
        step = step_kernels(config, layer, int(os.environ.get("WORLD_SIZE", "1")))
        compile_ahead.start(layer, step, PlannedGpu((gpu.major, gpu.minor), gpu.multi_processor_count))
