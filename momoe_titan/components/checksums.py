"""Finds bytes of a checkpoint that have changed since they were written, while the size stayed the same.

Each tensor and each object of a checkpoint is a zip archive of torch.save, with a CRC-32 of its bytes. torch.load is
built without the check of these sums, so that a changed bit would become a weight. Python's zipfile does check them.
`.metadata`, which says where each archive is, is a plain pickle: its SHA-256 stands in a file beside it.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

METADATA = ".metadata"
METADATA_SUM = "metadata.sha256"  # in the format of the command sha256sum
READERS = 4  # threads; zlib computes without the interpreter's lock


class _Part(io.RawIOBase):
    """The bytes of a file from an offset on, of this length, as a file."""

    def __init__(self, file: io.BufferedReader, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError(f"negative position {start + offset}")  # as a file does
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        size = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += size
        return size


def _find_fault(path: str, index: MetadataIndex, stored: Any) -> str | None:
    try:
        with open(os.path.join(path, stored.relative_path), "rb") as file:
            part: Any = _Part(file, stored.offset, stored.length)
            with zipfile.ZipFile(part) as archive:
                if archive.testzip() is None:
                    part.seek(0)
                    torch._C.PyTorchFileReader(part)  # stricter with what is around the sums
                    return None
        reason = "another CRC-32"
    except Exception as e:  # whatever reading a damaged archive raises
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
    return f"its bytes of {index.fqn} in {stored.relative_path} have changed since they were written ({reason})"


def find_changed_bytes(
    path: str, metadata: Metadata, names: Collection[str] | None = None, rank: int = 0, num_ranks: int = 1
) -> str | None:
    """A sentence on the first tensor or object whose bytes are not those that were written; None where all are.

    Reads all of the files once, this rank's share of them where there are several.

    Args:
        path: a folder of torch.distributed.checkpoint.
        metadata: what its .metadata says.
        names: look only at these keys of the state dict; all if None.
    """
    stored = [
        (index, info)
        for index, info in metadata.storage_data.items()
        # what an extension of torch's has transformed (compressed, say) is no zip archive
        if (names is None or index.fqn in names) and not info.transform_descriptors
    ]
    stored.sort(key=lambda item: (item[1].length, item[1].relative_path, item[1].offset))  # so that shares are even
    with ThreadPoolExecutor(READERS) as pool:
        faults = pool.map(lambda item: _find_fault(path, *item), stored[rank::num_ranks])
        return next((fault for fault in faults if fault is not None), None)


def _sum_of_metadata(path: str) -> str:
    with open(os.path.join(path, METADATA), "rb") as file:
        return f"{hashlib.sha256(file.read()).hexdigest()}  {METADATA}\n"


def write_metadata_sum(path: str) -> None:
    """Keep the SHA-256 of this folder's .metadata beside it.

    Raises:
        OSError: there is no .metadata, or the file cannot be written.
    """
    text = _sum_of_metadata(path)
    kept = os.path.join(path, METADATA_SUM)
    # Under its name when it is whole: with a part of the sum, after a kill or on a full disk, the checkpoint would be
    # passed over.
    with open(f"{kept}.part", "w") as file:
        file.write(text)
    os.replace(f"{kept}.part", kept)


def metadata_has_changed(path: str) -> bool:
    """Whether this folder's .metadata is another than the one whose sum was kept; False where none was."""
    try:
        with open(os.path.join(path, METADATA_SUM), errors="replace") as file:
            kept = file.read()
    except FileNotFoundError:
        return False
    return kept != _sum_of_metadata(path)
