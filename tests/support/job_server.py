"""Runs jobs of `momoe_titan.train`, each in a process forked from this one, which has imported all.

Reads one JSON object a line from stdin and answers with one line each:
    {"args": [...], "env": {...}, "log": path, FAULT}  ->  process id
    {"wait": process id}                               ->  exit status

FAULT is nothing or one of
    "die": [step, file]     the process is killed, as by kill -9, with half a file of that step's
                            checkpoint on the disk: the first whose name starts with `file`
    "max_file_bytes": n     a file larger than that cannot be written
    "signal": [step, n]     the process gets this signal in the middle of the step
    "read_only": [step, d]  the file system of this folder is read-only from this step on
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable

from momoe_titan import train
from momoe_titan.config.command_line import take_log_level


def die_in_save(step: int, name: str) -> None:
    fsync = os.fsync

    def fsync_or_die(fd: int) -> None:
        folder, file = os.path.split(os.readlink(f"/proc/self/fd/{fd}"))
        if folder.endswith(f"step-{step}") and file.startswith(name):
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = fsync_or_die


def do_in_step(step: int, fault: Callable[[], object]) -> None:
    from torchtitan.train import Trainer

    train_step = Trainer.train_step

    def faulty(trainer, *args) -> None:
        if trainer.step == step:
            fault()
        train_step(trainer, *args)

    Trainer.train_step = faulty


def run_job(job: dict) -> None:
    """Does not return."""
    from torchtitan.config import ConfigManager

    status = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(job["env"])
        if "die" in job:
            die_in_save(*job["die"])
        if "signal" in job:
            step, signum = job["signal"]
            do_in_step(step, lambda: os.kill(os.getpid(), signum))
        if "read_only" in job:
            step, folder = job["read_only"]
            do_in_step(step, lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True))
        if limit := job.get("max_file_bytes"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sleep = time.sleep
        time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # the trainer sleeps at its end
        sys.argv[1:] = job["args"]
        for_titan = list(job["args"])
        take_log_level(for_titan)  # as `train.main` does before TorchTitan is imported
        # bound when TorchTitan was imported
        ConfigManager.parse_args.__defaults__ = (for_titan,)
        status = train.main()
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def main() -> None:
    with train.describe_cpu():
        import torch.utils.tensorboard  # noqa: F401
        import torchtitan.train  # noqa: F401

        import tests.support.tiny_flavor  # noqa: F401
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
        else:
            answer = os.fork() or run_job(job)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
