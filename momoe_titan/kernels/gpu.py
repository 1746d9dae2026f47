"""What the device of a tensor is, and whether kernels run on it at all."""

import functools

import torch
import triton

_INTERPRETING = triton.knobs.runtime.interpret  # Triton reads it once too: when a kernel is defined


def interpreting() -> bool:
    """Whether Triton kernels run in its CPU interpreter (TRITON_INTERPRET=1 at import)."""
    return _INTERPRETING


@functools.cache
def _properties(device_index: int) -> tuple[tuple[int, int], str]:
    return torch.cuda.get_device_capability(device_index), torch.cuda.get_device_name(device_index)


def device_properties(device: torch.device) -> tuple[tuple[int, int], str]:
    """(compute capability, name) of a GPU."""
    return _properties(device.index if device.index is not None else torch.cuda.current_device())
