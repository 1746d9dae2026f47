"""Pipeline parallelism: TorchTitan's, with a count of tokens that stays right."""

import torch
from torch import nn
from torch.distributed.pipelining.stage import _PipelineStageBase
from torchtitan.distributed.pipeline_parallel import pipeline_llm

from momoe_titan.model.moe import BalancedMoE


def pipeline_momoe_llama(model: nn.Module, *args):
    """TorchTitan's `pipeline_llm`, whose arguments and results these are."""
    schedule, *rest = pipeline_llm(model, *args)
    for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
        _leave_probes_uncounted(stage)
    return schedule, *rest


def _leave_probes_uncounted(stage: _PipelineStageBase) -> None:
    """Before its first microbatch, and again after validation, a stage runs a forward to learn the
    shapes that it will send, on values that mean nothing."""
    probe = stage._prepare_forward_infra

    def uncounted_probe(*args, **kwargs):
        moes = [module for module in stage.submod.modules() if isinstance(module, BalancedMoE)]
        sums = [moe.tokens_per_expert for moe in moes]
        sums += [moe.router.entropy_and_tokens for moe in moes]
        before = [total.clone() for total in sums]
        result = probe(*args, **kwargs)
        with torch.no_grad():
            for total, value in zip(sums, before, strict=True):
                total.copy_(value)
        return result

    stage._prepare_forward_infra = uncounted_probe
