#!/usr/bin/env python
"""`python -m momoe_titan.generate` by its old name."""

from momoe_titan.generate import command

if __name__ == "__main__":
    command()
