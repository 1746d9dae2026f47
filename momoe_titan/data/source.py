"""`Source`: documents with numbers, which the loader reads in any order.

What makes a source of files, of a named dataset or of token shards stands in the module of that kind. Between a source
and the model the loader does the same for all: it orders the documents, turns text into tokens, packs and batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np


class Source(ABC):
    """Documents 0 to len(source) - 1, each a text or its token ids. Never changes while it is open.

    Several threads read one source at once, so that `read` keeps nothing in the object that a second call could
    change. A source pickles to what is needed to open it again (a path), not to its content, and opening it again
    takes milliseconds.

    Attributes:
        name: what messages call it, such as "training.dataset_path 'texts/*.jsonl'".
        holds_tokens: True where `read` gives token ids, which end with EOS as `encode_documents` of
            `momoe_titan.data.tokenizer` has them; False where it gives text.
        size: bytes of all its text as UTF-8, or for tokens about as many. Weights of mixed sources are shares of it.
        fingerprint: a short string that changes where documents, their order or their content change, and not where
            files only move or are touched. A checkpoint's position is good for a source of the same fingerprint.
    """

    name: str
    holds_tokens: bool = False
    size: int
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int:
        """How many documents there are."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> list[str] | list[np.ndarray]:
        """Documents by their numbers, in the order asked for.

        Returns:
            Texts, or where `holds_tokens` arrays [tokens] of an integer type, which may be views of mapped memory.

        Raises:
            DataError: a file cannot be read any more. Names it.
        """

    def __getitem__(self, index: int) -> str | np.ndarray:
        """One document."""
        return self.read([index])[0]


class TextList(Source):
    """Texts in memory, such as the standard library's sources."""

    def __init__(self, name: str, texts: Sequence[str], fingerprint: str):
        self.name, self.fingerprint = name, fingerprint
        self.texts = texts
        self.size = sum(len(text.encode()) for text in texts)

    def __len__(self) -> int:
        return len(self.texts)

    def read(self, indices: Sequence[int]) -> list[str]:
        """See `Source.read`."""
        return [self.texts[i] for i in indices]
