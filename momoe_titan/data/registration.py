"""The datasets that `training.dataset` and `validation.dataset` name, and how each is opened."""

import sysconfig
import zlib
from functools import partial

from datasets import Dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS

from momoe_titan.config.section import DataSource
from momoe_titan.data.errors import DataError
from momoe_titan.data.local_files import load_local
from momoe_titan.data.source import Source, TextList
from momoe_titan.data.stdlib import load_stdlib, read_stdlib
from momoe_titan.data.token_files import holds_shards, open_tokens
from momoe_titan.data.tokenizer import TextTokenizer

LOCAL = "local"
STDLIB = {"python_stdlib": False, "python_stdlib_validation": True}  # whether it is what was held out


def open_source(given: DataSource, tokenizer: TextTokenizer, field: str) -> Source | None:
    """The documents of one dataset; None for one that TorchTitan reads.

    Args:
        given: names the dataset, and what it needs.
        tokenizer: of the job, for data that holds tokens.
        field: of the configuration, for messages: that of the path.

    Raises:
        DataError: the data is missing or damaged.
    """
    dataset = given.dataset.lower()
    if dataset == LOCAL:
        if isinstance(given.path, str) and given.path and holds_shards(given.path):
            return open_tokens(given.path, tokenizer, field)
        if not isinstance(given.path, str) and any(map(holds_shards, given.path)):
            raise DataError(
                f"{field} {given.path!r}: token shards cannot stand in a list; give each a table [[momoe.data]]"
            )
        return load_local(given.path, given.text_field, field)
    if dataset in STDLIB:
        assert not isinstance(given.path, list)
        texts, _ = read_stdlib(given.path or sysconfig.get_path("stdlib"), STDLIB[dataset])
        content = zlib.crc32("\0".join(texts).encode())
        return TextList(f"{field.removesuffix('_path').removesuffix('.path')} {dataset!r}", texts, f"{content:08x}")
    return None


def register_datasets() -> None:
    """Add `python_stdlib`, `python_stdlib_validation` and `local` to the datasets that TorchTitan knows by name.

    TorchTitan's own datasets (`c4`, ...) stay as they are, and are the only ones that our loader reads through
    TorchTitan. For the loader of TorchTitan's other models, each of ours is a Hugging Face dataset of "text".
    """
    stdlib = sysconfig.get_path("stdlib")
    for name, held_out in STDLIB.items():
        DATASETS[name] = DatasetConfig(stdlib, partial(load_stdlib, held_out=held_out), lambda row: row["text"])
    DATASETS[LOCAL] = DatasetConfig("", _load_local, lambda row: row["text"])


def _load_local(path: str) -> Dataset:
    source = load_local(path)
    return Dataset.from_dict({"text": source.read(range(len(source)))})
