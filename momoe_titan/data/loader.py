"""Text to train on, from files that are on the machine.

Adds to the datasets of TorchTitan's text loader (`training.dataset`,
`validation.dataset`):

`python_stdlib`, `python_stdlib_validation`
    The source files of the running Python's standard library: text that every
    machine has, without a network. One file in twenty is held out for validation.
`local`
    .txt, .jsonl and .parquet files named by `dataset_path`: one file, a folder
    (searched recursively) or a glob pattern.

TorchTitan's own datasets (`c4`, ...) stay as they are. Each loader returns a
Hugging Face dataset with the text in a column of that name.

The loader is TorchTitan's, but a checkpoint of it can be taken over by another
number of data-parallel ranks, and worker processes share the documents of their
rank: see `TextDataset`.
"""

import glob
import hashlib
import json
import os
import pickle
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import (
    Dataset,
    IterableDataset,
    Value,
    concatenate_datasets,
    load_dataset,
)
from datasets.distributed import split_dataset_by_node
from datasets.utils.logging import (
    get_verbosity as get_datasets_verbosity,
)
from datasets.utils.logging import (
    set_verbosity as set_datasets_verbosity,
)
from torch.utils.data import get_worker_info
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataset
from torchtitan.tools.logging import logger

# Not text that a person wrote for the library: installed packages, tests,
# generated tables, and files that differ between builds of one Python version.
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
# Source files are cut into documents of this many characters, so that a batch has
# pieces of several files and the loss of one batch says something about the next.
STDLIB_DOCUMENT_CHARS = 2048
# A .txt file longer than this (in characters) becomes several documents, split
# where a line ends: TorchTitan's loader tokenizes a document at a time.
MAX_DOCUMENT_CHARS = 1 << 18

LOCAL_SUFFIXES = (".txt", ".jsonl", ".parquet")


class DataError(ValueError):
    """Data or a tokenizer that the configuration names cannot be used.

    The message names the field of the configuration, the file and the reason.
    """


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def is_held_out(relative_path: str) -> bool:
    """Whether a file belongs to the validation split.

    Depends on the path alone, so that adding or removing other files (another
    Python version) moves no file from one split to the other.
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


def _split_text(text: str, max_chars: int) -> Iterator[str]:
    """Cut a text into documents, each ending where a line ends if it can."""
    start = 0
    while len(text) - start > max_chars:
        limit = start + max_chars
        end = text.rfind("\n", start, limit) + 1
        if end <= start:  # one line longer than a document
            end = limit
        yield text[start:end]
        start = end
    if text[start:].strip():
        yield text[start:]


def load_stdlib(root: str, held_out: bool = False) -> Dataset:
    """The standard library's source files as a dataset.

    Args:
        root: Folder of the library (`sysconfig.get_path("stdlib")`).
        held_out: The validation split in place of the training split.

    Returns:
        Rows of columns "text" (a piece of a file) and "path" (of the file, relative
        to `root`), in the order of a hash of path and place: mixed, and the same on
        every machine with the same library.

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
            (_digest(f"{path}:{i}"), piece, path) for i, piece in enumerate(_split_text(text, STDLIB_DOCUMENT_CHARS))
        )
    if not rows:
        raise DataError(
            f"dataset_path {str(root)!r} holds no Python source files for the dataset "
            f"'python_stdlib'; use dataset 'local' with files of your own"
        )
    _, texts, paths = zip(*sorted(rows))
    return Dataset.from_dict({"text": texts, "path": paths})


def find_local_files(path: str) -> list[str]:
    """The data files that `dataset_path` means, sorted.

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
                texts.extend(_split_text(f.read(), MAX_DOCUMENT_CHARS))
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
        # Later files are opened when training reaches them; what can be known
        # from the first one is still said before the first step.
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
        verbosity = get_datasets_verbosity()
        try:
            # Its own log of a failure does not help beside the error below.
            set_datasets_verbosity(50)
            # File by file, and cut to the text: the other columns may differ.
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
            set_datasets_verbosity(verbosity)
    return ds if text_field == "text" else ds.rename_column(text_field, "text")


def load_local(path: str, text_field: str = "text", streaming: bool = False) -> Dataset | IterableDataset:
    """Local files as a dataset.

    A .txt file is one document (long ones are cut), a line of .jsonl or a row of
    .parquet one each. Text files are held in memory; the others are converted to
    Hugging Face's memory-mapped cache, or read as training goes when `streaming`.
    A run resumes exactly where it was, when `streaming` within the first pass over
    the data only.

    Args:
        path: A file, a folder or a glob pattern.
        text_field: Field of .jsonl and .parquet records that holds the text.
        streaming: See above.

    Returns:
        Rows with the column "text", files in sorted order by kind.

    Raises:
        DataError: No path, or a file that cannot be used; names the file, and the
            line where there is one.
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


