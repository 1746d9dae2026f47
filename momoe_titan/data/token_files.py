"""Token ids on disk as a `Source`: what `python -m momoe_titan.data.tokenize` writes, or shards of Megatron-LM's."""

import bisect
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchtitan.tools.logging import logger

from momoe_titan.data.errors import DataError
from momoe_titan.data.indexed import Shard
from momoe_titan.data.read_texts import kind_of
from momoe_titan.data.source import Source
from momoe_titan.data.tokenizer import TextTokenizer

INFO = "tokens.json"  # beside the shards: what they are made of
UNFINISHED = f"{INFO}.partial"  # in its place while they are made
_SAMPLES, _SAMPLE_BYTES, _CHUNK_IDS = 64, 4096, 1 << 26


class NoShardsError(DataError):
    """A path names no token shards."""


class TokenFiles(Source):
    """Documents of shards, one after the other. Reading one copies nothing: it is a slice of mapped memory.

    Args:
        name: what messages call it.
        paths: of the shards, in order.
        info: the content of `INFO` beside them; None where there is none.

    Raises:
        DataError: a shard is missing or damaged.
    """

    holds_tokens = True

    def __init__(self, name: str, paths: Sequence[str], info: dict[str, Any] | None = None) -> None:
        self.name, self.paths, self.info = name, list(paths), info
        self._shards = [Shard(path) for path in self.paths]
        self._ends = list(itertools.accumulate(len(shard) for shard in self._shards))
        self.tokens = sum(shard.tokens for shard in self._shards)
        listed = {shard["name"]: shard["bytes"] for shard in info["shards"]} if info else {}
        # Without a note of it: so many bytes of text that a token often stands for.
        self.size = sum(listed.get(shard.path.name, 4 * shard.tokens) for shard in self._shards)
        self.fingerprint = self._fingerprint()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "paths": self.paths, "info": self.info}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        """See `Source.read`."""
        found = []
        for index in indices:
            at = bisect.bisect_right(self._ends, index)
            shard = self._shards[at]
            found.append(shard[index - self._ends[at] + len(shard)])
        return found

    def range_of_ids(self) -> tuple[int, int]:
        """The smallest and the largest id of all, 0 where there is none; reads every shard as a whole."""
        smallest = largest = 0
        for shard in self._shards:
            for start in range(0, len(shard.data), _CHUNK_IDS):
                ids = shard.data[start : start + _CHUNK_IDS]
                smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
        return smallest, largest

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        sums = {shard["name"]: shard["crc32"] for shard in self.info["shards"]} if self.info else {}
        for shard in self._shards:
            known = sums.get(shard.path.name)
            digest.update(f"{len(shard)} {shard.tokens} {known} ".encode())
            if known is None:
                raw = shard.data.view(np.uint8)
                for start in range(0, len(raw), max(_SAMPLE_BYTES, len(raw) // _SAMPLES)):
                    digest.update(raw[start : start + _SAMPLE_BYTES].tobytes())
        return digest.hexdigest()[:16]


def open_tokens(path: str, tokenizer: TextTokenizer, field: str) -> TokenFiles:
    """The shards that a path names.

    Args:
        path: a folder, a .bin or .idx file, the path of both without their ends, or a pattern of such.
        tokenizer: of the job.
        field: of the configuration, for messages.

    Raises:
        DataError: no shards; damaged or unfinished ones; ids of another tokenizer, or that the tokenizer does not have.
    """
    name = f"{field} {path!r}"
    paths = _find_shards(path, name)
    folders = {os.path.dirname(p) for p in paths}
    infos = [read_info(os.path.join(folder, INFO)) for folder in folders]
    info = infos[0] if len(infos) == 1 else None
    for each in infos:
        if each is not None:
            _check_tokenizer(each, tokenizer, name)
    source = TokenFiles(name, paths, info)
    if len(source) == 0:
        raise DataError(f"{name} holds no document")
    if None in infos:
        _check_ids(source, tokenizer)
    return source


def holds_shards(path: str) -> bool:
    """Whether a path names token shards: a folder or pattern with an index of ids, or a shard by its name."""
    try:
        return bool(_find_shards(path, ""))
    except NoShardsError:
        return False
    except DataError:
        return True  # which `open_tokens` says better


def _find_shards(path: str, name: str) -> list[str]:
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        _check_finished(expanded, name)
        info = read_info(os.path.join(expanded, INFO))
        found = glob.glob(os.path.join(glob.escape(expanded), "**", "*.idx"), recursive=True)
        found = [f for f in found if os.path.exists(f.removesuffix(".idx") + ".bin")]  # others have such names, too
        if (info or found) and (text := first_text(expanded)):
            raise DataError(f"{name} holds token shards and {text!r}: keep texts in a folder of their own")
        if info:
            return [os.path.join(expanded, shard["name"]) for shard in info["shards"]]
    elif expanded.endswith((".bin", ".idx")) or os.path.exists(f"{expanded}.idx"):
        found = [expanded] if os.path.exists(expanded) else [f"{expanded}.idx"] * os.path.exists(f"{expanded}.idx")
    else:
        found = []
    found = found or [f for f in glob.glob(expanded, recursive=True) if f.endswith((".bin", ".idx"))]
    if not found:
        raise NoShardsError(f"{name} is no folder of token shards, no shard (.bin and .idx), and no pattern of such")
    for folder in {os.path.dirname(f) for f in found}:
        _check_finished(folder, name)
    shards: dict[str, str] = {}  # by what links lead to
    for stem in sorted({os.path.splitext(f)[0] for f in found}):
        shards.setdefault(os.path.realpath(f"{stem}.idx"), stem)
    return list(shards.values())


def _check_finished(folder: str, name: str) -> None:
    if os.path.exists(os.path.join(folder, UNFINISHED)):
        raise DataError(
            f"{name}: python -m momoe_titan.data.tokenize has not finished {folder!r}; the same command goes on"
        )


def first_text(folder: str | os.PathLike[str]) -> str | None:
    """A file of text in a folder or below, by its path from there; None if there is none."""
    found = ((root, name) for root, _, names in os.walk(folder) for name in sorted(names) if kind_of(name))
    return next((os.path.relpath(os.path.join(*each), folder) for each in found), None)


def read_info(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The content of `INFO`; None where there is no such file.

    Raises:
        DataError: it does not describe shards.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
    except OSError:
        return None
    try:
        info = json.loads(content)
        assert {"fingerprint", "num_ids", "folder"} <= info["tokenizer"].keys()
        assert all({"name", "documents", "tokens", "bytes", "crc32"} <= shard.keys() for shard in info["shards"])
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as e:
        raise DataError(f"{str(path)!r} is damaged: it does not describe token shards ({e!r})") from e
    return info


def _check_tokenizer(info: dict[str, Any], tokenizer: TextTokenizer, name: str) -> None:
    made_with = info["tokenizer"]
    if made_with["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"{name} holds the ids of another tokenizer, {made_with['folder']!r} ({made_with['num_ids']} ids, "
            f"EOS {made_with.get('eos_id')}), than model.hf_assets_path {tokenizer.tokenizer_path!r} "
            f"({tokenizer.num_ids} ids, EOS {tokenizer.eos_id})"
        )


def _check_ids(source: TokenFiles, tokenizer: TextTokenizer) -> None:
    """What can be said of shards that nobody described."""
    logger.warning(
        f"{source.name} does not say with which tokenizer its shards were made: there is no {INFO}, as "
        f"python -m momoe_titan.data.tokenize writes it. Their ids are checked to be below {tokenizer.num_ids}"
    )
    smallest, largest = source.range_of_ids()
    if smallest < 0:
        raise DataError(f"{source.name} holds the id {smallest}, must be at least 0")
    if largest >= tokenizer.num_ids:
        raise DataError(
            f"{source.name} holds the id {largest}, but the tokenizer in model.hf_assets_path "
            f"{tokenizer.tokenizer_path!r} ends with {tokenizer.num_ids - 1}: it is another one's"
        )
    ends = [document[-1] for document in source.read(range(min(len(source), 16))) if len(document)]
    if tokenizer.eos_id is not None and any(end != tokenizer.eos_id for end in ends):
        logger.warning(f"{source.name} has documents without EOS (id {tokenizer.eos_id}) at their end")
