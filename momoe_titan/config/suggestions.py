"""Suggests a known name for a misspelt one ("did you mean"). Imports no TorchTitan."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence on a wrong name: "; did you mean 'x'?", or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
