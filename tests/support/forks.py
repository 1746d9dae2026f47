"""Several ranks from one import of torch, which takes as long as many a test."""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from momoe_titan.train import one_gloo_thread


def in_forks(world: int, work: Callable[[int], None]) -> bool:
    """work(rank) in as many forks of this process at once; whether all of them ended well.

    Those that did not are named on stderr: one that a signal ended says nothing itself.
    """
    children = []
    for rank in range(world):
        if not (pid := os.fork()):
            try:
                gc.freeze()  # nothing of the parent's is looked through
                torch.set_num_threads(1)  # a fork waits for ever for the threads of a pool that this process has used
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


def in_gloo_forks(world: int, store: Path | str, work: Callable[[], None]) -> bool:
    """work() in as many forks at once, the ranks of a gloo group; whether all of them ended well.

    The group meets in the file `store`. A fork ends at once, not as the interpreter does: where a
    thread of gloo is about to free the tensor of a last collective, and destroy_process_group leaves
    such threads if a device mesh outlives it, Python before 3.14 ends that thread as it asks for the
    GIL, which in C++ is std::terminate.
    """

    def rank_of_group(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
        with one_gloo_thread():
            dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
            work()
        dist.destroy_process_group()

    return in_forks(world, rank_of_group)
