"""What of a job's `[parallelism]` does not work, found when the configuration is read."""

import math
import os

from torch.distributed.pipelining.schedules import (
    PipelineScheduleSingle,
    get_schedule_class,
)
from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part

from momoe_titan.config.model_args import ModelArgs


def check_parallelism(args: ModelArgs, job_config: JobConfig) -> None:
    """Refuse what the model, TorchTitan 0.2.2 or torch cannot do.

    Raises:
        ValueError: names the field, as written in TOML, its value, and the reason.
    """
    _check_degrees(job_config)
    _check_tensor_parallel(args, job_config)
    _check_context_parallel(args, job_config)
    if job_config.parallelism.pipeline_parallel_degree > 1:
        _check_pipeline_parallel(args, job_config)


def _check_degrees(job_config: JobConfig) -> None:
    degrees = job_config.parallelism
    names = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel")
    names += ("pipeline_parallel", "context_parallel")
    replicate, shard, tp, pp, cp = (getattr(degrees, f"{name}_degree") for name in names)
    for name, degree in zip(names, (replicate, shard, tp, pp, cp)):
        if degree < 1 and not (name == "data_parallel_shard" and degree == -1):
            raise ValueError(f"parallelism.{name}_degree is {degree}, must be at least 1")
    others = replicate * tp * pp * cp
    world = int(os.environ.get("WORLD_SIZE", 0))  # of torchrun
    if world and (world % others or (shard != -1 and shard * others != world)):
        given = " * ".join(f"{name}_degree" for name in names)
        raise ValueError(
            f"parallelism.{given} is {replicate} * {shard} * {tp} * {pp} * {cp}, must be the number "
            f"of processes, {world}"
        )
    if shard == -1 and world:
        shard = world // others
    if shard != -1:
        _check_accumulation(job_config, replicate * shard)
    if replicate > 1 and shard == cp == 1 and tp * pp > 1:
        raise ValueError(
            f"parallelism.data_parallel_replicate_degree is {replicate} with "
            f"data_parallel_shard_degree 1, tensor_parallel_degree {tp} and "
            f"pipeline_parallel_degree {pp}: DistributedDataParallel does not compose with these. "
            "Set data_parallel_shard_degree above 1 (HSDP), or shard in place of replicating"
        )


def _check_accumulation(job_config: JobConfig, replicas: int) -> None:
    training = job_config.training
    batch = replicas * training.local_batch_size
    if training.global_batch_size == -1:
        return
    if training.global_batch_size < 1 or training.global_batch_size % batch:
        raise ValueError(
            f"training.global_batch_size is {training.global_batch_size}, must be -1 or a multiple of {batch}: "
            f"training.local_batch_size, {training.local_batch_size}, on {replicas} data-parallel ranks"
        )
    takes_steps = not job_config.checkpoint.create_seed_checkpoint
    if takes_steps and job_config.optimizer.early_step_in_backward and training.global_batch_size > batch:
        raise ValueError(
            f"optimizer.early_step_in_backward is True with training.global_batch_size {training.global_batch_size}, "
            f"more than the {batch} of one backward: a step would be taken after each"
        )


def _check_tensor_parallel(args: ModelArgs, job_config: JobConfig) -> None:
    parallelism = job_config.parallelism
    tp = parallelism.tensor_parallel_degree
    if tp == 1:
        return
    kv_heads = args.n_heads if args.n_kv_heads is None else args.n_kv_heads
    widths = {"n_heads": args.n_heads, "n_kv_heads": kv_heads}
    if args.moe_layer_ids:
        widths["moe_hidden_dim"] = args.moe_hidden_dim
    if args.n_dense_layers:
        widths["dense_hidden_dim"] = args.dense_hidden_dim
    for name, width in widths.items():
        if width % tp:
            raise ValueError(
                f"parallelism.tensor_parallel_degree is {tp}, which does not divide {name}, "
                f"{width}: each rank computes as many of them"
            )
    if args.qk_norm == "full":
        raise ValueError(
            f"parallelism.tensor_parallel_degree is {tp}, must be 1 with qk_norm 'full': it "
            "normalises over all heads, of which each rank has some"
        )
    compiled = job_config.compile.enable and "model" in job_config.compile.components
    if parallelism.enable_async_tensor_parallel and not compiled:
        raise ValueError(
            "parallelism.enable_async_tensor_parallel is True, which needs compile.enable and "
            f"'model' in compile.components; they are {job_config.compile.enable} and "
            f"{job_config.compile.components}"
        )
    _check_seq_len(job_config, "tensor_parallel", tp)


def _check_context_parallel(args: ModelArgs, job_config: JobConfig) -> None:
    parallelism = job_config.parallelism
    cp = parallelism.context_parallel_degree
    if cp == 1:
        return
    if args.attn_type != "sdpa":
        raise ValueError(
            f"parallelism.context_parallel_degree is {cp} and attn_type {args.attn_type!r}: only "
            "'sdpa' attention can be split along the sequence"
        )
    if parallelism.context_parallel_load_balancer not in ("headtail", None):
        raise ValueError(
            "parallelism.context_parallel_load_balancer is "
            f"{parallelism.context_parallel_load_balancer!r}, must be 'headtail': the other one "
            "needs flex attention"
        )
    # two pieces per rank, each split by sequence parallelism
    _check_seq_len(job_config, "context_parallel", 2 * cp * parallelism.tensor_parallel_degree)


