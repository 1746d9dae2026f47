"""Files of documents, jobs that read them, and what loaders make of them."""

import copy
import functools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torchtitan.config import ConfigManager

import momoe_titan
from momoe_titan.data.loader import Shape, TextDataloader
from momoe_titan.data.order import Order
from momoe_titan.data.source import TextList

TOKENIZER = Path(momoe_titan.__file__).parent / "assets" / "tokenizer"
TEXTS = ["one two three four five six\n", "def f(x):\n    return x\n", "naïve 漢字\n", "the end\n"]


@functools.cache
def _read(options: tuple[str, ...]) -> Any:
    return ConfigManager().parse_args(list(options))


def read_job(*options: str) -> Any:
    """A job of its own for each call, by options that are read once; no file that they name may change."""
    return copy.deepcopy(_read(options))


def job(*options: str):
    return read_job(
        "--job.custom_config_module=momoe_titan.job_config",
        f"--model.hf_assets_path={TOKENIZER}",
        "--training.local_batch_size=2",
        "--training.seq_len=16",
        *options,
    )


def local(path: Path | str, *options: str) -> list[str]:
    return ["--training.dataset=local", f"--training.dataset_path={path}", *options]


def write(path: Path, texts: Sequence[str] = TEXTS, field: str = "text") -> Path:
    if path.suffix == ".txt":
        path.write_text("".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, field: t}) + "\n" for i, t in enumerate(texts)))
    else:
        pq.write_table(pa.table({"id": list(range(len(texts))), field: texts}), path)
    return path


class IdTokenizer:
    """The tokens of the document "17 5" are five times 17, so that a token says whose it is."""

    eos_id = 0

    def encode_documents(self, texts: Iterable[str]) -> list[list[int]]:
        return [[int(text.split()[0])] * int(text.split()[1]) for text in texts]


def numbered(first: int, lengths: Sequence[int], name: str = "numbered") -> TextList:
    """Documents for `IdTokenizer` with these numbers of tokens, whose ids begin at `first`."""
    return TextList(name, [f"{first + i} {length}" for i, length in enumerate(lengths)], f"{first} {lengths}")


def loaders(order: Order, ranks: int, states: Sequence[bytes] = (), **shape) -> list[TextDataloader]:
    """The loaders of all ranks, which go on from the states of all ranks of a checkpoint."""
    form = Shape(**{"section": "training", "batch_size": 2, "seq_len": 7, "threads": 0, "ahead": 0} | shape)
    built = [TextDataloader(order, IdTokenizer(), form, rank, ranks) for rank in range(ranks)]
    for rank, loader in enumerate(built):
        if len(states) == ranks:
            loader.load_state_dict({f"dp_rank_{rank}": states[rank], "world_size": ranks})
        elif states:
            loader.load_ranks(states)
    return built


def states_of(built: Sequence[TextDataloader]) -> list[bytes]:
    return [loader.state_dict()[f"dp_rank_{rank}"] for rank, loader in enumerate(built)]


def batches(loader, n: int) -> list[tuple[list, list]]:
    taken = [(inputs["input"].tolist(), labels.tolist()) for inputs, labels in islice(loader, n)]
    assert len(taken) == n, "the loader ran out"
    return taken


def tokens_in(taken: Iterable[tuple[list, list]]) -> Counter:
    """How often each token is in these batches; each sequence has one token more than inputs. Padding is left out."""
    seen: Counter = Counter()
    for inputs, labels in taken:
        for row, targets in zip(inputs, labels, strict=True):
            seen.update([row[0], *(target for target in targets if target >= 0)])
    return seen
