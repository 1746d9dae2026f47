"""Checks data, tensor and context parallelism, and that all degrees fit the number of processes."""

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.checks.pipeline_parallel import check_pipeline_parallel
from momoe_titan.config.compile import compiles_model
from momoe_titan.config.machine import Machine
from momoe_titan.config.model_args import ModelArgs
from momoe_titan.config.section import AUTOCAST, Momoe

DEGREES = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "pipeline_parallel", "context_parallel")


def check_parallelism(args: ModelArgs, job_config: JobConfig, machine: Machine) -> None:
    """Refuse a parallelism that the model, TorchTitan 0.2.2 or torch cannot do.

    Raises:
        ValueError: names the field, as written in TOML, its value, and the reason.
    """
    _check_degrees(job_config, machine.world_size)
    _check_tensor_parallel(args, job_config)
    _check_context_parallel(args, job_config)
    if job_config.parallelism.pipeline_parallel_degree > 1:
        check_pipeline_parallel(args, job_config)


def _check_degrees(job_config: JobConfig, world_size: int | None) -> None:
    degrees = [getattr(job_config.parallelism, f"{name}_degree") for name in DEGREES]
    for name, degree in zip(DEGREES, degrees, strict=True):
        if degree < 1 and not (name == "data_parallel_shard" and degree == -1):
            raise ValueError(f"parallelism.{name}_degree is {degree}, must be at least 1")
    replicate, shard, tp, pp, cp = degrees
    others = replicate * tp * pp * cp
    if world_size and (world_size % others or (shard != -1 and shard * others != world_size)):
        given = " * ".join(f"{name}_degree" for name in DEGREES)
        raise ValueError(
            f"parallelism.{given} is {replicate} * {shard} * {tp} * {pp} * {cp}, must be the number "
            f"of processes, {world_size}"
        )
    if shard == -1 and world_size:
        shard = world_size // others
    if shard != -1:
        _check_accumulation(job_config, replicate * shard)
    if shard == cp == 1:
        _warn_of_float32(job_config)
    if replicate > 1 and shard == cp == 1 and tp * pp > 1:
        raise ValueError(
            f"parallelism.data_parallel_replicate_degree is {replicate} with "
            f"data_parallel_shard_degree 1, tensor_parallel_degree {tp} and "
            f"pipeline_parallel_degree {pp}: DistributedDataParallel does not compose with these. "
            "Set data_parallel_shard_degree above 1 (HSDP), or shard in place of replicating"
        )


def _warn_of_float32(job_config: JobConfig) -> None:
    """TorchTitan 0.2.2 takes autocast only where there is no other parallelism."""
    training = job_config.training
    if getattr(job_config, "momoe", Momoe()).mixed_precision != AUTOCAST:
        return
    given = [f"{name}_degree {degree}" for name in ("tensor_parallel", "pipeline_parallel")
             if (degree := getattr(job_config.parallelism, f"{name}_degree")) > 1]  # fmt: skip
    if given and training.mixed_precision_param != training.dtype:
        logger.warning(
            f"training.mixed_precision_param = {training.mixed_precision_param!r} HAS NO EFFECT: the job computes in "
            f"{training.dtype}, several times slower, because parallelism.{' and '.join(given)} stand without FSDP, "
            'where momoe.mixed_precision = "autocast" does not work. Set it to "weights"'
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
    if args.has_dense_layers:
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
    if parallelism.disable_loss_parallel and getattr(job_config, "momoe", Momoe()).loss_chunk_mib > 0:
        logger.warning(
            "parallelism.disable_loss_parallel = true HAS NO EFFECT: each rank computes its part of the vocabulary, "
            "unless momoe.loss_chunk_mib is 0"
        )
    if parallelism.enable_async_tensor_parallel and not compiles_model(job_config):
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
    if args.document_mask:
        raise ValueError(
            f"parallelism.context_parallel_degree is {cp}, must be 1 with momoe.document_mask: the documents of a "
            "sequence would lie on several ranks"
        )
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
