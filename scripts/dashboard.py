#!/usr/bin/env python
"""`python -m momoe_titan.dashboard` by its old name."""

from momoe_titan.dashboard.page import main

if __name__ == "__main__":
    main()
