"""Tells whether kernels run on a tensor's device, and lets a plan assume a GPU that is not there."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.knobs

_INTERPRETING = triton.knobs.runtime.interpret  # Triton reads it once too: when a kernel is defined


class Load(NamedTuple):
    """Tokens and rows that a rank of expert parallelism receives, as multiples of its even share."""

    tokens: int = 1
    rows: int = 1


@dataclass(frozen=True)
class PlannedGpu:
    """A GPU whose memory is planned on any machine. See `plan_for`.

    Attributes:
        capability: compute capability.
        num_processors: streaming multiprocessors, the programs of a persistent kernel. An H100 has 132.
        load: what the rank receives. Memory schedules stay those of its fair share.
        compiled: whether torch.compile has the layers, which then never write dz over z.
    """

    capability: tuple[int, int]
    num_processors: int = 132
    load: Load = Load()
    compiled: bool = False


_planned: PlannedGpu | None = None  # not a context variable: autograd runs backwards in threads of its own


@contextlib.contextmanager
def plan_for(gpu: PlannedGpu) -> Iterator[None]:
    """Until the end of the block, ops choose kernels and allocate as on this GPU, for tensors on any device.

    Nothing is launched, so that results are undefined: meant for fake tensors.
    """
    global _planned
    before, _planned = _planned, gpu
    try:
        yield
    finally:
        _planned = before


def planned() -> PlannedGpu | None:
    """The GPU of the `plan_for` block that is open, or None."""
    return _planned


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1 at import)."""
    return _INTERPRETING and _planned is None


def has_gpu(device: torch.device) -> bool:
    """Whether tensors on this device are on a GPU, or planned to be."""
    return device.type == "cuda" or _planned is not None


@functools.cache
def _properties(device_index: int) -> tuple[tuple[int, int], str]:
    return torch.cuda.get_device_capability(device_index), torch.cuda.get_device_name(device_index)


def device_properties(device: torch.device) -> tuple[tuple[int, int], str]:
    """(compute capability, name) of a GPU."""
    if _planned is not None:
        return _planned.capability, "planned GPU"
    return _properties(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return _num_processors(device) if _planned is None else _planned.num_processors


def has_capability(major: int, minor: int) -> bool:
    """Whether the current GPU, there or planned, has at least this compute capability; False without a GPU."""
    if _planned is not None:
        return _planned.capability >= (major, minor)
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (major, minor)
