"""Checks a job whose model TorchTitan's converter "momoe" changes: another model than our own, with our experts."""

import dataclasses
from typing import Any

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.compile import compiles_model
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.config.section import STOCK_BACKEND, Momoe
from momoe_titan.save_percent import AUTO

CONVERTER = "momoe"
# What a converted model reads of [momoe]; the rest belongs to our own model and its data.
READ = {
    "save_percent", "memory_budget", "backend", "load_balance_rate", "load_balance_rule", "load_balance_average",
    "load_balance_off_layers", "aux_loss_weight", "aux_loss_scope", "router_z_loss_weight", "check_ids",
    "expert_dispatch",
}  # fmt: skip


def converts(job_config: JobConfig) -> bool:
    """Whether the job's model gets our experts from the converter."""
    return CONVERTER in job_config.model.converters


def dispatches(job_config: JobConfig) -> bool:
    """Whether expert parallelism of a converted model goes by our dispatch, and not by TorchTitan's."""
    return getattr(job_config, "momoe", Momoe()).expert_dispatch != Momoe.expert_dispatch


def check_converter(job_config: JobConfig) -> None:
    """Refuse a job with the converter that cannot work; log fields of [momoe] that have no effect on its model.

    Raises:
        ValueError: names the field and its value.
    """
    converters = job_config.model.converters
    if job_config.model.name == MODEL_NAME:
        raise ValueError(
            f"model.converters is {converters}, must be empty with model.name = {MODEL_NAME!r}, which has these experts"
        )
    if converters[0] != CONVERTER or converters.count(CONVERTER) > 1:
        raise ValueError(f"model.converters is {converters}, must name {CONVERTER!r} once, and first")
    if quantised := [name for name in converters if "grouped_mm" in name]:
        raise ValueError(f"model.converters names {quantised[0]!r}, but the experts of {CONVERTER!r} are not quantised")
    parallelism = job_config.parallelism
    for name in ("tensor_parallel_degree", "expert_tensor_parallel_degree"):
        if (degree := getattr(parallelism, name)) != 1:
            raise ValueError(f"parallelism.{name} is {degree}, must be 1 with the model converter {CONVERTER!r}")
    if (backend := parallelism.expert_parallel_comm_backend) != "standard":
        raise ValueError(
            f"parallelism.expert_parallel_comm_backend is {backend!r}, must be 'standard' with the model converter "
            f"{CONVERTER!r}"
        )
    _check_section(job_config)


def _check_section(job_config: JobConfig) -> None:
    section: Any = getattr(job_config, "momoe", None)
    if section is None:
        return
    if section.backend == STOCK_BACKEND:
        raise ValueError(f"momoe.backend is {STOCK_BACKEND!r}, which leaves nothing for the converter {CONVERTER!r}")
    _check_dispatch(job_config)
    default = Momoe()
    unread = [f.name for f in dataclasses.fields(Momoe) if f.name not in READ]
    if changed := [name for name in unread if getattr(section, name) != getattr(default, name)]:
        logger.warning(f"Without effect on a converted model: {', '.join(f'momoe.{name}' for name in changed)}")


def _check_dispatch(job_config: JobConfig) -> None:
    section: Any = job_config.momoe  # pyright: ignore[reportAttributeAccessIssue] - of job.custom_config_module
    parallelism = job_config.parallelism
    degree, dispatch = parallelism.expert_parallel_degree, section.expert_dispatch
    if degree == 1:
        if dispatches(job_config):
            logger.warning(f"momoe.expert_dispatch = {dispatch!r} has no effect without expert parallelism")
        return
    if not dispatches(job_config):
        if section.save_percent == AUTO:
            raise ValueError(
                f"momoe.save_percent is {AUTO!r}, which does not know TorchTitan's own expert parallelism, but "
                f"parallelism.expert_parallel_degree is {degree}: name a momoe.expert_dispatch"
            )
        return
    mode = job_config.activation_checkpoint.mode
    if mode != "none" and compiles_model(job_config):
        raise ValueError(
            f"momoe.expert_dispatch is {dispatch!r}, must be 'auto' with torch.compile and "
            f"activation_checkpoint.mode = {mode!r}"
        )
    overlap, schedule = parallelism.pipeline_parallel_expert_parallel_overlap, parallelism.pipeline_parallel_schedule
    if parallelism.pipeline_parallel_degree > 1 and overlap and schedule.lower() == "dualpipev":
        raise ValueError(
            f"momoe.expert_dispatch is {dispatch!r}, must be 'auto' where "
            f"parallelism.pipeline_parallel_schedule = {schedule!r} interleaves with it"
        )
