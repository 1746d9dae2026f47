"""The position in the data that a checkpoint holds for each rank, and how another number of ranks goes on from it."""

import json
from collections.abc import Sequence
from typing import Any

from torchtitan.tools.logging import logger

from momoe_titan.data.pipeline import Place


def warn_restart(reason: str) -> None:
    """Warn that a checkpoint's position in the data has no effect, and why."""
    logger.warning(
        f"The checkpoint's position in the data is not used: {reason}. THE DATA STARTS AGAIN FROM ITS BEGINNING."
    )


def is_position(saved: bytes) -> bool:
    """Whether these bytes are a position, not the pickle of TorchTitan's loader or of version 0.1.0's."""
    return saved.startswith(b"{")


def pack_position(order: dict[str, Any], place: Place) -> bytes:
    """A rank's position as JSON, which runs no code when it is read.

    Args:
        order: `Order.described`.
    """
    return json.dumps({"order": order, "left": place.left, "next": place.next, "step": place.step}).encode()


def unpack_position(saved: bytes) -> tuple[dict[str, Any], Place]:
    """The order and the place that `pack_position` was given."""
    state = json.loads(saved)
    left = [(position, skip) for position, skip in state["left"]]
    return state["order"], Place(left, state["next"], state["step"])


def why_other_data(then: dict[str, Any], now: dict[str, Any], name: str) -> str:
    """Why a position in one order means nothing in another; empty if the position holds.

    Args:
        then, now: `Order.described` of both orders. Their seeds may differ.
        name: what messages call the data.
    """
    if then["documents"] != now["documents"]:
        return f"{name} had {_numbers(then['documents'])} documents, now it has {_numbers(now['documents'])}"
    if then["content"] != now["content"]:
        return f"the text of {name} is another than then"
    if then["shares"] != now["shares"]:
        return "the weights of [[momoe.data]] were others"
    if then.get("mixing", 0) != now["mixing"]:
        return "it was written by a version of this package that mixed sources in another order"
    if then["shuffle"] != now["shuffle"]:
        field = "momoe.data_shuffle"
        return f"it was written with {field} = {str(then['shuffle']).lower()}, now it is {str(now['shuffle']).lower()}"
    return ""


def _numbers(numbers: Sequence[int]) -> str:
    return " + ".join(map(str, numbers))


def divide(places: Sequence[Place], rank: int, ranks: int) -> Place:
    """The place of one rank, where there were other ranks before.

    Every old rank had documents left, and would have gone on with every `step`-th document from its next position. The
    new ranks share all unread documents before the farthest of these next positions, and then go on from that one.

    Args:
        places: of all old ranks.
        rank: of the new ranks.
        ranks: how many new ranks there are.
    """
    farthest = max(place.next for place in places)
    left = [each for place in places for each in place.left]
    left += [(position, 0) for place in places for position in range(place.next, farthest, place.step)]
    return Place(sorted(left)[rank::ranks], farthest + rank, ranks)
