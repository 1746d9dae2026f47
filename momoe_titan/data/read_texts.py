"""Reads the text of .txt, .jsonl and .parquet files, and nothing else of them; a fault names the file and the line."""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
from pyarrow import json as arrow_json
from pyarrow import parquet

from momoe_titan.data.documents import split_blocks
from momoe_titan.data.errors import DataError

# A .txt file with more characters becomes several documents, because the loader tokenizes a document at a time.
MAX_DOCUMENT_CHARS = 1 << 18
BLOCK_SIZE = 1 << 23  # bytes or characters of a file that are read at once

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}  # of .txt and .jsonl; .parquet compresses inside
READABLE = ".txt, .jsonl, .parquet, or .txt and .jsonl with .gz or .zst behind"


def kind_of(file: str) -> str | None:
    """The member of `KINDS` that a file is by its name; None for another one."""
    name, suffix = os.path.splitext(file.lower())
    if suffix in COMPRESSIONS:
        suffix = os.path.splitext(name)[1]
        return suffix if suffix in (".txt", ".jsonl") else None
    return suffix if suffix in KINDS else None


def read_texts(file: str, field: str) -> Iterator[tuple[pa.Array, float]]:
    """The documents of a file: of .txt the file, cut where it is long, of .jsonl each line, of .parquet each row.

    Other fields of a record may be of any type, change it, repeat, or be missing.

    Args:
        file: of one of `KINDS`.
        field: which field of a record is the text.

    Yields:
        An array of type large_string, and the share of the file that has been read.

    Raises:
        DataError: names the file, and the line or row that cannot be used.
    """
    readers: Any = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    try:
        yield from readers[kind_of(file)](file, field)
    except DataError:
        raise
    # What readers of damaged files raise: Arrow's errors are ValueErrors and OSErrors, a bad gzip is either of them.
    except (OSError, ValueError, EOFError, zlib.error, pa.ArrowException) as e:
        raise DataError(f"cannot read {file!r}: {e}") from e


def _open(file: str, raw: IO[bytes]) -> Any:
    """The uncompressed content of an open file."""
    compression = COMPRESSIONS.get(os.path.splitext(file.lower())[1])
    if compression == "gzip":
        return gzip.GzipFile(fileobj=raw)  # says of a file that is cut off or changed that it is
    return pa.CompressedInputStream(raw, compression) if compression else raw


def _share(raw: IO[bytes]) -> float:
    return raw.tell() / max(1, os.fstat(raw.fileno()).st_size)


def _read_txt(file: str, field: str) -> Iterator[tuple[pa.Array, float]]:
    with open(file, "rb") as raw:
        text = io.TextIOWrapper(_open(file, raw), encoding="utf-8")
        blocks = iter(lambda: text.read(BLOCK_SIZE), "")
        try:
            for document in split_blocks(blocks, MAX_DOCUMENT_CHARS):
                yield pa.array([document], pa.large_string()), _share(raw)
        except UnicodeDecodeError as e:
            raise DataError(f"{file!r}: line {_line_that_is_not_utf8(file)} is not UTF-8: {e}") from e


def _line_that_is_not_utf8(file: str) -> int:
    with open(file, "rb") as raw:
        for number, line in enumerate(io.BufferedReader(_open(file, raw)), start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _read_jsonl(file: str, field: str) -> Iterator[tuple[pa.Array, float]]:
    with open(file, "rb") as raw:
        stream = _open(file, raw)
        first, rest = 1, b""  # number of the first line of a block; a line that is not whole yet
        while block := stream.read(BLOCK_SIZE):
            end = block.rfind(b"\n") + 1
            if end == 0:
                rest += block
                continue
            lines, rest = rest + block[:end], block[end:]
            yield _parse_lines(file, lines, first, field), _share(raw)
            first += lines.count(b"\n")
        yield _parse_lines(file, rest, first, field), 1.0


def _parse_lines(file: str, lines: bytes, first: int, field: str) -> pa.Array:
    """The texts of a block of whole lines."""
    if not lines.strip():
        return pa.array([], pa.large_string())
    try:
        # Arrow's reader crashes on a line that is `null`, and takes records from between others on one line.
        ends = lines.count(b"\n", 0, -1)
        if not lines.startswith(b"{") or lines.count(b"\n{") != ends:
            raise ValueError("a line that is no record, or an empty one")
        texts = arrow_json.read_json(
            io.BytesIO(lines),
            read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            parse_options=arrow_json.ParseOptions(
                explicit_schema=pa.schema([(field, pa.large_string())]), unexpected_field_behavior="ignore"
            ),
        ).column(field)
        texts.validate(full=True)  # that it is UTF-8
        if texts.null_count == 0 and len(texts) == ends + 1:
            return pa.concat_arrays(texts.chunks)
    except (pa.ArrowException, ValueError, OverflowError):  # OverflowError: more than 2 GiB in a line
        pass
    # A fault, an empty line, or something that only Arrow refuses, such as a number too large in another field.
    found = [_parse_line(line, field) for line in lines.split(b"\n")]
    for number, (_, fault) in enumerate(found, start=first):
        if fault:
            raise DataError(f"{file!r}: line {number} {fault}")
    return pa.array([text for text, _ in found if text is not None], pa.large_string())


def _parse_line(line: bytes, field: str) -> tuple[str | None, str]:
    """The text of a line, and what is wrong with the line; an empty line has neither."""
    if not line.strip():
        return None, ""
    try:
        # Numbers are not looked at, so that none is too large.
        record = json.loads(line.decode("utf-8-sig"), parse_int=_nothing, parse_float=_nothing, parse_constant=_nothing)
    except (ValueError, RecursionError) as e:
        return None, f"is not JSON: {e}"
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = f", but {sorted(record)}" if isinstance(record, dict) and field not in record else ""
        return None, f"has no text in the field {field!r} (momoe.data_text_field){has}"
    return text, _fault_of(text)


def _nothing(_: str) -> None:
    return None


def _fault_of(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        return f"has a text that is not Unicode: {e}"
    return ""


def _is_utf8(texts: pa.Array) -> bool:
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _fault_of_bytes(text: bytes) -> str:
    try:
        text.decode()
    except UnicodeDecodeError as e:
        return str(e)
    return ""


def _read_parquet(file: str, field: str) -> Iterator[tuple[pa.Array, float]]:
    with parquet.ParquetFile(file) as opened:
        schema = opened.schema_arrow
        if field not in schema.names:
            raise DataError(f"{file!r}: no column {field!r} (momoe.data_text_field), but {schema.names}")
        kind = schema.field(field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
            raise DataError(f"{file!r}: column {field!r} (momoe.data_text_field) is of type {kind}, not text")
        rows = 0
        for batch in opened.iter_batches(columns=[field], batch_size=1024):
            column = batch.column(batch.schema.get_field_index(field))
            texts = column.cast(pa.large_string())
            if texts.null_count:
                row = texts.is_null().to_pylist().index(True)
                raise DataError(f"{file!r}: row {rows + row + 1} has no text in the column {field!r}")
            if not _is_utf8(texts):
                faults = map(_fault_of_bytes, texts.cast(pa.large_binary()).to_pylist())
                row, fault = next((row, fault) for row, fault in enumerate(faults, start=rows + 1) if fault)
                raise DataError(f"{file!r}: row {row} is not UTF-8: {fault}")
            rows += len(texts)
            yield texts, rows / max(1, opened.metadata.num_rows)
