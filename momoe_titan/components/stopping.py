"""Stops a run on Ctrl-C or SIGTERM between two steps, all ranks after the same step."""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A SIGINT within this time of the first is torchrun's copy of the same Ctrl-C, not a second one.
AGAIN_SECONDS = 2.0


class StoppedError(BaseException):
    """Raised to end the run at once, at any point.

    Attributes:
        signum: the signal that caused it.
    """

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopRequest:
    """Handles the signals of a process while open, and knows when all ranks have agreed to stop.

    Before training a signal raises `StoppedError`. While `in_training` it is noted, and the current step is finished,
    with all its microbatches. Between two steps the ranks agree: a signal to any of them stops all after the same step.
    They do so on the CPU, by one small collective of gloo, so that no host waits for a GPU and any model will do. A
    second Ctrl-C raises `StoppedError`.

    Attributes:
        in_training: whether steps are being trained.
        noted: the signal that this process has received, or 0.
    """

    def __init__(self):
        self.in_training = False
        self.noted = 0
        self._noted_at = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._group: Any = None  # a group of gloo; torch types its result as a number too

    def __enter__(self) -> "StopRequest":
        for signum in SIGNALS:
            self._before[signum] = signal.signal(signum, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, before)

    def _take(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A process forked from this one, such as those that load data. Ctrl-C reaches it too.
            if signum != signal.SIGINT:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        again = self.noted and signum == signal.SIGINT and time.monotonic() - self._noted_at > AGAIN_SECONDS
        if not self.in_training or again:
            raise StoppedError(signum)
        if not self.noted:
            self._noted_at = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                name = signal.Signals(signum).name
                os.write(2, f"{name}: stopping after this step. Ctrl-C ends the run at once\n".encode())
        self.noted = max(self.noted, signum)

    def agree(self) -> int:
        """The highest signal that any rank has noted, or 0; all ranks call it between the same two steps."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.noted
        if self._group is None:
            self._group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        heard = torch.tensor(self.noted, device="cpu")
        dist.all_reduce(heard, op=dist.ReduceOp.MAX, group=self._group)
        return int(heard)
