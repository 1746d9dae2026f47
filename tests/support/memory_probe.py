"""For experimental.custom_import: the flavor "tiny", and a line about memory after each 25 steps.

The line goes to the file that MOMOE_TITAN_MEMORY names: the step; bytes that the process has asked for and not given
back; bytes of its private pages; open files. With PYTHONMALLOC=malloc Python's own memory is among the first.
"""

import ctypes
import os
import re
from pathlib import Path

import tests.support.tiny_flavor  # noqa: F401
from momoe_titan.components.trainer import Trainer

EACH, FIRST = 25, 12  # no step of these has a checkpoint or a validation, whose memory is still in use behind it


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of the C library."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks")
    ] + [("keepcost", ctypes.c_size_t)]


mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo2.restype = MallInfo


def record(step: int) -> None:
    info = mallinfo2()
    private = re.findall(r"Private_\w+: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    numbers = step, info.uordblks + info.hblkhd, 1024 * sum(map(int, private)), len(os.listdir("/proc/self/fd"))
    with open(os.environ["MOMOE_TITAN_MEMORY"], "a") as file:
        file.write(",".join(map(str, numbers)) + "\n")


goes_on = Trainer.should_continue_training


def should_continue_training(self: Trainer) -> bool:
    if self.step % EACH == FIRST:
        record(self.step)
    return goes_on(self)


Trainer.should_continue_training = should_continue_training
