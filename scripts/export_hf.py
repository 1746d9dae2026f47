#!/usr/bin/env python
"""`python -m momoe_titan.export` by its old name."""

from momoe_titan.export import command

if __name__ == "__main__":
    command()
