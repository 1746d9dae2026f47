"""The dataset `local`: finds the files that a path names, and reads them."""

import glob
import os
from collections.abc import Iterator, Sequence

from torchtitan.tools.logging import logger

from momoe_titan.data.errors import DataError
from momoe_titan.data.read_texts import KINDS, READABLE, kind_of
from momoe_titan.data.source import Source
from momoe_titan.data.text_cache import cache_texts

NAMED = 5  # how many files a message names, of all that it is about


def find_local_files(path: str | Sequence[str], name: str = "dataset_path") -> list[str]:
    """The data files that a path names: .txt first, then .jsonl, then .parquet, each sorted by path.

    A path that exists is that file or folder, whatever characters it has. Another one is a pattern, with `**` for any
    depth. In folders links are followed, and no file is taken twice; files that cannot be read are named in the log.

    Args:
        path: a file, a folder or a pattern, or several of these.
        name: what messages call the path.

    Raises:
        DataError: nothing there, or a file of a kind that cannot be read.
    """
    found: dict[str, str] = {}  # by what links lead to
    for each in [path] if isinstance(path, str) else path:
        expanded = os.path.expanduser(each)
        if os.path.isdir(expanded):
            files = _in_folder(expanded, name)
        elif os.path.exists(expanded):
            files = [expanded]
        else:
            files = sorted(f for f in glob.glob(expanded, recursive=True) if os.path.isfile(f))
        if not files:
            raise DataError(
                f"{name} {each!r} is no file, no folder with files that can be read ({READABLE}), "
                "and no pattern that matches a file"
            )
        for file in files:
            if kind_of(file) is None:
                raise DataError(f"{name} {each!r}: {file!r} is none of {READABLE}")
            found.setdefault(os.path.realpath(file), file)
    return sorted(found.values(), key=lambda file: (KINDS.index(kind_of(file) or KINDS[0]), file))


def _in_folder(folder: str, name: str) -> list[str]:
    files = sorted(_walk(folder, set()))
    readable = {file for file in files if kind_of(file) is not None and os.path.isfile(file)}
    others = [file for file in files if file not in readable]
    if others:
        more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
        named = ", ".join(os.path.relpath(file, folder) for file in others[:NAMED])
        logger.warning(f"{name} {folder!r}: does not read {named}{more}, which are no files of {READABLE}")
    return [file for file in files if file in readable]


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    """Everything in a folder and below that is no folder; links to folders are followed, each folder once."""
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as e:
        raise DataError(f"cannot read the folder {folder!r}: {e}") from e
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry.path, seen)
        else:
            yield entry.path


def load_local(path: str | Sequence[str], text_field: str = "text", name: str = "dataset_path") -> Source:
    """The documents of local files.

    A .txt file is one document (a long one is cut); each line of .jsonl and each row of .parquet is one. The text is
    read once, into a memory-mapped cache.

    Args:
        path: see `find_local_files`.
        text_field: the field of .jsonl and .parquet records that holds the text.
        name: what messages call the path.

    Raises:
        DataError: no path, or a file that cannot be used. Names the file, and the line where there is one.
    """
    if not path:
        raise DataError(f"{name} is not set: the dataset 'local' needs a file, a folder or a pattern there")
    files = find_local_files(path, name)
    return cache_texts(files, text_field, f"{name} {path!r}")
