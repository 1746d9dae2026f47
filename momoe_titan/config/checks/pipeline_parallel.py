"""Checks the pipeline parallelism in `[parallelism]`."""

import math

from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
from torchtitan.config import JobConfig
from torchtitan.distributed.pipeline_parallel import generate_llm_fqn_per_model_part

from momoe_titan.config.model_args import ModelArgs

NEEDS_MICROBATCH_PER_STAGE = ("Schedule1F1B", "ScheduleDualPipeV")
WORKS_IN_ROUNDS = ("ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble")


def check_pipeline_parallel(args: ModelArgs, job_config: JobConfig) -> None:
    """Refuse a schedule, a cut into stages, or microbatches that do not fit one another.

    Raises:
        ValueError: names the field and its value.
    """
    parallelism = job_config.parallelism
    if job_config.optimizer.early_step_in_backward:
        raise ValueError(
            "optimizer.early_step_in_backward is True with parallelism.pipeline_parallel_degree "
            f"{parallelism.pipeline_parallel_degree}: a parameter has a backward per microbatch"
        )
    try:
        schedule = get_schedule_class(parallelism.pipeline_parallel_schedule)
    except ValueError as e:
        raise ValueError(f"parallelism.pipeline_parallel_schedule: {e}") from e
    if args.tie_word_embeddings:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree is {parallelism.pipeline_parallel_degree}, must be 1 with "
            "tie_word_embeddings: the embedding and the output layer, which share a weight, would be in two stages"
        )
    size, batch = parallelism.pipeline_parallel_microbatch_size, job_config.training.local_batch_size
    if size < 1 or batch % size:
        raise ValueError(
            f"parallelism.pipeline_parallel_microbatch_size is {size}, must divide training.local_batch_size, {batch}"
        )
    stages = _check_stages(args, job_config, issubclass(schedule, PipelineScheduleSingle))
    _check_microbatches(job_config, schedule.__name__, stages)


def _check_microbatches(job_config: JobConfig, schedule: str, stages: int) -> None:
    parallelism, validation = job_config.parallelism, job_config.validation
    size, batch = parallelism.pipeline_parallel_microbatch_size, job_config.training.local_batch_size
    microbatches = batch // size
    if validation.enable and validation.local_batch_size % microbatches:
        raise ValueError(
            f"validation.local_batch_size is {validation.local_batch_size}, must be a multiple of the {microbatches} "
            "microbatches of training.local_batch_size and parallelism.pipeline_parallel_microbatch_size"
        )
    given = f"training.local_batch_size is {batch}, pipeline_parallel_microbatch_size {size}"
    if schedule in NEEDS_MICROBATCH_PER_STAGE and microbatches < stages:
        raise ValueError(
            f"parallelism.pipeline_parallel_schedule needs a microbatch per stage, {stages}, but "
            f"there are {microbatches}: {given}"
        )
    pp = parallelism.pipeline_parallel_degree
    rounds = max(1, microbatches // pp)
    if schedule in WORKS_IN_ROUNDS and microbatches % rounds:
        raise ValueError(
            f"parallelism.pipeline_parallel_schedule needs {microbatches} microbatches to be a "
            f"multiple of {rounds}, the rounds over {pp} ranks: {given}"
        )


def _check_stages(args: ModelArgs, job_config: JobConfig, single: bool) -> int:
    """The number of stages into which TorchTitan's `pipeline_llm` cuts the model.

    Args:
        single: whether the schedule has one stage per rank.
    """
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
        _check_named_modules(given, args.n_layers)
    else:
        try:
            generate_llm_fqn_per_model_part(stages, args.n_layers, first, last)
        except ValueError as e:
            raise ValueError(f"parallelism.{field} is {getattr(parallelism, field)}: {e}") from e
    return stages


def _check_named_modules(given: list[list[str]], n_layers: int) -> None:
    layers = [f"layers.{i}" for i in range(n_layers)]
    modules = ["tok_embeddings", *layers, "norm", "output"]
    order = {name: i for i, name in enumerate(modules)}  # within a stage it has no effect
    named = [name for part in given for name in sorted(part, key=lambda name: order.get(name, -1))]
    if named != modules:
        raise ValueError(
            f"parallelism.module_fqns_per_model_part names {', '.join(named)}, must name each of "
            f"{', '.join(modules)} once, stage by stage in this order: a module that no stage has is left out"
        )
