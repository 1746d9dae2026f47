"""The activations between the two products of an expert: in torch, with their derivatives, and for Triton kernels.

Each takes `up` and `gate`, the two halves of z, and is named once in `ACTIVATIONS`; "relu2" has no gate, and gets its
z as `up`. The Hopper kernels have the same formulas in hopper/activations.py.

| name             | value                                                          | models               |
| ---------------- | -------------------------------------------------------------- | -------------------- |
| "swiglu"         | up * silu(gate)                                                | most                 |
| "geglu"          | up * gelu(gate), with erf                                      | GShard's descendants |
| "geglu_tanh"     | up * gelu(gate), its approximation by tanh                     | Grok, Gemma          |
| "reglu"          | up * relu(gate)                                                |                      |
| "clamped_swiglu" | (clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g), g = min(gate, 7)| gpt-oss              |
| "relu2"          | relu(up)^2                                                     | Nemotron             |
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

ALPHA, LIMIT = 1.702, 7.0  # of gpt-oss
_ALPHA, _LIMIT = tl.constexpr(ALPHA), tl.constexpr(LIMIT)
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_NORMAL = tl.constexpr(1 / math.sqrt(2 * math.pi))  # the normal density at zero
# The approximation: gelu(g) = g * sigmoid(2 * sqrt(2 / pi) * (g + 0.044715 g^3)).
_TWO_SCALES = tl.constexpr(2 * math.sqrt(2 / math.pi))
_TANH_CUBE = tl.constexpr(0.044715)
_THREE_CUBES = tl.constexpr(3 * 0.044715)


def _clamped_swiglu(up: Tensor, gate: Tensor) -> Tensor:
    gate = gate.clamp(max=LIMIT)
    return (up.clamp(-LIMIT, LIMIT) + 1) * gate * torch.sigmoid(ALPHA * gate)


_TORCH: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda up, gate: up * F.silu(gate),
    "geglu": lambda up, gate: up * F.gelu(gate),
    "geglu_tanh": lambda up, gate: up * F.gelu(gate, approximate="tanh"),
    "reglu": lambda up, gate: up * F.relu(gate),
    "clamped_swiglu": _clamped_swiglu,
    "relu2": lambda up, _: F.relu(up).square(),
}
ACTIVATIONS = tuple(_TORCH)
UNGATED = ("relu2",)


def is_gated(name: str) -> bool:
    """Whether the activation takes a gate, so that z is twice as wide as what it gives."""
    return name not in UNGATED


def activate(name: str, up: Tensor, gate: Tensor | None) -> Tensor:
    """The activation in torch, in the dtype of its arguments."""
    return _TORCH[name](up, gate)


def activate_backward(name: str, up: Tensor, gate: Tensor | None, dact: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(act, dup, dgate) in torch; dgate is None without a gate."""
    if name == "swiglu" and gate is not None:  # by hand, in the float32 steps of the kernels
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        return up * silu, dact * silu, dact * up * (sigmoid + silu * (1 - sigmoid))
    inputs = [t.detach().requires_grad_() for t in (up, gate) if t is not None]
    with torch.enable_grad():
        act = activate(name, *inputs) if gate is not None else activate(name, inputs[0], None)
    grads = torch.autograd.grad(act, inputs, dact)
    return act.detach(), grads[0], grads[1] if gate is not None else None


@triton.jit
def gated(up, gate, ACTIVATION: tl.constexpr):
    """The activation of float32 blocks; `gate` is not read by one that has none."""
    if ACTIVATION == "swiglu":
        act = up * gate * tl.sigmoid(gate)
    elif ACTIVATION == "geglu":
        act = up * gate * (0.5 + 0.5 * tl.erf(gate * _SQRT_HALF))
    elif ACTIVATION == "geglu_tanh":
        act = up * gate * tl.sigmoid((gate + gate * gate * gate * _TANH_CUBE) * _TWO_SCALES)
    elif ACTIVATION == "reglu":
        act = up * tl.maximum(gate, 0.0)
    elif ACTIVATION == "clamped_swiglu":
        g = tl.minimum(gate, _LIMIT)
        act = (tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1) * g * tl.sigmoid(g * _ALPHA)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        act = tl.maximum(up, 0.0) * tl.maximum(up, 0.0)
    return act


@triton.jit
def gated_by_up(up, gate, ACTIVATION: tl.constexpr):
    """act, its derivative by up, and what `gated_by_gate` needs besides, of float32 blocks."""
    if ACTIVATION == "swiglu":
        part = tl.sigmoid(gate)
        by_up = gate * part
        act = up * by_up
    elif ACTIVATION == "geglu":
        part = 0.5 + 0.5 * tl.erf(gate * _SQRT_HALF)
        by_up = gate * part
        act = up * by_up
    elif ACTIVATION == "geglu_tanh":
        part = tl.sigmoid((gate + gate * gate * gate * _TANH_CUBE) * _TWO_SCALES)
        by_up = gate * part
        act = up * by_up
    elif ACTIVATION == "reglu":
        part = gate
        by_up = tl.maximum(gate, 0.0)
        act = up * by_up
    elif ACTIVATION == "clamped_swiglu":
        g = tl.minimum(gate, _LIMIT)
        part = tl.sigmoid(g * _ALPHA)
        act = (tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1) * g * part
        by_up = tl.where(tl.abs(up) <= _LIMIT, g * part, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        part = gate
        by_up = 2 * tl.maximum(up, 0.0)
        act = 0.5 * up * by_up
    return act, by_up, part


@triton.jit
def gated_by_gate(up, gate, by_up, part, ACTIVATION: tl.constexpr):
    """Two factors of the derivative by gate, from what `gated_by_up` gave. A step of its own keeps registers free."""
    factor = up
    if ACTIVATION == "swiglu":
        slope = part + by_up * (1 - part)
    elif ACTIVATION == "geglu":
        slope = part + gate * _NORMAL * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "geglu_tanh":
        slope = part + by_up * (1 - part) * ((gate * gate * _THREE_CUBES + 1) * _TWO_SCALES)
    elif ACTIVATION == "reglu":
        slope = tl.where(gate > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "clamped_swiglu")
        factor = tl.minimum(tl.maximum(up, -_LIMIT), _LIMIT) + 1
        slope = tl.where(gate <= _LIMIT, part + gate * part * (1 - part) * _ALPHA, 0.0)
    return factor, slope
