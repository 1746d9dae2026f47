"""Target of `experimental.custom_import`.

Makes `model.name = "momoe_llama"` known to TorchTitan, and the model converter "momoe", which puts our experts into
TorchTitan's own models.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torchtitan.components.ft import FTManager
from torchtitan.components.metrics import MetricsProcessor, build_metrics_processor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.config import JobConfig
from torchtitan.config import Optimizer as OptimizerConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.protocols import model_converter
from torchtitan.protocols import train_spec as titan
from torchtitan.protocols.train_spec import TrainSpec

from momoe_titan.adapters.torchtitan import CONVERTED, MomoeConverter, apply_own_dispatch
from momoe_titan.components.auto_save_percent import set_up_auto_save_percent
from momoe_titan.components.checkpoint import allow_missing_balance_state
from momoe_titan.components.loss import Loss, build_loss, scale_router_losses
from momoe_titan.components.lr_schedule import build_momoe_lr_schedulers
from momoe_titan.components.metrics import build_momoe_metrics_processor
from momoe_titan.components.optimizer import build_momoe_optimizers
from momoe_titan.components.validation import build_validator
from momoe_titan.config.checks.converter import CONVERTER, converts
from momoe_titan.config.compile import compiles_model
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.data.loader import build_dataloader
from momoe_titan.data.tokenizer import build_tokenizer
from momoe_titan.model import (
    MomoeLlama,
    MomoeStateDictAdapter,
    flavors,
    parallelize_momoe_llama,
)
from momoe_titan.model.parallel.activation_checkpoint import apply_activation_checkpointing
from momoe_titan.model.parallel.fsdp import reduce_by_sums
from momoe_titan.model.parallel.pipeline import pipeline_momoe_llama

CONVERTIBLE = ("deepseek_v3", "gpt_oss", "llama4", "qwen3")  # TorchTitan's models with MoE layers


def prepare_and_parallelize(model: MomoeLlama, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """`parallelize_momoe_llama`, after what depends on the job's checkpoint and its memory."""
    allow_missing_balance_state(model, job_config)
    set_up_auto_save_percent(model, job_config)
    scale_router_losses(model, job_config, parallel_dims)
    return parallelize_momoe_llama(model, parallel_dims, job_config)


def get_train_spec() -> TrainSpec:
    """What TorchTitan's trainer takes from us, and what of it is TorchTitan's own."""
    return TrainSpec(
        model_cls=MomoeLlama,
        model_args=flavors,
        parallelize_fn=prepare_and_parallelize,
        pipelining_fn=pipeline_momoe_llama,
        build_optimizers_fn=build_momoe_optimizers,
        build_lr_schedulers_fn=build_momoe_lr_schedulers,
        build_dataloader_fn=build_dataloader,
        build_tokenizer_fn=build_tokenizer,
        build_loss_fn=build_loss,
        build_validator_fn=build_validator,
        build_metrics_processor_fn=build_momoe_metrics_processor,
        state_dict_adapter=MomoeStateDictAdapter,
    )


def convertible(spec: TrainSpec) -> TrainSpec:
    """A train spec of TorchTitan's that gives a converted model our optimizer hooks, loss, metrics and plan.

    A job without the converter gets what the spec said.
    """
    metrics = spec.build_metrics_processor_fn or build_metrics_processor
    return dataclasses.replace(
        spec,
        parallelize_fn=functools.partial(_parallelize, spec.parallelize_fn),
        pipelining_fn=pipeline_momoe_llama if spec.pipelining_fn is pipeline_llm else spec.pipelining_fn,
        build_optimizers_fn=functools.partial(_build_optimizers, spec.build_optimizers_fn),
        build_loss_fn=functools.partial(_build_loss, spec.build_loss_fn),
        build_metrics_processor_fn=functools.partial(_build_metrics_processor, metrics),
    )


def _parallelize(
    of_spec: Callable[..., nn.Module], model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
) -> nn.Module:
    if not converts(job_config):
        return of_spec(model, parallel_dims, job_config)
    set_up_auto_save_percent(model, job_config)
    scale_router_losses(model, job_config, parallel_dims)
    parallel_dims = apply_own_dispatch(model, parallel_dims, job_config)
    config = job_config.activation_checkpoint
    # Ours does not run the experts again, whose results it does not keep either: TorchTitan's expert parallelism
    # multiplies them by scores, and its backward reads them.
    if config.mode != "none" and not compiles_model(job_config) and not parallel_dims.ep_enabled:
        apply_activation_checkpointing(model, job_config, blocks_compiled=False)
        job_config = copy.copy(job_config)
        job_config.activation_checkpoint = dataclasses.replace(config, mode="none")
    model = of_spec(model, parallel_dims, job_config)
    reduce_by_sums(model)
    return model


def _build_optimizers(
    of_spec: Callable[..., OptimizersContainer],
    model_parts: list[nn.Module],
    optimizer_config: OptimizerConfig,
    parallel_dims: ParallelDims,
    ft_manager: FTManager | None = None,
) -> OptimizersContainer:
    # All ranks need the same hooks, which sum over ranks: those with a pipeline stage without MoE layers, too.
    build = build_momoe_optimizers if any(hasattr(part, CONVERTED) for part in model_parts) else of_spec
    return build(model_parts, optimizer_config, parallel_dims, ft_manager)


def _build_loss(of_spec: Callable[..., Loss], job_config: JobConfig, **kwargs: Any) -> Loss:
    """With the gradient of a mean under every parallelism, as `scale_router_losses` expects it."""
    return (build_loss if converts(job_config) else of_spec)(job_config, **kwargs)


def _build_metrics_processor(
    of_spec: Callable[..., MetricsProcessor],
    job_config: JobConfig,
    parallel_dims: ParallelDims,
    model_args: Any = None,
    tag: str | None = None,
) -> MetricsProcessor:
    if (converted := getattr(job_config, CONVERTED, None)) is not None:
        return build_momoe_metrics_processor(job_config, parallel_dims, converted, tag)
    return of_spec(job_config, parallel_dims, model_args, tag)


def register() -> None:
    """Register the train spec and the converter, once; another call changes nothing.

    Raises:
        ValueError: the name is taken by another model.
    """
    try:
        is_ours = titan.get_train_spec(MODEL_NAME).model_cls is MomoeLlama
    except ValueError:  # no such name yet
        is_ours = False
    if is_ours:
        return
    titan.register_train_spec(MODEL_NAME, get_train_spec())
    model_converter.register_model_converter(MomoeConverter, CONVERTER)
    for name in CONVERTIBLE:
        titan.register_train_spec(name, convertible(titan.get_train_spec(name)))


register()
