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
    """Add `python_stdlib`, `python_stdlib_validation` and `local` to the datasets that TorchTitan knows.

    TorchTitan's own datasets (`c4`, ...) stay as they are. Each loader returns a Hugging Face dataset with the text in
    the column "text".

    Args:
        text_field: `momoe.data_text_field` of the job.
        streaming: `momoe.data_streaming` of the job. Another call changes both for datasets that are loaded after it.
    """
    stdlib = sysconfig.get_path("stdlib")
    DATASETS["python_stdlib"] = DatasetConfig(stdlib, load_stdlib, _text_of)
    DATASETS["python_stdlib_validation"] = DatasetConfig(stdlib, partial(load_stdlib, held_out=True), _text_of)
    DATASETS["local"] = DatasetConfig("", partial(load_local, text_field=text_field, streaming=streaming), _text_of)
