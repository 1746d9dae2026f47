"""Cuts long texts into documents."""

from collections.abc import Iterator


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Documents of at most `max_chars` characters. Each ends at the end of a line, unless one line is longer."""
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
