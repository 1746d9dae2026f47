"""TorchTitan's validator on our loader."""

from unittest import mock

from torchtitan.components import validate
from torchtitan.config import JobConfig

from momoe_titan.data.loader import build_validation_dataloader


def build_validator(job_config: JobConfig, *args, **kwargs) -> validate.BaseValidator:
    """TorchTitan's validator, on our loader.

    Raises:
        DataError: See `build_validation_dataloader`.
    """
    # It builds its loader itself.
    ours = mock.patch.object(validate, "build_text_validation_dataloader", build_validation_dataloader)
    with ours:
        return validate.build_validator(job_config, *args, **kwargs)
