"""Agents of torchrun on one host, each with the processes that it starts, as forks of this process.

Usage: agents.py NUMBER COMMAND..., where COMMAND is what follows `torchrun` on every machine. The agents meet as those
of several machines do; what they start is a fork, because importing torch takes longer than a short job.
"""

import sys

from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from momoe_titan import train
from tests.support.forks import in_forks


def job(module: str, *options: str) -> None:
    """What `python -m` would do in a process that torchrun starts, which waits for a result, not for an exit status."""
    assert module == train.__name__
    sys.argv = [module, *options]
    assert train.main() == 0


def main(number: str, *command: str) -> None:
    config, _, arguments = config_from_args(get_args_parser().parse_args(command))
    config.start_method = "fork"
    options = arguments[arguments.index("-m") + 1 :]

    def agent(_: int) -> None:
        elastic_launch(config, job)(*options)

    sys.exit(not in_forks(int(number), agent))


if __name__ == "__main__":
    main(*sys.argv[1:])
