"""Results whose rows are for several GPUs: those of the others leave while the kernels go on.

An op is told the name of an outlet. It writes the rows for other GPUs where the outlet wants them, has them sent, and
goes on with its own. The result is under way then: whoever reads it waits for it.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor


class Blocks(NamedTuple):
    """How the rows of a result are divided.

    Attributes:
        kept: (first, last) of the rows that stay in the result; last is the first that does not.
        sent: (first, last, where they are to be written) of those of other GPUs.
    """

    kept: tuple[int, int]
    sent: list[tuple[int, int, Tensor]]


class Sending(Protocol):
    """Results that leave together. All of them are staged, then `start` is called once."""

    def stage(self, rows_MC: Tensor) -> Blocks:
        """Where the rows of a result are to be written. What comes from others arrives in rows_MC, in their place."""
        ...

    def start(self) -> None:
        """Send: the rows for others are written."""
        ...


OUTLETS: dict[str, Callable[[], Sending]] = {}  # by name; what begins to send


def sending_by(outlet: str = "") -> Sending | None:
    return OUTLETS[outlet]() if outlet else None


def stage_copy(sending: Sending, rows_MC: Tensor) -> None:
    """Stage a result that is there already."""
    for first, last, place in sending.stage(rows_MC).sent:
        place.copy_(rows_MC[first:last])