def _text_of(sample: dict[str, Any]) -> str:
    text = sample["text"]
    if not isinstance(text, str):  # possible in streamed files only
        raise DataError(f"dataset_path: a record holds {text!r} in place of text")
    return text


def register_datasets(text_field: str = "text", streaming: bool = False) -> None:
    """Add this module's datasets to TorchTitan's text loader.

    Can be called again; the arguments (`momoe.data_text_field`,
    `momoe.data_streaming`) then apply to datasets loaded from there on.
    """
    stdlib = sysconfig.get_path("stdlib")
    DATASETS["python_stdlib"] = DatasetConfig(stdlib, load_stdlib, _text_of)
    DATASETS["python_stdlib_validation"] = DatasetConfig(stdlib, partial(load_stdlib, held_out=True), _text_of)
    DATASETS["local"] = DatasetConfig("", partial(load_local, text_field=text_field, streaming=streaming), _text_of)


def resolve_assets_path(path: str) -> str:
    """`model.hf_assets_path`, where "momoe_titan/..." also means the installed package.

    Raises:
        DataError: There is no such folder.
    """
    if os.path.isdir(path):
        return path
    packaged = Path(__file__).parents[2] / path
    if path.startswith("momoe_titan/") and packaged.is_dir():
        return str(packaged)
    raise DataError(
        f"model.hf_assets_path {path!r} is not a folder; it must hold the tokenizer "
        "(tokenizer.json). The one that comes with this package is "
        "'momoe_titan/assets/tokenizer'"
    )


def build_tokenizer(job_config: JobConfig) -> HuggingFaceTokenizer:
    """TorchTitan's tokenizer from `model.hf_assets_path`.

    Raises:
        DataError: The folder or its tokenizer is missing or damaged.
    """
    path = resolve_assets_path(job_config.model.hf_assets_path)
    try:
        return HuggingFaceTokenizer(path)
    except Exception as e:  # tokenizers raises plain Exception for a damaged file
        raise DataError(f"model.hf_assets_path {path!r}: no usable tokenizer: {e}") from e


