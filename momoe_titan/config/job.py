"""All checks of a job against its model: called once, by `MomoeLlamaArgs.update_from_config`."""

from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.config.activation_checkpoint import check_activation_checkpoint
from momoe_titan.config.expert_parallelism import check_expert_parallel
from momoe_titan.config.hugging_face import check_hugging_face
from momoe_titan.config.model_args import ModelArgs
from momoe_titan.config.parallelism import check_parallelism
from momoe_titan.config.section import AUTO, STOCK_BACKEND


def check_job(args: ModelArgs, job_config: JobConfig) -> None:
    """Refuse what the model, TorchTitan 0.2.2 or torch cannot do; warn of fields without effect.

    Raises:
        ValueError: names the field, as written in TOML, its value, and the reason.
    """
    check_auto_save_percent(job_config)
    check_activation_checkpoint(job_config)
    check_converters_and_validation(job_config)
    check_hugging_face(args, job_config)
    check_expert_parallel(args, job_config)
    check_parallelism(args, job_config)


def check_auto_save_percent(job_config: JobConfig) -> None:
    momoe = getattr(job_config, "momoe", None)
    if momoe is None or momoe.save_percent != AUTO:
        return
    if (degree := job_config.parallelism.pipeline_parallel_degree) != 1:
        raise ValueError(
            f"momoe.save_percent is {AUTO!r}, which knows no pipeline stages, but "
            f"parallelism.pipeline_parallel_degree is {degree}"
        )
    if momoe.backend == STOCK_BACKEND:
        logger.warning(
            f"momoe.save_percent has no effect with momoe.backend = {STOCK_BACKEND!r}: "
            "TorchTitan's MoE saves what autograd saves."
        )


def check_converters_and_validation(job_config: JobConfig) -> None:
    training, validation = job_config.training, job_config.validation
    if validation.enable and validation.seq_len > training.seq_len:
        raise ValueError(
            f"validation.seq_len is {validation.seq_len}, must be at most training.seq_len, "
            f"{training.seq_len}: the model has no positions beyond"
        )
    # TorchTitan's converters swap modules by type; float8 experts would need kernels of their own.
    if job_config.model.converters:
        raise ValueError(
            f"model.converters is {job_config.model.converters}, must be empty: quantised experts are not supported"
        )
