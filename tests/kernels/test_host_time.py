"""How much Python a layer runs for its launches: a small layer waits for the host, which no clock here can tell."""

import sys
from collections import Counter
from pathlib import Path

import torch

import momoe_titan
from momoe_titan import momoe_mlp
from momoe_titan.kernels import gpu

ROOT = str(Path(momoe_titan.__file__).parent)
MOST = {"calls": 530, "select_gemms": 2, "unpack_routing": 2, "fill_defaults": 0}  # forward and backward


def calls_of(step) -> Counter:
    """Calls by name, and under "calls" all those of functions and builtins that the package makes or is entered by."""
    found = Counter()

    def count(frame, event, argument):
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(ROOT):
            found["calls"] += 1
        if event == "call":
            found[frame.f_code.co_name] += 1

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def test_calls_of_a_layer_that_keeps_everything():
    T, D, F, E, K = 64, 128, 64, 8, 2
    leaves = [torch.randn(*size, dtype=torch.bfloat16) for size in ((T, D), (E, 2 * F, D), (E, D, F), (T, K))]
    x, w1, w2, scores = [leaf.requires_grad_() for leaf in leaves]
    ids = torch.rand(T, E).topk(K)[1]

    def step():
        out, _ = momoe_mlp(x, w1.transpose(1, 2), w2.transpose(1, 2), ids, scores, 100.0, order="gate_up")
        torch.autograd.grad(out, [x, w1, w2, scores], torch.ones_like(out))

    with gpu.plan_for(gpu.PlannedGpu((9, 0))):
        step()
        found = calls_of(step)
    assert found["launch"] == 10, found["launch"]  # so the kernels of Hopper were asked for
    assert {name: found[name] for name in MOST if found[name] > MOST[name]} == {}
