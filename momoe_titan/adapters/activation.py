"""Recognises an activation by what it does: models define theirs in code, under many names."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from momoe_titan.kernels.activations import ACTIVATIONS, activate, is_gated

LARGEST = 24.0  # of the probed values: beyond the limits at which some activations clamp
TOLERANCE = 1e-6  # of the size of a product: float32's rounding, in formulas which differ in their order


class UnknownActivationError(ValueError):
    """The kernels have no such activation. The message says which they have."""


class Form(NamedTuple):
    """How an expert goes from its first product to its second; both are arguments of `momoe_mlp`."""

    activation: str
    order: str


def activation_of(function: Callable[[Tensor], Tensor], has_gate: bool = True) -> Form:
    """The activation that `function` is.

    Args:
        function: (rows, 2F) -> (rows, F) with a gate, in either order and concatenated or interleaved; without one
            (rows, F) -> (rows, F). It is called on float32 values on the CPU.

    Raises:
        UnknownActivationError: it is none of the kernels'.
    """
    known = [name for name in ACTIVATIONS if is_gated(name) == has_gate]
    up, gate = _probes()
    largest = 1 + up.abs() * torch.maximum(up.abs(), gate.abs())
    orders = _orders(up, gate) if has_gate else {"up_gate": up}
    for order, z in orders.items():
        try:
            with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
                found = function(z)
        except RuntimeError as e:  # of an activation with parameters of its own, on another device
            raise UnknownActivationError(f"it cannot be probed ({e})") from e
        for name in known:
            if _equal(found, activate(name, up, gate if has_gate else None), largest):
                return Form(name, order)
    raise UnknownActivationError(f"it is none of {', '.join(known)}")


def _probes() -> tuple[Tensor, Tensor]:
    """Every pair of values of up and gate, as two (1, F): an odd number of them, spread out and not symmetric."""
    values = torch.linspace(-LARGEST, LARGEST * 0.97, 121)
    grid = torch.cartesian_prod(values, values)
    return grid[None, :, 0].contiguous(), grid[None, :, 1].contiguous()


def _orders(up: Tensor, gate: Tensor) -> dict[str, Tensor]:
    return {
        "gate_up": torch.cat([gate, up], dim=1),
        "interleaved_gate_up": torch.stack([gate, up], dim=2).flatten(1),
        "up_gate": torch.cat([up, gate], dim=1),
        "interleaved_up_gate": torch.stack([up, gate], dim=2).flatten(1),
    }


def _equal(found: Tensor, wanted: Tensor, largest: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return bool(((found.float() - wanted).abs() <= TOLERANCE * largest).all())
