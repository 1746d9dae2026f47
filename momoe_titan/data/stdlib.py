"""The datasets `python_stdlib` and `python_stdlib_validation`: source files of the running Python's library.

Every machine has this text, without a network. One file in twenty is held out for validation.
"""

import hashlib
import os
import tokenize
from pathlib import Path

from datasets import Dataset

from momoe_titan.data.documents import split_text
from momoe_titan.data.errors import DataError

# Folders without text that a person wrote for the library: installed packages, tests, generated tables, and files that
# differ between builds of one Python version.
STDLIB_SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
HELD_OUT_ONE_IN = 20
# Source files are cut into documents of at most this many characters, so that a batch has pieces of several files and
# the loss of one batch says something about the next.
STDLIB_DOCUMENT_CHARS = 2048


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def is_held_out(relative_path: str) -> bool:
    """Whether a file belongs to the validation split.

    The path alone decides. Adding or removing other files, as another Python version does, moves no file from one split
    to the other.
    """
    return int.from_bytes(_digest(relative_path)[:8]) % HELD_OUT_ONE_IN == 0


def stdlib_files(root: str | os.PathLike, held_out: bool) -> list[str]:
    """Paths, relative to `root` and with "/", of one split's source files, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            s
            for s in subfolders
            # config-3.x-<platform> holds the interpreter's build configuration.
            if s not in STDLIB_SKIPPED_FOLDERS and not s.startswith("config-")
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name).relative_to(root).as_posix()
                if is_held_out(path) == held_out:
                    found.append(path)
    return sorted(found)


def read_stdlib(root: str, held_out: bool = False) -> tuple[list[str], list[str]]:
    """The standard library's source files in pieces.

    Args:
        root: Folder of the library (`sysconfig.get_path("stdlib")`).
        held_out: True for the validation split, False for the training split.

    Returns:
        The pieces, and for each the path of its file, relative to `root`. A hash of path and place orders them: files
        are mixed, in the same way on every machine with the same library.

    Raises:
        DataError: `root` holds no Python sources.
    """
    rows = []
    for path in stdlib_files(root, held_out):
        # tokenize.open honours the encoding that the file declares.
        try:
            with tokenize.open(os.path.join(root, path)) as f:
                text = f.read()
        except (OSError, SyntaxError, UnicodeDecodeError) as e:
            raise DataError(f"dataset_path: {os.path.join(root, path)!r}: {e}") from e
        rows.extend(
            (_digest(f"{path}:{i}"), piece, path) for i, piece in enumerate(split_text(text, STDLIB_DOCUMENT_CHARS))
        )
    if not rows:
        raise DataError(
            f"dataset_path {str(root)!r} holds no Python source files for the dataset "
            f"'python_stdlib'; use dataset 'local' with files of your own"
        )
    rows.sort()
    return [text for _, text, _ in rows], [path for _, _, path in rows]


def load_stdlib(root: str, held_out: bool = False) -> Dataset:
    """What `read_stdlib` gives, as a dataset with the columns "text" and "path"."""
    texts, paths = read_stdlib(root, held_out)
    return Dataset.from_dict({"text": texts, "path": paths})
