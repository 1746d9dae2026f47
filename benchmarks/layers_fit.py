"""The time of a large model's step from small ones with its layers: a line through the times of 2, 4 and 6 layers.

    python benchmarks/layers_fit.py --out fit.json --layers 2,4,6 --of 48 --ranks 16 --microbatches 32 \
        -- --job.config_file train_configs/30b.toml --training.local_batch_size 2 --training.global_batch_size 2

For models that need more memory than one GPU has. What follows `--` are the options of the job, whose microbatch is
that of the large one. Forward and backward take `at 0 layers` (embedding, output layer and loss) and `per layer`; so
does what follows a backward (norm, optimizer). The large model's step is the sum of both, with the optimizer's part
divided by the ranks that share it and by the microbatches of a step. Communication is left out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from benchmarks.in_turns import add_arguments, measured  # noqa: E402 - from the folder above


def line(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The least-squares line through points: its value at 0, its slope, and the largest distance of a point from it."""
    n = len(points)
    mean_x, mean_y = (sum(p[i] for p in points) / n for i in (0, 1))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    at_0 = mean_y - slope * mean_x
    return at_0, slope, max(abs(y - at_0 - slope * x) for x, y in points)


def fit(rows: list[dict[str, Any]], layers: int, ranks: int, microbatches: int, peak_flops: float) -> dict[str, Any]:
    """The whole model's microbatch from the rows of small ones."""
    parts = {name: line([(row["layers"], row[name]) for row in rows]) for name in ("backward_ms", "optimizer_ms")}
    flops_at_0, flops, _ = line([(row["layers"], row["flops_per_token"]) for row in rows])
    backward, optimizer = (at_0 + layers * slope for at_0, slope, _ in parts.values())
    ms = backward + optimizer / (ranks * microbatches)
    speed = 1e3 * rows[0]["tokens"] / ms

    def mfu(flops_per_token: float, milliseconds: float) -> float:
        return round(100 * flops_per_token * 1e3 * rows[0]["tokens"] / milliseconds / peak_flops, 1)

    (at_0, per_layer, off), (optimizer_at_0, optimizer_per_layer, _) = parts.values()
    return {
        "tokens": rows[0]["tokens"],
        "per_layer_ms": round(per_layer, 3),
        "at_0_layers_ms": round(at_0, 3),
        "largest_distance_ms": round(off, 3),
        "optimizer_per_layer_ms": round(optimizer_per_layer, 3),
        "optimizer_at_0_layers_ms": round(optimizer_at_0, 3),
        "layers": layers,
        "ms": round(ms, 2),
        "tokens_per_s": round(speed),
        "mfu": mfu(flops_at_0 + layers * flops, ms),
        "mfu_of_a_layer": mfu(flops, per_layer),
        "mfu_at_0_layers": mfu(flops_at_0, at_0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="2,4,6", help="of the small models, with commas")
    parser.add_argument("--of", type=int, required=True, help="layers of the large model")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share the optimizer's work")
    parser.add_argument("--microbatches", type=int, default=1, help="of a step")
    parser.add_argument("--peak_tflops", type=float, default=989, help="of the GPU in bfloat16")
    add_arguments(parser)
    args = parser.parse_args()
    runs = {f"{n} layers": [*args.options, "--layers", n] for n in args.layers.split(",")}
    rows = measured(runs, args)
    Path(args.out).write_text(json.dumps({"rows": rows}, indent=1))
    good = [row for row in rows if "error" not in row]
    if len(good) < 2:
        raise SystemExit("fewer than two models were measured: no line goes through one point")
    result = fit(good, args.of, args.ranks, args.microbatches, 1e12 * args.peak_tflops)
    print(json.dumps(result), flush=True)
    Path(args.out).write_text(json.dumps({"rows": rows, "fit": result}, indent=1))


if __name__ == "__main__":
    main()
