"""Opt-in tuning of the GEMM tiles for one layer shape on this GPU; the result persists on disk.

    python -m momoe_titan.kernels.tune --tokens 24576 --dim 1536 --ffn 256 --experts 128 --chosen 8

For the portable path: the Hopper kernels have one tile each. Training never tunes: it reads the
cache (see configs.cache_path) or the built-in table.
"""

import argparse
import functools
from collections.abc import Callable

import torch
import triton
from triton.testing import do_bench

from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.gemms import HopperGemms, select_gemms
from momoe_titan.kernels.portable import configs, down_proj, up_proj, weight_grad
from momoe_titan.kernels.portable.configs import TileConfig
from momoe_titan.kernels.portable.rows_gemm import rows_gemm
from momoe_titan.kernels.routing import build_routing, unpack_routing

_TILES = {
    # (block_n, block_k) of the row-tiled kernels, whose block_m is the table's; of the other, block_m first
    "up_proj": [(128, 64), (64, 64), (64, 32)],
    "down_proj": [(256, 64), (128, 64), (128, 32)],
    "down_proj_backward": [(128, 64), (64, 64), (64, 32)],
    "up_proj_backward": [(256, 64), (128, 64), (128, 32)],
    "weight_grad": [(128, 256, 64), (128, 128, 64), (128, 128, 32)],
}
_WARPS_AND_STAGES = ((8, 3), (8, 4), (4, 4))


def candidates(kernel: str, block_m: int) -> list[TileConfig]:
    """Tiles worth timing for one kernel."""
    tiles = _TILES[kernel] if kernel == "weight_grad" else [(block_m, *t) for t in _TILES[kernel]]
    return [TileConfig(m, n, k, warps, stages) for m, n, k in tiles for warps, stages in _WARPS_AND_STAGES]


def times_of(kernel: str, call: Callable[[TileConfig], object], configs: list[TileConfig]) -> dict[TileConfig, float]:
    """The median time of each configuration in ms, without those that do not compile, fit or run."""
    times = {}
    for config in dict.fromkeys(configs):
        try:
            times[config] = do_bench(functools.partial(call, config), warmup=5, rep=30, return_mode="median")
        except (
            triton.runtime.errors.OutOfResources,
            triton.CompilationError,
            torch.OutOfMemoryError,
            RuntimeError,
        ) as error:
            print(f"  {kernel} {config}: skipped ({type(error).__name__})")
    return times


def tune(
    tokens: int, dim: int, ffn: int, experts: int, chosen: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, TileConfig]:
    """Time every candidate of every GEMM on random, nearly balanced routing; returns the fastest of each.

    A candidate that does not compile, fit or run is skipped.
    """

    def new(*size):
        return torch.randn(size, device="cuda", dtype=torch.float32).mul_(size[-1] ** -0.5).to(dtype)

    x, dout, w1, w2 = new(tokens, dim), new(tokens, dim), new(experts, dim, 2 * ffn), new(experts, ffn, dim)
    scores = torch.rand(tokens, chosen, device="cuda")
    ids = torch.rand(tokens, experts, device="cuda").topk(chosen, -1)[1]
    best = dict(configs.tile_configs(x, ffn))
    tile_rows = best["up_proj"].block_m
    routing = unpack_routing(build_routing(ids, scores, experts, tile_rows)[0], tokens, chosen, experts, tile_rows)
    rows = tokens * chosen
    z, act, y = new(rows, 2 * ffn), new(rows, ffn), new(rows, dim)
    dw1, dw2, both = torch.empty_like(w1), torch.empty_like(w2), Experts(w1, w2)

    def both_weight_grads(config):
        weight_grad.weight_grad(config, x, z, routing, dw1, gather_a=True)
        weight_grad.weight_grad(config, act, dout, routing, dw2, gather_b=True)

    calls = {
        "up_proj": lambda c: up_proj.up_proj(c, x, both, routing, act, z),
        "down_proj": lambda c: rows_gemm(c, act, w2, routing, y),
        "down_proj_backward": lambda c: down_proj.down_proj_backward(c, dout, both, routing, z, z, act),
        "up_proj_backward": lambda c: rows_gemm(c, z, w1.transpose(1, 2), routing, y),
        "weight_grad": both_weight_grads,
    }
    for kernel, call in calls.items():
        times = times_of(kernel, call, [best[kernel], *candidates(kernel, tile_rows)])
        if not times:
            continue
        default, best[kernel] = best[kernel], min(times, key=times.__getitem__)
        print(
            f"{kernel}: {best[kernel]} {times[best[kernel]]:.3f} ms, "
            f"built-in {times.get(default, float('nan')):.3f} ms",
            flush=True,
        )
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name in ("tokens", "dim", "ffn", "experts", "chosen"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    w1, w2 = (torch.empty(1, *size, device="meta") for size in [(args.dim, 2 * args.ffn), (args.ffn, args.dim)])
    if isinstance(
        select_gemms(torch.empty(1, args.dim, dtype=torch.bfloat16, device="cuda"), Experts(w1, w2)), HopperGemms
    ):
        print("This GPU runs the Hopper kernels for this shape: what is tuned here serves the portable path only.")
    best = tune(**vars(args))
    name = torch.cuda.get_device_name()
    if configs.save_tuned(name, configs.cache_key(torch.bfloat16, args.dim, args.ffn), best):
        print(f"saved to {configs.cache_path(name)}")


if __name__ == "__main__":
    main()
