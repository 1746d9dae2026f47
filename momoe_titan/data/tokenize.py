"""Turns text files into token ids once, so that training only reads them.

    python -m momoe_titan.data.tokenize texts/ more.jsonl.gz -o tokens --tokenizer momoe_titan/assets/tokenizer
    python -m momoe_titan.train ... --training.dataset local --training.dataset_path tokens

Writes shards in Megatron-LM's indexed format (`momoe_titan.data.indexed`), which other trainers read too, and a file
tokens.json that says with which tokenizer they were made. Documents keep their order, from BOS to EOS. A shard has its
name only when it is whole. After an interruption the same command goes on behind the last whole shard.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import fcntl
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from momoe_titan.data.errors import DataError
from momoe_titan.data.indexed import Shard, ShardWriter, dtype_for
from momoe_titan.data.local_files import find_local_files
from momoe_titan.data.read_texts import read_texts
from momoe_titan.data.token_files import INFO, UNFINISHED, first_text, read_info
from momoe_titan.data.tokenizer import TextTokenizer, load_tokenizer

BATCH_BYTES = 1 << 20  # of text that a process tokenizes at a time
BATCHES_AHEAD = 4  # of each process
PROGRESS_SECONDS = 5.0

_tokenizer: TextTokenizer  # of a process that tokenizes


@dataclasses.dataclass
class Batch:
    """Documents on their way.

    Attributes:
        texts: of the documents.
        bytes: of each text as UTF-8, [documents].
        share: how much of all files has been read with it.
        ids: of all documents, one after the other, once they are known.
        lengths: ids of each document, [documents].
    """

    texts: list[str]
    bytes: np.ndarray
    share: float
    ids: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))


def _start_process(tokenizer: TextTokenizer) -> None:
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread in each process
    _tokenizer = tokenizer


def _encode(batch: Batch) -> Batch:
    documents = _tokenizer.encode_documents(batch.texts)
    batch.texts = []
    batch.lengths = np.fromiter(map(len, documents), np.int64, len(documents))
    ids = itertools.chain.from_iterable(documents)
    batch.ids = np.fromiter(ids, dtype_for(_tokenizer.num_ids), int(batch.lengths.sum()))
    return batch


def _read(files: Sequence[str], field: str, skip: int) -> Iterator[Batch]:
    """The documents of all files behind the first `skip`, in batches."""
    sizes = [os.path.getsize(file) for file in files]
    total = max(1, sum(sizes))
    for number, file in enumerate(files):
        read = sum(sizes[:number]) / total
        for texts, share in read_texts(file, field):
            now = (sum(sizes[:number]) + share * sizes[number]) / total
            skipped = min(skip, len(texts))
            skip -= skipped
            parts = list(_cut(texts[skipped:]))
            for count, part in enumerate(parts, start=1):
                yield Batch(part.to_pylist(), _bytes(part), read + (now - read) * count / len(parts))
            read = now


def _cut(texts: pa.Array) -> Iterator[pa.Array]:
    """Pieces of about `BATCH_BYTES`, of whole documents."""
    ends = np.cumsum(_bytes(texts))
    start = 0
    while start < len(texts):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + BATCH_BYTES)))
        yield texts[start:stop]
        start = stop


def _bytes(texts: pa.LargeStringArray) -> np.ndarray:
    """Bytes of each text."""
    if len(texts) == 0:
        return np.empty(0, np.int64)
    offsets = np.frombuffer(texts.buffers()[1], np.int64)
    return np.diff(offsets[texts.offset : texts.offset + len(texts) + 1])


def _encoded(batches: Iterator[Batch], tokenizer: TextTokenizer, processes: int) -> Iterator[Batch]:
    """The batches with their ids, in the same order."""
    if processes == 1:
        _start_process(tokenizer)
        yield from map(_encode, batches)
        return
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(processes, context, _start_process, (tokenizer,)) as pool:
        try:
            pool.submit(int).result()  # starts all processes, before the first file is opened
            waiting = collections.deque(
                pool.submit(_encode, batch) for batch in itertools.islice(batches, BATCHES_AHEAD * processes)
            )
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(_encode, batch) for batch in itertools.islice(batches, 1))
        except concurrent.futures.process.BrokenProcessPool as e:
            raise DataError(f"a process that tokenizes ended, perhaps for lack of memory: {e}") from e
        finally:
            pool.shutdown(cancel_futures=True)


class Folder:
    """The folder that the shards go to, and what `INFO` says of it.

    Args:
        path: made where it is missing.
        info: of the new shards, without any.

    Raises:
        DataError: the folder holds other shards, or another process writes there.
    """

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = open(path / ".lock", "w")  # noqa: SIM115  # held until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise DataError(f"another process writes to {str(path)!r}") from e
        if text := first_text(path):
            raise DataError(f"{str(path)!r} holds {text!r}: give token shards a folder of their own")
        complete = read_info(path / INFO)
        before = complete or read_info(path / UNFINISHED)
        self.is_complete = complete is not None
        if before is None and any(path.glob("*.idx")):
            raise DataError(f"{str(path)!r} holds token shards already: choose another folder")
        for key in ("tokenizer", "source"):
            if before and {**before[key], "folder": None} != {**info[key], "folder": None}:
                raise DataError(
                    f"{str(path)!r} holds tokens of another {key}: {before[key]}, now {info[key]}; choose another "
                    "folder, or remove that one"
                )
        self.info = before or info

    @property
    def shards(self) -> list[dict[str, Any]]:
        return self.info["shards"]

    def write(self, batches: Iterator[Batch], shard_tokens: int, said: Callable[[int, int, float], None]) -> None:
        """Write batches as shards behind those that are there.

        Args:
            shard_tokens: at how many tokens a shard ends.
            said: is told the documents and tokens of each batch, and how much of the text is read.
        """
        self._note(UNFINISHED)
        documents = _documents(batches, said)
        for first in documents:
            path = self.path / f"{len(self.shards):05d}"
            with ShardWriter(path, np.dtype(self.info["dtype"])) as writer:
                size = tokens = 0
                for ids, length in itertools.chain([first], documents):
                    writer.add([ids])
                    size, tokens = size + length, tokens + len(ids)
                    if tokens >= shard_tokens:
                        break
            shard = Shard(path)
            self.shards.append(
                {"name": path.name, "documents": len(shard), "tokens": tokens, "bytes": size, "crc32": writer.crc32}
            )
            self._note(UNFINISHED)
        if not self.shards:
            raise DataError("there is no text in the files")
        os.replace(self.path / UNFINISHED, self.path / INFO)

    def _note(self, name: str) -> None:
        new = self.path / f"{name}.new"
        new.write_text(json.dumps(self.info, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.path / name)


def _documents(batches: Iterator[Batch], said: Callable[[int, int, float], None]) -> Iterator[tuple[np.ndarray, int]]:
    """Ids and bytes of text of each document."""
    for batch in batches:
        said(len(batch.lengths), len(batch.ids), batch.share)
        yield from zip(np.split(batch.ids, np.cumsum(batch.lengths)[:-1]), batch.bytes.tolist(), strict=True)


class Progress:
    """Says now and then how far the work has come.

    Attributes:
        documents, tokens: of this run.
    """

    def __init__(self) -> None:
        self.documents = self.tokens = 0
        self.begin = self.said = time.monotonic()

    def __call__(self, documents: int, tokens: int, share: float) -> None:
        """Count what was tokenized. `share` is how much of all text has been read."""
        self.documents += documents
        self.tokens += tokens
        now = time.monotonic()
        if now - self.said > PROGRESS_SECONDS:
            self.said = now
            left = (now - self.begin) * (1 - share) / share if share else float("inf")
            print(f"{share:.0%}: {self}, {left:,.0f} s left", file=sys.stderr, flush=True)

    def __str__(self) -> str:
        speed = self.tokens / max(time.monotonic() - self.begin, 1e-9)
        return f"{self.documents:,} documents, {self.tokens:,} tokens, {speed / 1e6:.2f} million tokens/s"


def tokenize(options: argparse.Namespace) -> None:
    """What the command does.

    Raises:
        DataError: text, tokenizer or folder cannot be used.
    """
    tokenizer = load_tokenizer(options.tokenizer, "--tokenizer")
    files = find_local_files(options.texts, "TEXTS")
    stats = [[os.path.realpath(file), os.path.getsize(file), os.stat(file).st_mtime_ns] for file in files]
    made_with = {"fingerprint": tokenizer.fingerprint, "num_ids": tokenizer.num_ids, "folder": options.tokenizer}
    special = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    info: dict[str, Any] = {
        "format": "Megatron-LM indexed dataset (MMIDIDX), version 1",
        "dtype": dtype_for(tokenizer.num_ids).name,
        "tokenizer": made_with | special | {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token},
        "source": {"files": stats, "text_field": options.text_field},
        "shards": [],
    }
    try:
        folder = Folder(Path(options.output), info)
        if folder.is_complete:
            print(f"{options.output} is complete already")
        else:
            done = sum(shard["documents"] for shard in folder.shards)
            if done:
                print(f"goes on behind {done:,} documents in {len(folder.shards)} shards", file=sys.stderr)
            progress = Progress()
            batches = _read(files, options.text_field, done)
            folder.write(_encoded(batches, tokenizer, options.processes), options.shard_tokens, progress)
            print(f"{options.output}: {progress}, {len(folder.shards)} shards")
    except OSError as e:
        raise DataError(f"--output {options.output!r}: {e}") from e
    print(f"To train on it: --training.dataset local --training.dataset_path {options.output}")


def main(args: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m momoe_titan.data.tokenize", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("texts", nargs="+", metavar="TEXTS", help=".txt, .jsonl or .parquet: files, folders, patterns")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the shards go")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="what model.hf_assets_path will name")
    parser.add_argument("--text_field", default="text", metavar="NAME", help="the text of a record (default: text)")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="that tokenize (default: one per core)")  # fmt: skip
    parser.add_argument("--shard_tokens", type=int, default=1 << 28, metavar="N",
                        help="tokens at which a shard ends (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(args)
    try:
        for name in ("processes", "shard_tokens"):
            if (given := getattr(options, name)) < 1:
                raise DataError(f"--{name} is {given}, must be at least 1")
        tokenize(options)
    except DataError as e:
        print(f"{parser.prog}: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on behind the last whole shard", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
