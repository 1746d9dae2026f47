"""Compiles every portable kernel of the op for one architecture, without a GPU: ``python compile_ahead.py sm90``.

Prints one JSON object per kernel: what tests/support/compiled.py says, shape and dtype. Run in a process without
TRITON_INTERPRET.
"""

import functools
import sys

import torch
from compiled import print_numbers

from momoe_titan.kernels import adamw, balance, cross_entropy, decode, gpu, multi_tensor, quantile, router
from momoe_titan.kernels import op as autograd
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.hopper import launch as hopper

CAPABILITY = {"sm80": 80, "sm90": 90, "sm100": 100}
SHAPES = {  # (T, D, F, E, K)
    "even": (4096, 2048, 1024, 64, 8),
    "odd": (45, 600, 97, 7, 2),
}


def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


class _Addresses:
    """A table of addresses that holds none."""

    def on(self, device: torch.device, values: list[int]) -> torch.Tensor:
        return empty(len(values), dtype=torch.int64)


def balance_step(layers: int, experts: int, chosen: int, d_model: int) -> None:
    step, each = balance.BalanceStep(), range(layers)
    step._totals = step._biases = step._gates = _Addresses()
    counts = [empty(experts, dtype=torch.int64) for _ in each]
    margins = [empty(experts, quantile.NUM_BINS, dtype=torch.int32) for _ in each]
    _, (_, histogram, sums) = step.collect([counts, margins, [empty(d_model + 1, dtype=torch.float32) for _ in each]])
    biases, found_inf = [empty(experts, dtype=torch.float32) for _ in each], empty(1, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        weights = [empty(experts, d_model, dtype=dtype) for _ in each]
        for gate_biases in ([], [empty(experts, dtype=dtype) for _ in each]):
            logits = step.mean_logits(weights, gate_biases, sums)
    for skips in (None, found_inf):
        step.solve(biases, histogram, chosen, 0.5, skips)
        for func in ("sigmoid", "softmax"):
            step.follow(biases, logits, logits, func, skips)


def main(arch: str, shapes: list[str]) -> None:
    gpu.device_properties = lambda device: (divmod(CAPABILITY[arch], 10), arch)
    hopper.supported = lambda *args: False  # compile_hopper.py has that family
    gpu.num_processors = lambda device: 132
    balance.runs_here = lambda t: True
    print_numbers(CAPABILITY[arch], lambda: {"shape": shape, "dtype": str(dtype)})
    for shape in shapes:
        tokens, d_model, ffn, experts, chosen = SHAPES[shape]
        for dtype in (torch.bfloat16, torch.float32) if shape == "odd" else (torch.bfloat16,):
            new = functools.partial(empty, dtype=dtype)
            x, w1, w2 = new(tokens, d_model), new(experts, d_model, 2 * ffn), new(experts, ffn, d_model)
            ids, scores = new(tokens, chosen, dtype=torch.int64), new(tokens, chosen, dtype=torch.float32)
            _, _, z, routing = autograd._forward(x, w1, w2, ids, scores, tokens * chosen, 50.0, False, "triton")
            for func in ("sigmoid", "softmax_of_chosen") if dtype == torch.bfloat16 else ():
                logits, bias = new(tokens, experts, dtype=torch.float32), new(experts, dtype=torch.float32)
                _, ids64 = router._route(logits, bias, chosen, func, True, 1.0)
                router._route_backward(scores, logits, ids64, func, True, 1.0)
                router._bfloat16_parts(logits, False)
                histogram = new(experts, quantile.NUM_BINS, dtype=torch.int32)
                quantile._count_margins(logits, bias, ids64, histogram, "sigmoid" if func == "sigmoid" else "softmax")
            logits, stats = new(tokens, 100 * experts), new(2, tokens, dtype=torch.float32)
            uses = [(True, True), (True, False), (False, True)] if shape == "odd" and dtype == torch.bfloat16 else []
            for finds, writes in uses or [(True, True)]:
                cross_entropy._run_kernel(logits, ids[:, 0], stats, None, finds, writes)
            quantile._add_tokens(x, new(d_model + 1, dtype=torch.float32))
            balance_step(2, experts, chosen, d_model)
            step = functools.partial(new, dtype=torch.float32)
            weight, copy = step(d_model), new(d_model) if dtype == torch.bfloat16 else None
            of_weight = adamw.Updated(weight, new(d_model), step(d_model), step(d_model), step(), copy)
            adamw.Adamw().step([of_weight], adamw.Rates(1e-3, (0.9, 0.95), 1e-8, 0.1), step(), step())
            multi_tensor.SquareSum()([new(d_model)])
            if dtype == torch.bfloat16:
                for few in (1, 2):  # one token has kernels of its own on sm_90
                    decode.forward(x[:few], Experts(w1, w2), ids[:few], scores[:few])
            autograd._backward(
                new(tokens, d_model), x, w1, w2, scores, z, routing, tokens * chosen, 50.0, [True] * 4, "triton"
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(SHAPES))
