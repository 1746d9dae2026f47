"""Words of a page that hold a digit.

python tests/docs/words.py README.md docs/*.md    # the share of each page, in percent
"""

import re
import sys
from pathlib import Path


def prose(page: str) -> str:
    """A page without code blocks, tables, headings' marks, links' targets and comments."""
    page = re.sub(r"^(```|~~~).*?^\1\s*$", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"<!-- table: .*?<!-- /table -->", "", page, flags=re.DOTALL)  # generated
    page = re.sub(r"<!--.*?-->", "", page, flags=re.DOTALL)
    page = re.sub(r"\]\([^)]*\)", "]", page)
    return "\n".join(line for line in page.splitlines() if not line.lstrip().startswith("|"))


def digit_share(page: str) -> float:
    """The share of a page's words that hold a digit, outside of code blocks and tables."""
    words = [word for word in prose(page).split() if re.search(r"\w", word)]
    return sum(1 for word in words if re.search(r"\d", word)) / max(len(words), 1)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{100 * digit_share(Path(name).read_text()):5.1f}  {name}")
