"""What befalls a job in a test: functions that its process calls before it begins (`before` of commands.start)."""

import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial


def die_in_save(step: int, name: str) -> None:
    """The process is killed, as by kill -9, with half a file of that step's checkpoint on the disk.

    The file is the first whose name starts with `name`.
    """
    fsync = os.fsync

    def fsync_or_die(fd: int) -> None:
        folder, file = os.path.split(os.readlink(f"/proc/self/fd/{fd}"))
        if folder.endswith(f"step-{step}") and file.startswith(name):
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = fsync_or_die


def do_in_step(step: int, fault: Callable[[], object]) -> None:
    from momoe_titan.components.trainer import Trainer

    train_step = Trainer.train_step

    def faulty(trainer, *args) -> None:
        if trainer.step == step:
            fault()
        train_step(trainer, *args)

    Trainer.train_step = faulty


def signal_in_step(step: int, signum: int) -> None:
    """The process gets this signal in the middle of the step."""
    do_in_step(step, lambda: os.kill(os.getpid(), signum))


def make_read_only(step: int, folder: str) -> None:
    """The file system of this folder is read-only from this step on."""
    do_in_step(step, partial(subprocess.run, ["mount", "-o", "remount,ro", folder], check=True))


def limit_files(num_bytes: int) -> None:
    """A file larger than that cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def wait_no_longer() -> None:
    """The trainer sleeps at its end, which no test needs."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))