class TextDataset(HuggingFaceTextDataset):
    """TorchTitan's text dataset, with a position that does not depend on the ranks.

    A pass over the data is a list of [start, stop) ranges of documents for each rank;
    at first, and in every later pass, one range: the rank's share of the whole, the
    same that TorchTitan gives it. When another number of ranks resumes, what the old
    ranks had left of their passes is shared out anew, so that each document is still
    read once. Streamed datasets have no such position; theirs is TorchTitan's.

    In a worker process of the loader it is the worker's part of what the rank reads.
    A worker that finds no document there ends, and leaves the others to go on.

    Args:
        section: Of the configuration, which messages name: "training" or "validation".

    Raises:
        DataError: More ranks than documents, as far as can be known at once (streamed
            datasets other than 'local' are not read here). Iteration raises it, outside
            of a worker process, where whole passes hold no document for this rank.
    """

    def __init__(
        self,
        dataset_name: str,
        dataset_path: str | None,
        tokenizer: BaseTokenizer,
        seq_len: int,
        dp_rank: int,
        dp_world_size: int,
        infinite: bool,
        section: str = "training",
    ) -> None:
        # As one rank, which leaves a map-style dataset whole.
        super().__init__(dataset_name, dataset_path, tokenizer, seq_len, 0, 1, infinite)
        self.dp_rank, self.dp_world_size = dp_rank, dp_world_size
        self.section, self.described = section, f"{section}.dataset {dataset_name!r}"
        self.place = f" ({section}.dataset_path {dataset_path!r})" if dataset_path else ""
        # In a worker process: which one of the rank's it is, and of how many.
        self._worker: tuple[int, int] | None = None
        self._has_ended = False
        self.is_streamed = not isinstance(self._data, Dataset)
        if not self.is_streamed:
            documents = len(self._data)
        elif self.dataset_name == "local":
            documents = sum(1 for _ in islice(self._data, dp_world_size))
        else:  # elsewhere, perhaps
            documents = dp_world_size
        if documents < dp_world_size:
            raise DataError(
                f"{self.described} has fewer documents than the "
                f"{dp_world_size} data-parallel ranks that share it: {documents}{self.place}"
            )
        if self.is_streamed:
            self._whole = self._data
            self._data = split_dataset_by_node(self._data, dp_rank, dp_world_size)
        else:
            self._ranges = self._share_of([(0, len(self._data))])

    def _share_of(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """This rank's, or this worker's, part of the documents of all ranks."""
        ranges = _share(ranges, self.dp_rank, self.dp_world_size)
        return _share(ranges, *self._worker) if self._worker else ranges

    def _enter_worker(self) -> None:
        """In a worker process, the first time: keep its part of what the rank has left."""
        info = get_worker_info()
        if info is None or self._worker:
            return
        self._worker = info.id, info.num_workers
        if self.is_streamed:
            self._data = self._worker_stream()
        else:
            self._ranges = _share(_cut(self._ranges, self._sample_idx), *self._worker)
            self._sample_idx = 0
        if info.id > 0:  # tokens that were read but not yet handed out
            self._token_buffer = []

    def _worker_stream(self) -> IterableDataset:
        """The worker's part of a streamed dataset: some of the rank's files if there are
        enough for all workers, otherwise some of the documents of each."""
        worker, workers = self._worker
        data, files = self._whole, self._whole.num_shards
        if files % self.dp_world_size == 0:  # the ranks share the files
            data = data.shard(self.dp_world_size, self.dp_rank, contiguous=False)
            if data.num_shards >= workers:
                return data.shard(workers, worker, contiguous=False)
            return split_dataset_by_node(data, worker, workers)
        if files >= workers:
            data = data.shard(workers, worker, contiguous=False)
            return split_dataset_by_node(data, self.dp_rank, self.dp_world_size)
        return split_dataset_by_node(data, self.dp_rank * workers + worker, self.dp_world_size * workers)

    def _get_data_iter(self) -> Iterator[dict[str, Any]]:
        if not self.is_streamed:
            for start, stop in _cut(self._ranges, self._sample_idx):
                yield from self._data.select(range(start, stop))
        elif self._worker is None:
            yield from self._data
        else:
            # What iter(self._data) does outside of a worker process. In one it would
            # split the files once more, and leave workers without any.
            for _, sample in self._data._prepare_ex_iterable_for_iteration():
                yield sample

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        self._enter_worker()
        if self._has_ended:  # the next validation, which reads the same
            self._start_pass()
            self._token_buffer, self._has_ended = [], False
        empty_passes = 0
        # The first one may be what a checkpoint had left of a pass: nothing.
        while empty_passes < 2:
            n_tokens = 0
            for sample in self._get_data_iter():
                text = self._text_processor(sample)
                tokens = self._tokenizer.encode(text, add_bos=True, add_eos=True)
                n_tokens += len(tokens)
                self._token_buffer.extend(tokens)
                self._sample_idx += 1
                while len(self._token_buffer) > self.seq_len:
                    x = torch.tensor(self._token_buffer[: self.seq_len + 1])
                    self._token_buffer = self._token_buffer[self.seq_len + 1 :]
                    yield {"input": x[:-1]}, x[1:]
            if not self.infinite:
                self._has_ended = True
                return
            empty_passes = 0 if n_tokens else empty_passes + 1
            if n_tokens:
                logger.warning(f"Dataset {self.dataset_name} is being re-looped")
            self._start_pass()
            if self.is_streamed:  # read in another order of the files
                self._data.set_epoch(self._data.epoch + 1)
        if self._worker is None:
            raise self.no_documents()
        logger.warning(
            f"{self.described} has no document for worker {self._worker[0]} of the "
            f"{self._worker[1]} ({self.section}.dataloader.num_workers) of data-parallel "
            f"rank {self.dp_rank}, which ends"
        )

    def _start_pass(self) -> None:
        self._sample_idx = 0
        if not self.is_streamed:
            self._ranges = self._share_of([(0, len(self._data))])

    def no_documents(self) -> DataError:
        return DataError(
            f"{self.described} has no document, or none with a token, for data-parallel "
            f"rank {self.dp_rank} of {self.dp_world_size}, which share the documents, or the "
            f"files where their number is a multiple of {self.dp_world_size} and they are "
            f"streamed (momoe.data_streaming){self.place}"
        )

    def state_dict(self) -> dict[str, Any]:
        self._enter_worker()
        state = super().state_dict()
        # A copy: a worker process sends it later, when this list has grown.
        state["token_buffer"] = list(self._token_buffer)
        if not self.is_streamed:
            state.update(ranges=self._ranges, documents=len(self._data))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._enter_worker()
        if not self.knows([state_dict]):
            return
        token_buffer = list(state_dict["token_buffer"])
        if not self.is_streamed:
            self._ranges, self._sample_idx = state_dict["ranges"], state_dict["sample_idx"]
            self._token_buffer = token_buffer
            return
        self._data.load_state_dict(state_dict["data"])
        try:
            if state_dict["data"]:  # of another pass than this one's it has no effect
                self._data.set_epoch(state_dict["data"]["epoch"])
            # What it does first; from here on it is also what its state_dict returns.
            self._data._prepare_ex_iterable_for_iteration()
            self._token_buffer = token_buffer
        except (IndexError, KeyError, TypeError):
            self._data.load_state_dict(None)
            self._data.set_epoch(0)
            start_anew(f"the files of {self.described} are not those that it was written with")

    def reshard(self, states: list[dict[str, Any] | None]) -> None:
        """Go on where other ranks were.

        Args:
            states: of all ranks of the checkpoint, in the order of their ranks; None
                for one that is unknown.
        """
        if not self.knows(states, len(states)):
            return
        left = [r for s in states for r in _cut(s["ranges"], s["sample_idx"])]
        self._ranges, self._sample_idx = self._share_of(left), 0
        # Tokens of documents that were read but not yet handed out.
        mine = states[self.dp_rank :: self.dp_world_size]
        self._token_buffer = [token for s in mine for token in s["token_buffer"]]
        logger.info(
            f"The data of {len(states)} data-parallel ranks is shared out to "
            f"{self.dp_world_size}: this one has {sum(b - a for a, b in self._ranges)} "
            "documents left of the pass"
        )

    def knows(self, states: list[dict[str, Any] | None], ranks: int | None = None) -> bool:
        """Whether positions mean something here; says so where they do not.

        Args:
            states: of ranks of the checkpoint, or of worker processes of one; None for one
                that is unknown.
            ranks: how many the checkpoint has, if they are to be shared out anew.
        """
        was_streamed = [bool(state) and "data" in state for state in states]
        was_not = [bool(state) and "ranges" in state for state in states]
        if (all(was_not) and self.is_streamed) or (all(was_streamed) and not self.is_streamed):
            then, now = ("not streamed", "streamed")[:: 1 if self.is_streamed else -1]
            reason = f"it was written when the data was {then}, now {self.described} is {now} (momoe.data_streaming)"
        elif ranks is not None and not all(was_not):
            reason = (
                f"it was written by {ranks} data-parallel ranks, now there are "
                f"{self.dp_world_size}, and the position in a streamed dataset, or one "
                "that worker processes read, cannot be shared out anew"
            )
        elif not all(was_streamed if self.is_streamed else was_not):
            reason = "it is not one of this loader's"
        elif not self.is_streamed and (then := states[0]["documents"]) != len(self._data):
            reason = f"{self.dataset_name!r} had {then} documents, now it has {len(self._data)}"
        else:
            return True
        start_anew(reason)
        return False


def start_anew(reason: str) -> None:
    """Say why a checkpoint's position in the data has no effect."""
    logger.warning(
        f"The checkpoint's position in the data is not used: {reason}. THE DATA STARTS AGAIN FROM ITS BEGINNING."
    )


def _share(ranges: list[tuple[int, int]], index: int, count: int) -> list[tuple[int, int]]:
    """Part number `index` of `count` parts of some documents: as many for each, in order."""
    each, more = divmod(sum(stop - start for start, stop in ranges), count)
    first = each * index + min(index, more)
    return _cut(ranges, first, first + each + (index < more))


def _cut(ranges: list[tuple[int, int]], first: int, last: int | None = None) -> list[tuple[int, int]]:
    """The documents number `first` to `last` (not included) of those in `ranges`.

    _cut([(0, 3), (10, 13)], 2, 5) is [(2, 3), (10, 12)].
    """
    found = []
    for start, stop in ranges:
        begin = start + max(first, 0)
        end = stop if last is None else min(stop, start + max(last, 0))
        if begin < end:
            found.append((begin, end))
        first -= stop - start
        last = None if last is None else last - (stop - start)
    return found


class TextDataloader(ParallelAwareDataloader):
    """TorchTitan's loader of a `TextDataset`, which also takes over a checkpoint of
    another number of ranks.

    A position that cannot be used, such as one of another number of worker processes,
    is a warning, and the data starts from its beginning.

    Raises:
        DataError: Iteration raises it where there is nothing for this rank to read.
    """

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        batch = None
        for batch in super().__iter__():
            yield batch
        if self.dataset.infinite:  # it ended, because no worker process found a document
            raise self.dataset.no_documents()
        if batch is None:
            raise DataError(
                f"{self.dataset.described} holds not one sequence of "
                f"{self.dataset.section}.seq_len {self.dataset.seq_len} tokens{self.dataset.place}"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if saved := state_dict.get(self._rank_id):
            states = self._dataset_states([pickle.loads(saved)])
            if states is None or not self.dataset.knows(states):
                return
        super().load_state_dict(state_dict)

    def load_ranks(self, states: list[bytes]) -> None:
        """Go on where other ranks were.

        Args:
            states: what `state_dict` holds for each rank of the checkpoint.
        """
        of_ranks = self._dataset_states([pickle.loads(s) for s in states])
        if of_ranks is not None:
            # what worker processes had is not shared out
            self.dataset.reshard(of_ranks if self.num_workers == 0 else [None] * len(states))

    def _dataset_states(self, states: list[dict[str, Any]]) -> list[dict[str, Any] | None] | None:
        """What loaders say of their datasets, for each of their worker processes if they
        have some; None, with a warning, if that is another number than this loader has."""
        found = []
        for state in states:
            # "_snapshot" is there if worker processes read the data, "dataset_state" if not.
            of_workers = state.get("_snapshot", {}).get("_worker_snapshots", {})
            if (then := len(of_workers)) != self.num_workers:
                start_anew(
                    f"it was written with {self.dataset.section}.dataloader.num_workers = "
                    f"{then}, now it is {self.num_workers}"
                )
                return None
            found += [s.get("dataset_state") for s in of_workers.values() or [state]]
        return found


def build_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = True,
) -> TextDataloader:
    """The loader of `training.dataset`, with the `[momoe]` data options applied.

    They apply to the validation loader too, which TorchTitan builds after this one.

    Raises:
        DataError: The dataset is unknown, missing, damaged, or smaller than the number
            of ranks.
    """
    options = getattr(job_config, "momoe", None)
    if options is not None:
        register_datasets(options.data_text_field, options.data_streaming)
    return _build_loader("training", job_config.training, dp_world_size, dp_rank, tokenizer, infinite)


def build_validation_dataloader(
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    job_config: JobConfig,
    infinite: bool = False,
) -> TextDataloader:
    """The loader of `validation.dataset`. If not `infinite`, each pass reads the same.

    Raises:
        DataError: As `build_dataloader`; or `validation.steps` is -1 and there are several
            ranks, of which one would run out of data while the others wait for it.
    """
    config = job_config.validation
    if config.steps == -1 and dp_world_size > 1:
        raise DataError(
            "validation.steps is -1 (all of validation.dataset), must be a number of batches "
            f"with {dp_world_size} data-parallel ranks: their parts of the data may not be "
            "equally long"
        )
    return _build_loader("validation", config, dp_world_size, dp_rank, tokenizer, infinite)


def _build_loader(
    section: str,
    config: Training | Validation,
    dp_world_size: int,
    dp_rank: int,
    tokenizer: BaseTokenizer,
    infinite: bool,
) -> TextDataloader:
    dataset = TextDataset(
        config.dataset,
        config.dataset_path,
        tokenizer,
        config.seq_len,
        dp_rank,
        dp_world_size,
        infinite,
        section,
    )
    return TextDataloader(
        dataset,
        dp_rank,
        dp_world_size,
        batch_size=config.local_batch_size,
        **asdict(config.dataloader),
    )


register_datasets()
