#!/usr/bin/env python
"""`python -m momoe_titan.export` by its old name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from momoe_titan.inference.export import command  # noqa: E402

if __name__ == "__main__":
    command()
