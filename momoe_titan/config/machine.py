"""Describes the machine that a job is checked for: this one, or one that a plan assumes."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """Facts about the machine that the checks of a job need.

    Attributes:
        world_size: processes of the job; None if unknown; torchrun sets it.
        has_gpu: whether each has a CUDA GPU.
    """

    world_size: int | None
    has_gpu: bool


_planned: Machine | None = None


def machine() -> Machine:
    """The machine of the `checking_for` block that is open, or this one."""
    if _planned is not None:
        return _planned
    world_size = os.environ.get("WORLD_SIZE")  # of torchrun
    return Machine(None if world_size is None else int(world_size), torch.cuda.is_available())


@contextlib.contextmanager
def checking_for(planned: Machine) -> Iterator[None]:
    """Until the end of the block, jobs are checked for this machine."""
    global _planned
    before, _planned = _planned, planned
    try:
        yield
    finally:
        _planned = before
