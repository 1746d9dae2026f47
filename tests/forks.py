"""Several ranks from one import of torch, which takes as long as many a test."""

import os
import sys
import traceback
from collections.abc import Callable


def in_forks(world: int, work: Callable[[int], None]) -> bool:
    """work(rank) in as many forks of this process at once; whether all of them ended well.

    Those that did not are named on stderr: one that a signal ended says nothing itself.
    """
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
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if failed := {rank: code for rank, code in enumerate(codes) if code}:
        print(f"of {world} ranks failed, with exit code or -signal: {failed}", file=sys.stderr, flush=True)
    return not failed
