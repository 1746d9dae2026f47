"""Adds our datasets to those of TorchTitan's text loader (`training.dataset`, `validation.dataset`)."""

import sysconfig
from functools import partial
from typing import Any

from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from momoe_titan.data.errors import DataError
from momoe_titan.data.local_files import load_local
from momoe_titan.data.stdlib import load_stdlib


def _text_of(sample: dict[str, Any]) -> str:
    text = sample["text"]
    if not isinstance(text, str):  # possible in streamed files only
        raise DataError(f"dataset_path: a record holds {text!r} in place of text")
    return text


def register_datasets(text_field: str = "text", streaming: bool = False) -> None:
    """Add this module's datasets to TorchTitan's text loader.

    Can be called again; the arguments (`momoe.data_text_field`,
    `momoe.data_streaming`) then apply to datasets loaded from there on.
    """
    stdlib = sysconfig.get_path("stdlib")
    DATASETS["python_stdlib"] = DatasetConfig(stdlib, load_stdlib, _text_of)
    DATASETS["python_stdlib_validation"] = DatasetConfig(stdlib, partial(load_stdlib, held_out=True), _text_of)
    DATASETS["local"] = DatasetConfig("", partial(load_local, text_field=text_field, streaming=streaming), _text_of)
