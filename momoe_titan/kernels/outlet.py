"""Rows of several GPUs: those of the others arrive, and leave, while the kernels work on this GPU's own.

An op is told the name of an outlet. The rows that it gets may still be under way: it begins with those of this GPU's
own tokens, and waits for the rest. It writes the results for other GPUs where the outlet wants them, has them sent, and
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
    """What an op takes in, and results that leave together. All of these are staged, then `start` is called once."""

    def own_tokens(self, num_tokens: int) -> tuple[int, int]:
        """(first, last) of this GPU's own among the tokens of all; last is the first that is none."""
        ...

    def wait_for_own(self, rows_MC: Tensor) -> None:
        """Have the current stream wait until rows of this GPU's own tokens are there. The others may come later."""
        ...

    def wait(self, rows_MC: Tensor) -> None:
        """The same for all rows."""
        ...

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
