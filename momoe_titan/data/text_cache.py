"""`CachedTexts`: the text of files as one memory-mapped Arrow file, which gives any document at once.

The file holds nothing but the text. It is written once, by one process of a host, into the cache folder of Hugging
Face's datasets; another run on the same files finds it there.
"""

import bisect
import fcntl
import hashlib
import itertools
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import config as datasets_config
from torchtitan.tools.logging import logger

from momoe_titan.data.errors import DataError
from momoe_titan.data.read_texts import BLOCK_SIZE, MAX_DOCUMENT_CHARS, read_texts
from momoe_titan.data.source import Source

VERSION = 1  # of the files written here
PROGRESS_SECONDS = 10.0
SCHEMA = pa.schema([("text", pa.large_string())])


class CachedTexts(Source):
    """The texts of an Arrow file that `cache_texts` has written.

    Args:
        file: the Arrow file; a file of JSON beside it says what is in it.
        name: what messages call this data.
    """

    def __init__(self, file: str, name: str):
        self.file, self.name = file, name
        with open(_summary_of(file)) as f:
            summary = json.load(f)
        self.size, self.fingerprint = summary["size"], summary["fingerprint"]
        chunks = pa.ipc.open_file(pa.memory_map(file)).read_all().column("text").chunks
        self._chunks = chunks
        self._starts = list(itertools.accumulate(map(len, chunks), initial=0))

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedTexts, (self.file, self.name)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, indices: Sequence[int]) -> list[str]:
        """See `Source.read`."""
        texts = []
        for index in indices:
            chunk = bisect.bisect_right(self._starts, index) - 1
            texts.append(self._chunks[chunk][index - self._starts[chunk]].as_py())
        return texts


def cache_texts(files: Sequence[str], field: str, name: str) -> CachedTexts:
    """The texts of files, written to the cache by the first process that asks while the others of the host wait.

    Args:
        files: see `read_texts`.
        field: which field of a record is the text.
        name: what messages call this data.

    Raises:
        DataError: a file cannot be used, they hold no text, or the cache cannot be written.
    """
    try:
        key = json.dumps([VERSION, MAX_DOCUMENT_CHARS, field, list(map(_state_of, files))])
        folder = os.path.join(datasets_config.HF_DATASETS_CACHE, "momoe_titan")
        target = os.path.join(folder, hashlib.sha256(key.encode()).hexdigest()[:32] + ".arrow")
        if not _is_whole(target):
            os.makedirs(folder, exist_ok=True)
            with open(target + ".lock", "w") as lock:
                _wait_for(lock, name)
                if not _is_whole(target):
                    _write(files, field, name, target)
        return CachedTexts(target, name)
    except OSError as e:
        raise DataError(
            f"{name}: {e} (the environment variable HF_DATASETS_CACHE names the folder of the cache)"
        ) from e


def _state_of(file: str) -> tuple[str, int, int, int]:
    """What changes where a file does. Programs that copy files set the first of the times to that of the original."""
    stat = os.stat(file)
    return os.path.realpath(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _summary_of(file: str) -> str:
    return file + ".json"


def _is_whole(file: str) -> bool:
    """Whether an Arrow file has been written to its end, and not been changed since."""
    try:
        with open(_summary_of(file)) as f:
            return json.load(f)["file_size"] == os.path.getsize(file)
    except (OSError, ValueError, KeyError):
        return False


def _wait_for(lock: Any, name: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info(f"{name}: waits for another process, which reads it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _write(files: Sequence[str], field: str, name: str, target: str) -> None:
    """Write the Arrow file and its summary, each under its name only when it is whole."""
    partial = f"{target}.{uuid.uuid4().hex}"  # hosts that share the folder may have no locks in common
    begin, documents, size, content, lengths = time.monotonic(), 0, 0, 0, 0
    try:
        with pa.ipc.new_file(partial, SCHEMA) as writer:
            for texts in _in_blocks(_read_all(files, field, name)):
                writer.write_batch(pa.record_batch([texts], schema=SCHEMA))
                ends = np.frombuffer(texts.buffers()[1], np.int64)[: len(texts) + 1]
                content = zlib.crc32(memoryview(texts.buffers()[2])[: ends[-1]], content)
                lengths = zlib.crc32(np.diff(ends).tobytes(), lengths)
                documents, size = documents + len(texts), size + int(ends[-1])
        if documents == 0:
            raise DataError(f"{name}: there is no text in {list(files)}, which may be empty")
        summary = {
            "documents": documents,
            "size": size,
            "fingerprint": f"{documents}-{content:08x}{lengths:08x}",
            "file_size": os.path.getsize(partial),
            "files": list(files),
        }
        if _is_whole(target):  # another host was faster, and may have mapped its file into memory
            return
        os.replace(partial, target)
        with open(partial, "w") as f:
            json.dump(summary, f)
        os.replace(partial, _summary_of(target))
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
    seconds = time.monotonic() - begin
    logger.info(f"{name}: read {documents:,} documents, {size / 1e6:,.1f} MB of text, in {seconds:.1f} s into {target}")


def _read_all(files: Sequence[str], field: str, name: str) -> Iterator[pa.Array]:
    """The texts of all files; says now and then how far it has come."""
    sizes = [os.path.getsize(file) for file in files]
    total, done, said = max(1, sum(sizes)), 0, time.monotonic()
    for file, size in zip(files, sizes, strict=True):
        try:
            for texts, share in read_texts(file, field):
                yield texts
                if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    at = (done + share * size) / total
                    logger.info(f"{name}: read {at:.0%} of {total / 1e9:.2f} GB, now in {file}")
        except DataError as e:
            raise DataError(f"{name}: {e}") from e
        done += size


def _in_blocks(arrays: Iterator[pa.Array]) -> Iterator[pa.Array]:
    """Arrays of about `BLOCK_SIZE` bytes, however many texts of them came at once."""
    gathered: list[pa.Array] = []
    size = 0
    for array in arrays:
        gathered.append(array)
        size += array.nbytes
        if size >= BLOCK_SIZE:
            yield pa.concat_arrays(gathered)
            gathered, size = [], 0
    if sum(map(len, gathered)):
        yield pa.concat_arrays(gathered)