def _check_seq_len(job_config: JobConfig, name: str, divisor: int) -> None:
    degree = getattr(job_config.parallelism, f"{name}_degree")
    training, validation = job_config.training, job_config.validation
    for section, seq_len in (
        ("training", training.seq_len),
        ("validation", validation.seq_len if validation.enable else 0),
    ):
        if seq_len % divisor:
            raise ValueError(
                f"{section}.seq_len is {seq_len}, must be a multiple of {divisor} with "
                f"parallelism.{name}_degree {degree}"
            )


def _check_pipeline_parallel(args: ModelArgs, job_config: JobConfig) -> None:
    parallelism, training = job_config.parallelism, job_config.training
    pp, name = parallelism.pipeline_parallel_degree, parallelism.pipeline_parallel_schedule
    if job_config.optimizer.early_step_in_backward:
        raise ValueError(
            f"optimizer.early_step_in_backward is True with parallelism.pipeline_parallel_degree "
            f"{pp}: a parameter has a backward per microbatch"
        )
    try:
        schedule = get_schedule_class(name)
    except ValueError as e:
        raise ValueError(f"parallelism.pipeline_parallel_schedule: {e}") from e
    size = parallelism.pipeline_parallel_microbatch_size
    if size < 1 or training.local_batch_size % size:
        raise ValueError(
            f"parallelism.pipeline_parallel_microbatch_size is {size}, must divide "
            f"training.local_batch_size, {training.local_batch_size}"
        )
    stages = _number_of_stages(args, job_config, issubclass(schedule, PipelineScheduleSingle))
    microbatches = training.local_batch_size // size
    validation = job_config.validation
    if validation.enable and validation.local_batch_size % microbatches:
        raise ValueError(
            f"validation.local_batch_size is {validation.local_batch_size}, must be a multiple of the {microbatches} "
            "microbatches of training.local_batch_size and parallelism.pipeline_parallel_microbatch_size"
        )
    name = schedule.__name__
    if name in ("Schedule1F1B", "ScheduleDualPipeV") and microbatches < stages:
        raise ValueError(
            f"parallelism.pipeline_parallel_schedule needs a microbatch per stage, {stages}, but "
            f"there are {microbatches}: training.local_batch_size is "
            f"{training.local_batch_size}, pipeline_parallel_microbatch_size {size}"
        )
    rounds = max(1, microbatches // pp)
    in_rounds = name in ("ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")
    if in_rounds and microbatches % rounds:
        raise ValueError(
            f"parallelism.pipeline_parallel_schedule needs {microbatches} microbatches to be a "
            f"multiple of {rounds}, the rounds over {pp} ranks: training.local_batch_size is "
            f"{training.local_batch_size}, pipeline_parallel_microbatch_size {size}"
        )


def _number_of_stages(args: ModelArgs, job_config: JobConfig, single: bool) -> int:
    """As `torchtitan.distributed.pipeline_parallel.pipeline_llm` cuts the model."""
    parallelism = job_config.parallelism
    pp = parallelism.pipeline_parallel_degree
    per_stage = parallelism.pipeline_parallel_layers_per_stage
    first = parallelism.pipeline_parallel_first_stage_less_layers
    last = parallelism.pipeline_parallel_last_stage_less_layers
    if given := parallelism.module_fqns_per_model_part:
        field, stages = "module_fqns_per_model_part", len(given)
    elif per_stage is not None:
        field = "pipeline_parallel_layers_per_stage"
        stages = math.ceil((args.n_layers + first + last) / per_stage) if per_stage > 0 else 0
    else:
        field, stages = "pipeline_parallel_degree", pp if single else 2 * pp
    fits = stages == pp if single else stages >= 2 * pp and stages % pp == 0
    if not fits:
        raise ValueError(
            f"parallelism.{field} makes {stages} pipeline stages, but "
            f"{parallelism.pipeline_parallel_schedule} on {pp} ranks needs "
            + (f"{pp}" if single else f"a multiple of {pp}, at least {2 * pp}")
        )
    if given:
        layers = [f"layers.{i}" for i in range(args.n_layers)]
        modules = ["tok_embeddings", *layers, "norm", "output"]
        order = {name: i for i, name in enumerate(modules)}  # within a stage it has no effect
        named = [name for part in given for name in sorted(part, key=lambda name: order.get(name, -1))]
        if named != modules:
            raise ValueError(
                f"parallelism.module_fqns_per_model_part names {', '.join(named)}, must name each of "
                f"{', '.join(modules)} once, stage by stage in this order: a module that no stage has is left out"
            )
    else:
        try:
            generate_llm_fqn_per_model_part(stages, args.n_layers, first, last)
        except ValueError as e:
            raise ValueError(f"parallelism.{field} is {getattr(parallelism, field)}: {e}") from e
    return stages
