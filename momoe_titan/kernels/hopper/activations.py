"""The activations of momoe_titan/kernels/activations.py for the epilogues: same formulas, in Gluon.

FAST stands for bfloat16, where an approximate tanh is exact enough.
"""

# Gluon's compiler reads this code; its types are not those of Python that runs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_ALPHA = gl.constexpr(1.702)
_LIMIT = gl.constexpr(7.0)
_SQRT_HALF = gl.constexpr(math.sqrt(0.5))
_NORMAL = gl.constexpr(1 / math.sqrt(2 * math.pi))
_TWO_SCALES = gl.constexpr(2 * math.sqrt(2 / math.pi))
_TANH_CUBE = gl.constexpr(0.044715)
_THREE_CUBES = gl.constexpr(3 * 0.044715)


@gluon.jit
def sigmoid_of(g, FAST: gl.constexpr):
    """FAST: one special-function instruction with a relative error of 2^-11 in the tanh, well inside bfloat16."""
    if FAST:
        h = 0.5 * g
        s = 0.5 + 0.5 * gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [h], gl.float32, True, 1)
    else:
        s = 1.0 / (1.0 + gl.exp(-g))
    return s


@gluon.jit
def _normal_cdf(g):
    """The normal distribution at g, for gelu; Abramowitz and Stegun 7.1.26, error below 1e-7.

    The library's erf has branches, and more registers than the backward's epilogue has left.
    """
    x = gl.abs(g) * _SQRT_HALF
    t = 1.0 / (1.0 + x * 0.3275911)
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    half = 0.5 * tail * gl.exp(-x * x)
    return gl.where(g < 0, half, 1.0 - half)


@gluon.jit
def activation(up, gate, ACTIVATION: gl.constexpr, FAST: gl.constexpr):
    if ACTIVATION == "swiglu":
        act = up * gate * sigmoid_of(gate, FAST)
    elif ACTIVATION == "geglu":
        act = up * gate * _normal_cdf(gate)
    elif ACTIVATION == "geglu_tanh":
        act = up * gate * sigmoid_of((gate + gate * gate * gate * _TANH_CUBE) * _TWO_SCALES, FAST)
    elif ACTIVATION == "reglu":
        act = up * gl.maximum(gate, 0.0)
    elif ACTIVATION == "clamped_swiglu":
        g = gl.minimum(gate, _LIMIT)
        act = (gl.minimum(gl.maximum(up, -_LIMIT), _LIMIT) + 1.0) * g * sigmoid_of(g * _ALPHA, FAST)
    else:
        gl.static_assert(ACTIVATION == "relu2")
        act = gl.maximum(up, 0.0) * gl.maximum(up, 0.0)
    return act


@gluon.jit
def activation_by_up(up, gate, ACTIVATION: gl.constexpr, FAST: gl.constexpr):
    """act, its derivative by up, and what `gate_slope` needs besides."""
    if ACTIVATION == "swiglu":
        part = sigmoid_of(gate, FAST)
        by_up = gate * part
        act = up * by_up
    elif ACTIVATION == "geglu":
        part = _normal_cdf(gate)
        by_up = gate * part
        act = up * by_up
    elif ACTIVATION == "geglu_tanh":
        part = sigmoid_of((gate + gate * gate * gate * _TANH_CUBE) * _TWO_SCALES, FAST)
        by_up = gate * part
        act = up * by_up
    elif ACTIVATION == "reglu":
        part = gate
        by_up = gl.maximum(gate, 0.0)
        act = up * by_up
    elif ACTIVATION == "clamped_swiglu":
        g = gl.minimum(gate, _LIMIT)
        part = sigmoid_of(g * _ALPHA, FAST)
        act = (gl.minimum(gl.maximum(up, -_LIMIT), _LIMIT) + 1.0) * g * part
        by_up = gl.where(gl.abs(up) <= _LIMIT, g * part, 0.0)
    else:
        gl.static_assert(ACTIVATION == "relu2")
        part = gate
        by_up = 2.0 * gl.maximum(up, 0.0)
        act = 0.5 * up * by_up
    return act, by_up, part


@gluon.jit
def gate_factor(up, ACTIVATION: gl.constexpr):
    """What `gate_slope` has to be multiplied with, for the derivative by gate."""
    if ACTIVATION == "clamped_swiglu":
        factor = gl.minimum(gl.maximum(up, -_LIMIT), _LIMIT) + 1.0
    else:
        factor = up
    return factor


@gluon.jit
def gate_slope(gate, by_up, part, ACTIVATION: gl.constexpr):
    """The derivative of the gate's own function, from what `activation_by_up` gave."""
    if ACTIVATION == "swiglu":
        slope = part + by_up * (1.0 - part)
    elif ACTIVATION == "geglu":
        slope = part + gate * _NORMAL * gl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "geglu_tanh":
        slope = part + by_up * (1.0 - part) * ((gate * gate * _THREE_CUBES + 1.0) * _TWO_SCALES)
    elif ACTIVATION == "reglu":
        slope = gl.where(gate > 0, 1.0, 0.0)
    else:
        gl.static_assert(ACTIVATION == "clamped_swiglu")
        slope = gl.where(gate <= _LIMIT, part + gate * part * (1.0 - part) * _ALPHA, 0.0)
    return slope
