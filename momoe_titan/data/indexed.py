"""Reads and writes token ids in Megatron-LM's indexed format: a pair of files NAME.bin and NAME.idx.

NAME.bin holds the ids of all documents one after the other, without anything between them. NAME.idx, little-endian:

| bytes | what |
| --- | --- |
| 9 | "MMIDIDX" and two zeros |
| 8 | version, 1 |
| 1 | the ids' type: a key of `DTYPES` |
| 8 | S, the number of sequences |
| 8 | D + 1, where D is the number of documents |
| 4 S | ids of each sequence, int32 |
| 8 S | byte of NAME.bin at which each sequence begins, int64 |
| 8 (D + 1) | the first sequence of each document, and at the end S, int64 |

A document has one sequence in what this package writes, and any number in what it reads.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from momoe_titan.data.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()
}


def dtype_for(num_ids: int) -> np.dtype:
    """The smallest type for ids below `num_ids` that Megatron-LM would choose, too."""
    return DTYPES[8] if num_ids <= 1 << 16 else DTYPES[4]


class Shard:
    """The documents of one pair of files, mapped into memory: opening it reads the head of the index only.

    Attributes:
        path: without .bin and .idx.
        tokens: ids in all documents.
        data: all ids, [tokens].

    Args:
        path: of either file, or without .bin and .idx.

    Raises:
        DataError: a file is missing, of another format, or shorter than the index says. Names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).with_suffix("") if Path(path).suffix in (".bin", ".idx") else Path(path)
        index_file, data_file = (self.path.with_name(self.path.name + end) for end in (".idx", ".bin"))
        try:
            index = np.memmap(index_file, mode="r")
            size = data_file.stat().st_size
        except (OSError, ValueError) as e:  # ValueError: an empty file
            raise DataError(f"tokens {str(self.path)!r}: {e}") from e
        if len(index) < HEAD.size:
            raise DataError(f"tokens {str(index_file)!r}: {len(index)} bytes are too few for an index")
        magic, version, code, sequences, ends = HEAD.unpack(index[: HEAD.size].tobytes())
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise DataError(
                f"tokens {str(index_file)!r} is no index of token ids: it begins with {magic!r}, version {version}, "
                f"type {code}; must be {MAGIC!r}, version 1, type {', '.join(map(str, DTYPES))}"
            )
        if (wanted := HEAD.size + 12 * sequences + 8 * ends) > len(index) or ends < 1:
            raise DataError(f"tokens {str(index_file)!r} is cut off: it has {len(index)} bytes, not {wanted}")
        at = HEAD.size
        self._lengths = index[at : at + 4 * sequences].view("<i4")
        at += 4 * sequences
        self._starts = index[at : at + 8 * sequences].view("<i8")
        at += 8 * sequences
        self._documents = index[at : at + 8 * ends].view("<i8")
        self._dtype = DTYPES[code]
        end = int(self._starts[-1]) + int(self._lengths[-1]) * self._dtype.itemsize if sequences else 0
        if end > size:
            raise DataError(f"tokens {str(data_file)!r} is cut off: it has {size} bytes, not {end}")
        self.tokens = end // self._dtype.itemsize
        self.data = np.memmap(data_file, self._dtype, "r", shape=(self.tokens,)) if end else np.empty(0, self._dtype)

    def __len__(self) -> int:
        """How many documents there are."""
        return len(self._documents) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        """The ids of a document, [tokens]: a view of the file, unless the document has several sequences."""
        first, last = int(self._documents[document]), int(self._documents[document + 1])
        if last - first == 1:
            return self._sequence(first)
        return np.concatenate([np.empty(0, self._dtype), *(self._sequence(i) for i in range(first, last))])

    def _sequence(self, index: int) -> np.ndarray:
        start = int(self._starts[index]) // self._dtype.itemsize
        return self.data[start : start + int(self._lengths[index])]


class ShardWriter:
    """Writes one pair of files. Under their own names they are whole: until `close` they have others.

    Leaving its `with` block by an error removes what was written.

    Args:
        path: without .bin and .idx.
        dtype: of `DTYPES`.

    Attributes:
        lengths: ids of each document so far.
        crc32: of all ids; after `close` of the lengths too.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.lengths: list[int] = []
        self.crc32 = 0
        self._files = {end: path.with_name(f"{path.name}{end}.partial") for end in (".bin", ".idx")}
        self._data = open(self._files[".bin"], "wb")  # noqa: SIM115  # close closes it

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._data.close()
            for file in self._files.values():
                file.unlink(missing_ok=True)

    def add(self, documents: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Append documents, each by its ids."""
        for ids in documents:
            self.lengths.append(len(ids))
            raw = np.asarray(ids, dtype=self.dtype).tobytes()
            self.crc32 = zlib.crc32(raw, self.crc32)
            self._data.write(raw)

    def close(self) -> None:
        """Finish both files, the index last: where there is an index, the ids are whole."""
        _sync(self._data)
        lengths = np.asarray(self.lengths, "<i4")
        starts = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1], out=starts[1:], dtype="<i8")
        code = next(code for code, dtype in DTYPES.items() if dtype == self.dtype)
        with open(self._files[".idx"], "wb") as index:
            index.write(HEAD.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            index.write(lengths.tobytes())
            self.crc32 = zlib.crc32(lengths.tobytes(), self.crc32)
            index.write((starts * self.dtype.itemsize).tobytes())
            index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            _sync(index)
        for end, file in self._files.items():
            os.replace(file, self.path.with_name(self.path.name + end))


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
