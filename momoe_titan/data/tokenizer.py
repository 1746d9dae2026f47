"""Finds and loads the tokenizer of a job."""

import os
from pathlib import Path

from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig

from momoe_titan.data.errors import DataError


def resolve_assets_path(path: str) -> str:
    """The folder that `model.hf_assets_path` names. A path "momoe_titan/..." also means the installed package.

    Raises:
        DataError: There is no such folder.
    """
    if os.path.isdir(path):
        return path
    packaged = Path(__file__).parents[2] / path
    if path.startswith("momoe_titan/") and packaged.is_dir():
        return str(packaged)
    given = "is not set" if path == JobConfig().model.hf_assets_path else f"{path!r} is not a folder"
    raise DataError(
        f"model.hf_assets_path {given}; it must hold the tokenizer "
        "(tokenizer.json). The one that comes with this package is "
        "'momoe_titan/assets/tokenizer'"
    )


def build_tokenizer(job_config: JobConfig) -> HuggingFaceTokenizer:
    """TorchTitan's tokenizer from `model.hf_assets_path`.

    Raises:
        DataError: The folder or its tokenizer is missing or damaged.
    """
    path = resolve_assets_path(job_config.model.hf_assets_path)
    try:
        return HuggingFaceTokenizer(path)
    except Exception as e:  # tokenizers raises plain Exception for a damaged file
        raise DataError(f"model.hf_assets_path {path!r}: no usable tokenizer: {e}") from e
