#!/usr/bin/env python
"""`python -m momoe_titan.dashboard` by its old name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from momoe_titan.dashboard.page import main  # noqa: E402

if __name__ == "__main__":
    main()
