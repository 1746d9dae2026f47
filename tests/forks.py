"""Several ranks from one import of torch, which takes as long as many a test."""

import os
import sys
import traceback
from collections.abc import Callable


def in_forks(world: int, work: Callable[[int], None]) -> bool:
    """work(rank) in as many forks of this process at once; whether all of them ended well."""
    children = []
    for rank in range(world):
        if not (pid := os.fork()):
            try:
                work(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        children.append(pid)
    # a list: all of them are waited for
    return all([os.waitpid(pid, 0)[1] == 0 for pid in children])
