"""One page of training runs: `python -m momoe_titan.dashboard --help`."""

from momoe_titan.dashboard.page import main

if __name__ == "__main__":
    main()
