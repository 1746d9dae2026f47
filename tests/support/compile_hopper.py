"""Compiles every kernel of the Hopper family for sm_90, without a GPU: ``python compile_hopper.py``.

With the argument "others", those of other experts than SwiGLU in the layout of this package.

Prints one JSON object per kernel: what tests/support/compiled.py says, and its case. Code that names `w_rows` once
does not read it. Run in a process without TRITON_INTERPRET.
"""

import functools
import sys

import torch
from compiled import print_numbers

from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.hopper import launch as hopper
from momoe_titan.kernels.routing import packed_size, unpack_routing

SHAPES = {  # (T, D, F, E, K)
    "even": (4096, 2048, 1024, 64, 8),
    "tails": (300, 320, 448, 5, 3),
    "wide": (4096, 4096, 2048, 64, 4),  # every row kernel takes few column tiles at a time
}


def cases(tokens, d_model, ffn, experts, chosen, dtype):
    """(name, call) for every launcher and configuration."""

    def new(*size, dtype=dtype):
        return torch.empty(size, dtype=dtype, device="meta")

    rows = tokens * chosen
    packed = new(packed_size(tokens, chosen, experts, 128), dtype=torch.int32)
    routing = unpack_routing(packed, tokens, chosen, experts, 128)
    x, w1, w2 = new(tokens, d_model), new(experts, d_model, 2 * ffn), new(experts, ffn, d_model)
    experts = Experts(w1, w2)
    z, act, y = new(rows, 2 * ffn), new(rows, ffn), new(rows, d_model)
    split = hopper.SplitRows.beside(z[:7], rows)
    dscore = new(rows, hopper.dscore_parts(ffn), dtype=torch.float32)
    yield "up, some rows saved", lambda: hopper.up_proj(x, experts, routing, z, 7, act)
    yield "up, none saved", lambda: hopper.up_proj(x, experts, routing, None, 0, act)
    yield "z again", lambda: hopper.recompute_z(x, experts, routing, split)
    yield "down", lambda: hopper.down_proj(act, w2, routing, y)
    yield "down, columns", lambda: hopper.down_proj(act, w2, routing, y[:, :64].contiguous(), 64)
    yield "down backward", lambda: hopper.down_proj_backward(x, experts, routing, split, split, act, dscore)
    yield "dx", lambda: hopper.up_proj_backward(z, experts, routing, y)
    yield "dx, two buffers", lambda: hopper.up_proj_backward(split, experts, routing, y)
    yield "dw1", lambda: hopper.weight_grad(x, z, routing, w1)
    yield "dw1, two buffers", lambda: hopper.weight_grad(x, split, routing, w1)
    yield "dw2", lambda: hopper.weight_grad(x, act, routing, w2.transpose(1, 2))


def other_cases(tokens, d_model, ffn, experts, chosen):
    """(name, call) for the epilogues that differ: layouts, activations, biases, scores on the input."""

    def new(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, device="meta")

    rows = tokens * chosen
    packed = new(packed_size(tokens, chosen, experts, 128), dtype=torch.int32)
    routing, x, act = unpack_routing(packed, tokens, chosen, experts, 128), new(tokens, d_model), new(rows, ffn)
    w1, w2, b1 = new(experts, d_model, 2 * ffn), new(experts, ffn, d_model), new(experts, 2 * ffn)
    w1_T, w2_T = new(experts, 2 * ffn, d_model).mT, new(experts, d_model, ffn).mT
    pairs = dict(order="interleaved_gate_up")
    kinds = {
        "out_in": Experts(w1_T, w2_T, order="gate_up"),
        "two tensors": Experts(w1[:, :, :ffn], w2, w1[:, :, ffn:]),
        "gpt-oss": Experts(w1, w2, None, b1, activation="clamped_swiglu", **pairs),
        "geglu": Experts(w1, w2, activation="geglu"),
        "geglu_tanh, interleaved": Experts(w1, w2, activation="geglu_tanh", **pairs),
        "relu2": Experts(w1[:, :, :ffn], w2, None, b1[:, :ffn], activation="relu2"),
        "scores on input": Experts(w1, w2, scores_on_input=True),
        "scores on input, interleaved": Experts(w1, w2, scores_on_input=True, **pairs),
    }
    dscore = new(rows, hopper.dscore_parts(ffn), dtype=torch.float32)
    for name, kind in kinds.items():
        z = new(rows, kind.width)
        split = hopper.SplitRows.beside(z[:7], rows)
        yield name, functools.partial(hopper.up_proj, x, kind, routing, z, 7, act)
        yield name, functools.partial(hopper.down_proj_backward, x, kind, routing, split, split, act, dscore)
    kind = kinds["two tensors"]
    yield (
        "two tensors",
        functools.partial(hopper.up_proj_backward, new(rows, 2 * ffn), kind, routing, new(rows, d_model)),
    )


def main():
    hopper.num_programs = lambda device: 132
    launched = {}
    print_numbers(90, lambda: launched)
    if sys.argv[1:] == ["others"]:
        for case, call in other_cases(*SHAPES["even"]):
            launched.update(case=case)
            call()
        return
    for shape, sizes in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float16):
            for case, call in cases(*sizes, dtype):
                launched.update(case=case, shape=shape, dtype=str(dtype))
                call()


if __name__ == "__main__":
    main()
