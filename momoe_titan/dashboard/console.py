"""Formats the line that a log step prints on the console."""

import dataclasses
from collections import deque

from torchtitan.tools.utils import Color, NoColor

SHOWN_WAITING_PCT = 1.0


class TimeLeft:
    """Seconds to the last step, estimated from the last log steps. Validation and checkpoints between them count."""

    def __init__(self, total_steps: int, window: int = 10):
        self.total_steps = total_steps
        self.seen: deque[tuple[int, float]] = deque(maxlen=window + 1)

    def after(self, step: int, now: float) -> float | None:
        """The estimate after this log step; None after the first one, which was slowed by starting up."""
        self.seen.append((step, now))
        first_step, begin = self.seen[0]
        if step == first_step:
            return None
        return (self.total_steps - step) * (now - begin) / (step - first_step)


@dataclasses.dataclass
class Progress:
    """The values of the line that a log step prints.

    Attributes:
        memory_gib: peak memory of the rank that uses most.
        memory_name: what kind of memory that is.
        mfu: percent; NaN where the device's peak FLOPS are not known.
        maxvio: of the layer with the highest; None without MoE layers.
        seconds_left: None while unknown.
        waiting_pct: of the time, in which the device had no work for want of data.
    """

    step: int
    total_steps: int
    loss: float
    grad_norm: float
    tps: float
    memory_gib: float
    memory_pct: float
    memory_name: str
    mfu: float
    maxvio: float | None
    seconds_left: float | None
    waiting_pct: float = 0.0

    def line(self, color: Color | NoColor) -> str:
        """The line, in these colours."""
        parts = [
            f"{color.red}step: {self.step:2}",
            f"{color.green}loss: {self.loss:8.5f}",
            f"{color.orange}grad_norm: {self.grad_norm:7.4f}",
            f"{color.turquoise}{self.memory_name}: {self.memory_gib:5.2f}GiB({self.memory_pct:.1f}%)",
            f"{color.blue}tps: {round(self.tps):,}",
        ]
        if self.mfu == self.mfu:
            parts.append(f"{color.magenta}mfu: {self.mfu:.1f}%")
        if self.maxvio is not None:
            parts.append(f"{color.cyan}maxvio: {self.maxvio:.2f}")
        if self.waiting_pct >= SHOWN_WAITING_PCT:
            parts.append(f"{color.yellow}waiting for data: {self.waiting_pct:.0f}%")
        done = f"{color.reset}done: {self.step}/{self.total_steps} ({self.step / self.total_steps:.0%})"
        parts.append(done)
        if self.seconds_left is not None:
            parts.append(f"left: {duration(self.seconds_left)}")
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """Such as 45s, 3m20s, 5h07m, 2d03h."""
    seconds = max(0, round(seconds))
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // part:02}{smaller}"
    return f"{seconds}s"
