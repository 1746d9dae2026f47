"""Compiles every kernel of the Hopper family for sm_90, without a GPU: ``python compile_hopper.py``.

Prints one JSON object per compiled kernel: name, case, registers, bytes of stack (spills), bytes of
shared memory. Run in a process without TRITON_INTERPRET.
"""

import json

import torch
from compile_ahead import _Forgetful, _NoDevice, resources
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from momoe_titan.kernels import launch as tiling
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


def main():
    driver.set_active(_NoDevice(90))
    hopper.num_programs = lambda device: 132
    run, seen, launched = JITFunction.run, set(), {}

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            row = {"kernel": self.fn.__name__, **launched, "shared": compiled.metadata.shared}
            row |= resources(compiled.asm["cubin"])
            print(json.dumps(row), flush=True)
        return compiled

    JITFunction.run = compile_only
    tiling._compiled = _Forgetful()
    for shape, sizes in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float16):
            for case, call in cases(*sizes, dtype):
                launched.update(case=case, shape=shape, dtype=str(dtype))
                call()


if __name__ == "__main__":
    main()
