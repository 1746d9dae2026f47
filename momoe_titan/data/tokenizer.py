"""Finds and loads the tokenizer of a job."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtitan.components.tokenizer import HuggingFaceTokenizer
from torchtitan.config import JobConfig
from torchtitan.tools.logging import logger

from momoe_titan.data.errors import DataError

# Names of the token that ends a text, for a tokenizer whose files do not say which token does.
EOS_NAMES = (
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
)
_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")


class TextTokenizer(HuggingFaceTokenizer):
    """TorchTitan's tokenizer, for documents: each keeps its length and its end, whatever the tokenizer's files say.

    - Truncation and padding that were saved in tokenizer.json are switched off, with a warning.
    - Special tokens are read from tokenizer_config.json, else from special_tokens_map.json. If neither names an EOS
      token, it is looked for in generation_config.json and config.json, then among the special tokens by its name; a
      warning says which token was taken, or that documents have no end. It may be the BOS token too.
    - The text of a special token in a document stays text, so that a document cannot end itself.

    Args:
        folder: with tokenizer.json, or with vocab.json (vocab.txt) and merges.txt.
        parse_special: take the text of a special token for the token, as transformers does with prompts.
    """

    def __init__(self, folder: str, parse_special: bool = False) -> None:
        self.parse_special = parse_special
        super().__init__(folder)
        self.tokenizer.encode_special_tokens = not parse_special
        # TorchTitan asks whether BOS and EOS are somewhere around a text, which cannot tell one token for both apart.
        before, after = self._added_around_text()
        self.hf_adds_bos, self.hf_adds_eos = self.bos_id in before, self.eos_id in after

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process; the library's own pickles forget this setting."""
        vars(self).update(state)
        self.tokenizer.encode_special_tokens = not self.parse_special

    @functools.cached_property
    def num_ids(self) -> int:
        """How many rows an embedding needs: one more than the largest id. Some tokenizers leave ids out."""
        return 1 + max(self.get_vocab().values(), default=-1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that the ids of a document depend on, the same for the same tokenizer elsewhere."""
        digest = hashlib.sha256()
        for name in _FILES:
            file = Path(self.tokenizer_path, name)
            if file.is_file():
                content = file.read_bytes()
                if name == "tokenizer.json":
                    fields = json.loads(content) | {"truncation": None, "padding": None}
                    content = json.dumps(fields, sort_keys=True).encode()
                digest.update(f"{name} {len(content)} ".encode() + content)
                if name == "tokenizer.json":  # nothing else is read
                    break
        rules = [self.bos_id, self.eos_id, self.hf_adds_bos, self.hf_adds_eos, self.parse_special]
        digest.update(json.dumps(rules).encode())
        return digest.hexdigest()

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of documents, each from BOS to EOS as far as the tokenizer has them. On several threads."""
        before = [self.bos_id] if self.bos_id is not None and not self.hf_adds_bos else []
        after = [self.eos_id] if self.eos_id is not None and not self.hf_adds_eos else []
        return [before + encoding.ids + after for encoding in self.tokenizer.encode_batch_fast(list(texts))]

    def _infer_special_tokens(self) -> None:
        """Called by the base class's constructor, between reading the files and asking what surrounds a text."""
        if self.tokenizer.truncation or self.tokenizer.padding:
            _warn_once(
                f"The tokenizer in {self.tokenizer_path!r} was saved with truncation {self.tokenizer.truncation} and "
                f"padding {self.tokenizer.padding}: both are switched off, documents keep their length"
            )
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
        self.config = {**_read_json(self.tokenizer_path, "special_tokens_map.json"), **(self.config or {})}
        # The base class makes special tokens of all that are listed. Those that are not have to be left out: they are
        # parsed in texts, and tokenizer.json holds them.
        listed = self.config.get("added_tokens_decoder", {})
        self.config["added_tokens_decoder"] = {
            number: token for number, token in listed.items() if isinstance(token, dict) and token.get("special", True)
        }
        super()._infer_special_tokens()
        if self.eos_id is None and (token := self._get_token_from_config(self.config, "eos_token")) is not None:
            self.eos_token, self.eos_id = token, self.tokenizer.token_to_id(token)  # the BOS token ends texts too
        if self.eos_id is None:
            self._find_eos()

    def _find_eos(self) -> None:
        """Take the token that ends a text from where no one said it is, and warn."""
        missing = (
            f"The tokenizer in {self.tokenizer_path!r} names no EOS token: there is no eos_token in "
            "tokenizer_config.json or special_tokens_map.json"
        )
        special = {t.content: number for number, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        found = [name for name in EOS_NAMES if name in special]
        for file in ("generation_config.json", "config.json"):
            number = _read_json(self.tokenizer_path, file).get("eos_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(number, int) and (token := self.tokenizer.id_to_token(number)) is not None:
                found = [token]
                break
        if found:
            self.eos_token, self.eos_id = found[0], self.tokenizer.token_to_id(found[0])
            _warn_once(f"{missing}. Documents end with {self.eos_token!r}, id {self.eos_id}")
        else:
            _warn_once(f"{missing}, nor a special token of a usual name. DOCUMENTS FOLLOW EACH OTHER WITHOUT AN END")

    def _added_around_text(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer itself puts before a text, and behind it."""
        encoding = self.tokenizer.encode("a")
        marks = encoding.special_tokens_mask
        before = len(list(itertools.takewhile(bool, marks)))
        after = len(list(itertools.takewhile(bool, reversed(marks[before:]))))
        return encoding.ids[:before], encoding.ids[len(marks) - after :]


def _read_json(folder: str, name: str) -> dict[str, Any]:
    path = Path(folder, name)
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


@functools.cache
def _warn_once(message: str) -> None:
    """A job builds its tokenizer twice: to check it, and to train with it."""
    logger.warning(message)


def resolve_assets_path(path: str, field: str = "model.hf_assets_path") -> str:
    """The folder that a field names. A path "momoe_titan/..." also means the installed package.

    Raises:
        DataError: There is no such folder.
    """
    if os.path.isdir(path):
        return path
    packaged = Path(__file__).parents[2] / path
    if path.startswith("momoe_titan/") and packaged.is_dir():
        return str(packaged)
    given = "is not set" if path == JobConfig().model.hf_assets_path else f"{path!r} is not a folder"
    raise DataError(
        f"{field} {given}; it must hold the tokenizer "
        "(tokenizer.json). The one that comes with this package is "
        "'momoe_titan/assets/tokenizer'"
    )


def build_tokenizer(job_config: JobConfig) -> TextTokenizer:
    """The tokenizer in `model.hf_assets_path`.

    Raises:
        DataError: The folder or its tokenizer is missing or damaged.
    """
    return load_tokenizer(job_config.model.hf_assets_path, "model.hf_assets_path")


def load_tokenizer(path: str, field: str) -> TextTokenizer:
    """The tokenizer in a folder; a path "momoe_titan/..." also means the installed package.

    Args:
        field: the field or option that names the folder, for messages.

    Raises:
        DataError: The folder or its tokenizer is missing or damaged.
    """
    path = resolve_assets_path(path, field)
    try:
        return TextTokenizer(path)
    except Exception as e:  # tokenizers raises plain Exception for a damaged file
        raise DataError(f"{field} {path!r}: no usable tokenizer: {e}") from e
