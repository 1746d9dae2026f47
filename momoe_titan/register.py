"""Target of `experimental.custom_import`: makes `model.name = "momoe_llama"` known to TorchTitan."""

from torch import nn
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols import train_spec as titan
from torchtitan.protocols.train_spec import TrainSpec

from momoe_titan.components.auto_save_percent import set_up_auto_save_percent
from momoe_titan.components.checkpoint import allow_missing_balance_state
from momoe_titan.components.loss import build_loss, scale_router_losses
from momoe_titan.components.lr_schedule import build_momoe_lr_schedulers
from momoe_titan.components.metrics import build_momoe_metrics_processor
from momoe_titan.components.optimizer import build_momoe_optimizers
from momoe_titan.components.validation import build_validator
from momoe_titan.config.flavor import MODEL_NAME
from momoe_titan.data.loader import build_dataloader
from momoe_titan.data.tokenizer import build_tokenizer
from momoe_titan.model import (
    MomoeLlama,
    MomoeStateDictAdapter,
    flavors,
    parallelize_momoe_llama,
)
from momoe_titan.model.parallel.pipeline import pipeline_momoe_llama


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


def register() -> None:
    """Register the train spec, once; another call changes nothing.

    Raises:
        ValueError: the name is taken by another model.
    """
    try:
        is_ours = titan.get_train_spec(MODEL_NAME).model_cls is MomoeLlama
    except ValueError:  # no such name yet
        is_ours = False
    if not is_ours:
        titan.register_train_spec(MODEL_NAME, get_train_spec())


register()
