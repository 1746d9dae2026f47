"""Pipeline parallelism: TorchTitan's, with token counts that stay exact."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torchtitan.distributed.pipeline_parallel import pipeline_llm

from momoe_titan.moe.expert_stats import recording_paused


def pipeline_momoe_llama(model: nn.Module, *args: Any) -> tuple[_PipelineSchedule, list[nn.Module], bool, bool]:
    """TorchTitan's `pipeline_llm`: the same arguments, the same results."""
    pipeline = pipeline_llm(model, *args)
    for stage in stages_of(pipeline[0]):
        _leave_probes_uncounted(stage)
    return pipeline


def stages_of(schedule: _PipelineSchedule) -> list[PipelineStage]:
    """The stages of a schedule that this rank has."""
    # A schedule of several stages per rank has `_stages`, one of a single stage `_stage`.
    return getattr(schedule, "_stages", None) or [getattr(schedule, "_stage")]  # noqa: B009


def _leave_probes_uncounted(stage: PipelineStage) -> None:
    """Keep the forward by which a stage learns the shapes it will send out of the token counts.

    The stage runs this forward on meaningless values before its first microbatch, and again when
    training follows validation. torch 2.13 has no hook around it, and from inside, the model cannot
    tell it from a microbatch. Hence the replaced method.
    """
    stage._prepare_forward_infra = _without_recording(stage._prepare_forward_infra)


def _without_recording(probe: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(probe)
    def paused(*args, **kwargs) -> Any:
        with recording_paused():
            return probe(*args, **kwargs)

    return paused
