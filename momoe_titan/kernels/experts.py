"""What experts are made of: their weights as the caller keeps them, biases, activation, and where scores go."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from momoe_titan.kernels.activations import ACTIVATIONS, is_gated

ORDERS = ("up_gate", "gate_up", "interleaved_up_gate", "interleaved_gate_up")


class Columns(NamedTuple):
    """Where the columns of up and gate are in w1, and in z, which has the same order."""

    up: int  # first column of up
    gate: int  # first column of gate; that of up without one
    step: int  # from one column of up to the next


@dataclass(frozen=True)
class Experts:
    """The experts of one layer. All tensors are logical views: their strides say how they are stored.

    Z, the width of z, is 2F, or F for an activation without a gate. Two weights in place of one w1 make a z whose first
    half is up.
    """

    w1: Tensor  # (E, D, Z); with a gate of its own (E, D, F), up
    w2: Tensor  # (E, F, D)
    gate: Tensor | None = None  # (E, D, F)
    bias1: Tensor | None = None  # (E, Z), in the order of z
    bias2: Tensor | None = None  # (E, D)
    activation: str = "swiglu"
    order: str = "up_gate"
    scores_on_input: bool = False  # z = score * (x @ w1) + bias1, and the output is not weighted

    @property
    def weights(self) -> list[Tensor]:
        """Two or three."""
        return [t for t in (self.w1, self.w2, self.gate) if t is not None]

    @property
    def weights_of_z(self) -> list[Tensor]:
        """One or two."""
        return [self.w1] if self.gate is None else [self.w1, self.gate]

    @property
    def tensors(self) -> list[Tensor]:
        """Weights and biases."""
        return [*self.weights, *(t for t in (self.bias1, self.bias2) if t is not None)]

    @property
    def ffn(self) -> int:
        """F."""
        return self.w2.shape[1]

    @property
    def width(self) -> int:
        """Z."""
        return self.ffn * (2 if is_gated(self.activation) else 1)

    @property
    def columns(self) -> Columns:
        """Of z."""
        if not is_gated(self.activation):
            return Columns(0, 0, 1)
        return columns_of(self.order, self.ffn)

    @property
    def up_and_gate(self) -> tuple[Tensor, Tensor]:
        """Views (E, D, F) of the weights of up and gate; up twice without a gate."""
        if self.gate is not None:
            return self.w1, self.gate
        if not is_gated(self.activation):
            return self.w1, self.w1
        return self.split(self.w1)

    @property
    def is_swiglu(self) -> bool:
        """Whether there is nothing but a SwiGLU with scores on the output, in whatever layout."""
        plain = self.activation == "swiglu" and not self.scores_on_input
        return plain and self.bias1 is None and self.bias2 is None

    def split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Views of up and gate in the last dimension of something with the columns of z; gated activations only."""
        up, gate, step = self.columns
        if step == 2:
            return z[..., up::2], z[..., gate::2]
        return z[..., up : up + self.ffn], z[..., gate : gate + self.ffn]


def columns_of(order: str, ffn: int) -> Columns:
    """The columns of z, which is gated, in one of ORDERS."""
    if order == "up_gate":
        return Columns(0, ffn, 1)
    if order == "gate_up":
        return Columns(ffn, 0, 1)
    return Columns(0, 1, 2) if order == "interleaved_up_gate" else Columns(1, 0, 2)


def validate_experts(experts: Experts) -> None:
    """Refuse weights and biases that do not go together.

    Raises:
        ValueError: an unknown activation or order; shapes or dtypes that do not fit.
    """
    w1, w2, gate = experts.w1, experts.w2, experts.gate
    if experts.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {experts.activation!r}")
    if experts.order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {experts.order!r}")
    if gate is not None and experts.order != "up_gate":
        raise ValueError(f"order is that of one w1; where w1 is (up, gate) leave it out, got {experts.order!r}")
    if gate is not None and not is_gated(experts.activation):
        raise ValueError(f"w1 must be one tensor: activation {experts.activation!r} has no gate")
    num_experts, ffn, d_model = w2.shape
    parts = 1 if gate is not None or not is_gated(experts.activation) else 2
    shape, columns = (num_experts, d_model, parts * ffn), "2F" if parts == 2 else "F"
    for name, t in (("w1", w1), ("gate", gate)):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be (E, D, {columns}) = {shape} to go with w2, got {tuple(t.shape)}")
    if gate is not None and gate.stride() != w1.stride():
        raise ValueError(f"up and gate must be stored alike, got strides {w1.stride()} and {gate.stride()}")
    for name, t, width in (("bias1", experts.bias1, experts.width), ("bias2", experts.bias2, d_model)):
        if t is not None and t.shape != (num_experts, width):
            raise ValueError(f"{name} must be (E, {width}) = {(num_experts, width)}, got {tuple(t.shape)}")
    for name, t in (("w1", w1), ("w2", w2), ("gate", gate)):
        if t is None or min(t.stride()) > 0:
            continue
        if t.numel() and any(n > 1 and s < 1 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(f"{name} must not be an expanded view, got strides {t.stride()}")
