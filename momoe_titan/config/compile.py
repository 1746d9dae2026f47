"""Whether `[compile]` asks for a compiled model."""

from torchtitan.config import JobConfig


def compiles_model(job_config: JobConfig) -> bool:
    """Whether `[compile]` asks for the model, not only for the loss."""
    return job_config.compile.enable and "model" in job_config.compile.components
