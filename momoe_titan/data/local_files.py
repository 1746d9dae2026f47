"""The dataset `local`: reads .txt, .jsonl and .parquet files from `dataset_path`."""

import glob
import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.utils.logging import get_verbosity, set_verbosity

from momoe_titan.data.documents import split_text
from momoe_titan.data.errors import DataError

# A .txt file with more characters becomes several documents, because the loader tokenizes a document at a time.
MAX_DOCUMENT_CHARS = 1 << 18

LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")


def find_local_files(path: str) -> list[str]:
    """The data files that `dataset_path` names, sorted.

    Args:
        path: A file, a folder or a glob pattern (`**` for any depth).

    Raises:
        DataError: Nothing there, or a file of a kind that cannot be read.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        files = [str(p) for p in Path(expanded).rglob("*") if p.suffix in LOCAL_SUFFIXES and p.is_file()]
    elif os.path.isfile(expanded):
        files = [expanded]
    else:
        files = [f for f in glob.glob(expanded, recursive=True) if os.path.isfile(f)]
    if not files:
        raise DataError(
            f"dataset_path {path!r} is no file, no folder with "
            f"{', '.join(LOCAL_SUFFIXES)} files, and no pattern that matches a file"
        )
    for file in files:
        if Path(file).suffix not in LOCAL_SUFFIXES:
            raise DataError(f"dataset_path {path!r}: {file!r} is none of {', '.join(LOCAL_SUFFIXES)}")
    return sorted(files)


def _load_text_files(files: list[str]) -> Dataset:
    texts: list[str] = []
    for file in files:
        try:
            with open(file, encoding="utf-8") as f:
                texts.extend(split_text(f.read(), MAX_DOCUMENT_CHARS))
        except (OSError, UnicodeDecodeError) as e:
            raise DataError(f"dataset_path: cannot read {file!r}: {e}") from e
    if not texts:
        raise DataError(f"dataset_path: {files} hold no text")
    return Dataset.from_dict({"text": texts})


def _find_fault(file: str, text_field: str) -> str | None:
    """What is wrong with a .jsonl or .parquet file, or None."""
    try:
        if os.path.getsize(file) == 0:
            return "the file is empty"
        if file.endswith(".parquet"):
            from pyarrow import parquet

            table = parquet.ParquetFile(file)
            if text_field not in table.schema_arrow.names:
                return f"no column {text_field!r} (momoe.data_text_field), but {table.schema_arrow.names}"
            for _ in table.iter_batches(columns=[text_field]):
                pass
            return None
        with open(file, encoding="utf-8") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as e:
                    return f"line {number} is not JSON: {e}"
                if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                    return f"line {number} has no text in the field {text_field!r} (momoe.data_text_field)"
    except Exception as e:  # whatever the reader of a broken file raises
        return str(e)
    return None


def _load_records(kind: str, files: list[str], text_field: str, streaming: bool) -> Dataset | IterableDataset:
    """Read .jsonl (`kind` "json") or .parquet files, keeping the text only."""
    if streaming:
        # Training opens later files when it reaches them. Faults of the first file are reported before the first step.
        try:
            ds = load_dataset(kind, data_files=files, split="train", streaming=True)
            first = next(iter(ds))
        except Exception as e:
            raise DataError(f"dataset_path: cannot read {files[0]!r}: {e!r}") from e
        if not isinstance(first.get(text_field), str):
            raise DataError(
                f"dataset_path: {files[0]!r}: no text in the field {text_field!r} "
                f"(momoe.data_text_field), but {sorted(first)}"
            )
        ds = ds.select_columns([text_field])
    else:
        verbosity = get_verbosity()
        try:
            # The error below says more than the library's own log of a failure.
            set_verbosity(50)
            # File by file, and only the text: the other columns may differ.
            parts = []
            for file in files:
                part = load_dataset(kind, data_files=file, split="train")
                part = part.select_columns([text_field])
                if part.features[text_field].dtype not in ("string", "large_string"):
                    raise DataError(f"the field {text_field!r} is not text")
                if part.data.column(text_field).null_count:
                    raise DataError(f"a record without text in the field {text_field!r}")
                parts.append(part.cast_column(text_field, Value("string")))
            ds = concatenate_datasets(parts)
        except Exception as e:
            for file in files:
                if fault := _find_fault(file, text_field):
                    raise DataError(f"dataset_path: {file!r}: {fault}") from e
            raise DataError(f"dataset_path: cannot read {files}: {e!r}") from e
        finally:
            set_verbosity(verbosity)
    return ds if text_field == "text" else ds.rename_column(text_field, "text")


def load_local(path: str, text_field: str = "text", streaming: bool = False) -> Dataset | IterableDataset:
    """Local files as a dataset.

    A .txt file is one document (a long one is cut); each line of .jsonl and each row of .parquet is one. Text files are
    held in memory. The others are converted to Hugging Face's memory-mapped cache, or with `streaming` read while
    training goes on. A run resumes exactly where it was; with `streaming` only within the first pass over the data.

    Args:
        path: A file, a folder or a glob pattern.
        text_field: The field of .jsonl and .parquet records that holds the text.
        streaming: Read .jsonl and .parquet files without converting them.

    Returns:
        Rows with the column "text": .txt files first, then .jsonl, then .parquet, each sorted by path.

    Raises:
        DataError: No path, or a file that cannot be used. Names the file, and the line where there is one.
    """
    if not path:
        raise DataError(
            "the dataset 'local' needs training.dataset_path (for validation, "
            "validation.dataset_path): a file, a folder or a pattern"
        )
    files = find_local_files(path)
    by_suffix = {s: [f for f in files if f.endswith(s)] for s in LOCAL_SUFFIXES}
    parts: list[Any] = []
    if by_suffix[".txt"]:
        part = _load_text_files(by_suffix[".txt"])
        parts.append(part.to_iterable_dataset() if streaming else part)
    for suffix, kind in ((".jsonl", "json"), (".parquet", "parquet")):
        if by_suffix[suffix]:
            parts.append(_load_records(kind, by_suffix[suffix], text_field, streaming))
    return parts[0] if len(parts) == 1 else concatenate_datasets(parts)
