"""Time of norm, clipping and AdamW alone, ours against torch's, on a flavor's parameters with random gradients.

    python benchmarks/optimizer.py 500m 1.4b 7b --out optimizer.json

Needs a GPU; 7b takes 112 GB of its memory. Each row is the median of `--repeats` steps:
    torch           torch.nn.utils' clipping and torch's fused AdamW, float32 gradients
    ours, float32   one norm and one update that reads the gradients once each, float32 gradients
    ours, bfloat16  the same with bfloat16 gradients, and the bfloat16 copy of the weights written too
GB/s counts what has to be read and written once each, for torch as for ours with float32.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator

import torch

from momoe_titan.kernels.adamw import Adamw, Rates, Updated
from momoe_titan.kernels.multi_tensor import SquareSum
from momoe_titan.model import MomoeLlama, flavors

RATES = Rates(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
MAX_NORM = 1.0


def shapes(flavor: str) -> list[torch.Size]:
    """Of the parameters of a flavor."""
    with torch.device("meta"):
        return [p.shape for p in MomoeLlama(flavors[flavor]).parameters()]


def random(sizes: list[torch.Size], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Tensors in [-0.01, 0.01], and so small a bound that nothing overflows."""
    return [torch.empty(size, dtype=dtype, device="cuda").uniform_(-0.01, 0.01) for size in sizes]


def with_torch(sizes: list[torch.Size]) -> Callable[[], None]:
    """A step as TorchTitan takes it."""
    parameters = [torch.nn.Parameter(t) for t in random(sizes)]
    gradients = random(sizes)
    optimizer = torch.optim.AdamW(parameters, **RATES._asdict(), fused=True)

    def step() -> None:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        torch.nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm, foreach=True)
        torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage] - no public name
        optimizer.step()

    return step


def with_ours(sizes: list[torch.Size], dtype: torch.dtype) -> Callable[[], None]:
    """A step by our kernels."""
    gradients = random(sizes, dtype)
    updated = [
        Updated(
            parameter=p,
            gradient=g,
            exp_avg=torch.zeros_like(p),
            exp_avg_sq=torch.zeros_like(p),
            step=torch.zeros((), device="cuda"),
            copy=None if dtype == torch.float32 else torch.empty_like(p, dtype=dtype),
        )
        for p, g in zip(random(sizes), gradients, strict=True)
    ]
    adamw, square_sum, skip = Adamw(), SquareSum(), torch.zeros((), device="cuda")

    def step() -> None:
        norm = square_sum(gradients).sqrt()
        scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        adamw.step(updated, RATES, scale, skip)

    return step


def milliseconds(step: Callable[[], None], repeats: int) -> float:
    """Median of so many steps, after three that are not counted."""
    times = []
    for i in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def rows(flavor: str, repeats: int) -> Iterator[dict]:
    sizes = shapes(flavor)
    count = sum(size.numel() for size in sizes)
    # bytes a parameter: the gradient twice, weight and two moments read and written, the copy written
    ways = {
        "torch": (lambda: with_torch(sizes), 2 * 4 + 24),
        "ours, float32": (lambda: with_ours(sizes, torch.float32), 2 * 4 + 24),
        "ours, bfloat16": (lambda: with_ours(sizes, torch.bfloat16), 2 * 2 + 24 + 2),
    }
    for name, (build, num_bytes) in ways.items():
        taken = milliseconds(build(), repeats)
        torch.cuda.empty_cache()
        yield {
            "flavor": flavor,
            "parameters": count,
            "optimizer": name,
            "ms": round(taken, 3),
            "GB/s": round(count * num_bytes / taken / 1e6),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flavors", nargs="+", help="names in momoe_titan/model/flavors.py")
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed (default: 10)")
    parser.add_argument("--out", help="file for the rows, as JSON")
    args = parser.parse_args()
    found = []
    for flavor in args.flavors:
        for row in rows(flavor, args.repeats):
            print(row, flush=True)
            found.append(row)
    if args.out:
        with open(args.out, "w") as f:
            json.dump({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": found}, f, indent=1)


if __name__ == "__main__":
    main()
