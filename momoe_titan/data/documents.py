"""Cuts long texts into documents."""

from collections.abc import Iterable, Iterator


def split_text(text: str, max_chars: int) -> Iterator[str]:
    """Documents of at most `max_chars` characters. Each ends at the end of a line, unless one line is longer."""
    return split_blocks([text], max_chars)


def split_blocks(blocks: Iterable[str], max_chars: int) -> Iterator[str]:
    """As `split_text`, of a text that comes in blocks."""
    text, start = "", 0
    for block in blocks:
        text, start = text[start:] + block, 0
        while len(text) - start > max_chars:
            limit = start + max_chars
            end = text.rfind("\n", start, limit) + 1
            if end <= start:  # one line longer than a document
                end = limit
            yield text[start:end]
            start = end
    if text[start:].strip():
        yield text[start:]
