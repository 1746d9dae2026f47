"""Stops a run on Ctrl-C or SIGTERM between two steps, all ranks after the same step."""

import os
import signal
import time
from types import FrameType
from typing import Any

import torch

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

    Before training a signal raises `StoppedError`. While `in_training` it is noted, and the current step is finished.
    With several processes the noted signal is reduced together with the flag of `NonFiniteGuard` in every step, so that
    a signal to any rank stops all of them after the same step. On a GPU the result is read one step later, so the host
    never waits for the running step. A second Ctrl-C raises `StoppedError`.

    Attributes:
        in_training: whether steps are being trained.
        noted: the signal that this process has received, or 0.
        agreed: the signal that stops the run after the current step, or 0; the same on all ranks.
    """

    def __init__(self):
        self.in_training = False
        self.noted = 0
        self.agreed = 0
        self._noted_at = 0.0
        self._process = os.getpid()
        self._before: dict[int, Any] = {}
        self._in_flight: tuple[torch.Tensor, torch.cuda.Event] | None = None

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
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            self.agreed = self.noted

    def reduce_with(self, flag: torch.Tensor) -> torch.Tensor:
        """The maximum of a flag over all ranks, by a collective that also carries the signals they have got.

        Args:
            flag: a number, on the device of the collective.
        """
        both = torch.stack([flag, torch.full_like(flag, float(self.noted))])
        torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX)
        self._hear(both[1])
        return both[0]

    def _hear(self, signum: torch.Tensor) -> None:
        if signum.device.type == "cpu":
            self.agreed = int(signum)
            return
        if self._in_flight is not None:
            before, copied = self._in_flight
            copied.synchronize()
            self.agreed = int(before)
        on_host = torch.empty((), dtype=signum.dtype, pin_memory=True)
        on_host.copy_(signum, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._in_flight = on_host, copied
