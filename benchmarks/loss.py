"""Time and memory of the output layer with its loss, forward and backward, ours against TorchTitan's compiled loss.

    python benchmarks/loss.py 32768,32768,768 16384,151936,2048 --chunk_mib 128 256 384 --out loss.json

Needs a GPU. A shape is tokens, classes and width of the model. As in a job on one GPU under autocast: bfloat16 input,
float32 weight; with `--weight bfloat16` as in one with momoe.mixed_precision = "weights". Each row is the median of
`--repeats`. "beyond" is the peak of memory less input, weight and their gradients, of which the weight's counts as
float32; under autocast the weight's bfloat16 copy is in it.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss

from momoe_titan.kernels.cross_entropy import linear_cross_entropy

WARM_UP = 2


def steps(
    tokens: int, classes: int, dim: int, chunks_mib: list[float], dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor], dict[str, Callable[[], torch.Tensor]]]:
    """Input and weight, and by name functions that give the loss; one token in fifty has none."""
    x_BTD = torch.randn(1, tokens, dim, device="cuda").bfloat16().requires_grad_()
    weight_VD = (torch.randn(classes, dim, device="cuda") / dim**0.5).to(dtype).requires_grad_()
    labels_BT = torch.randint(classes, (1, tokens), device="cuda")
    labels_BT[:, ::50] = IGNORE_INDEX
    of_logits = torch.compile(cross_entropy_loss)

    def by_chunks(mib: float) -> Callable[[], torch.Tensor]:
        options = {"dtype": torch.bfloat16, "chunk_bytes": int(mib * 2**20)}
        return lambda: linear_cross_entropy(x_BTD[0], weight_VD, labels_BT[0], **options)

    found = {"TorchTitan, compiled": lambda: of_logits(F.linear(x_BTD, weight_VD), labels_BT)}
    return [x_BTD, weight_VD], found | {f"ours, {mib:g} MiB": by_chunks(mib) for mib in chunks_mib}


def measure(loss_of: Callable[[], torch.Tensor], inputs: list[torch.Tensor], repeats: int) -> dict[str, float]:
    """Milliseconds, and MiB beyond inputs and gradients."""
    x_BTD, weight_VD = inputs
    scale = torch.tensor(1e-4, device=x_BTD.device)
    x_BTD.grad = weight_VD.grad = None  # of the loss before
    own = torch.cuda.memory_allocated() + x_BTD.nbytes + 4 * weight_VD.numel()
    times = []
    for i in range(WARM_UP + repeats):
        for t in inputs:
            t.grad = None
        if i == WARM_UP:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.autocast(x_BTD.device.type, torch.bfloat16):
            loss = loss_of() * scale
        loss.backward()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    beyond = torch.cuda.max_memory_allocated() - own
    return {"ms": round(statistics.median(times[WARM_UP:]), 1), "mib": round(beyond / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", help="TOKENS,CLASSES,WIDTH")
    parser.add_argument("--chunk_mib", nargs="+", type=float, default=[128, 256, 384, 512])
    parser.add_argument("--weight", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", help="write the rows as JSON")
    args = parser.parse_args()
    rows = []
    for shape in args.shapes:
        tokens, classes, dim = map(int, shape.split(","))
        inputs, runs = steps(tokens, classes, dim, args.chunk_mib, getattr(torch, args.weight))
        for name, loss_of in runs.items():
            row = {"tokens": tokens, "classes": classes, "dim": dim, "loss": name}
            rows.append(row | measure(loss_of, inputs, args.repeats))
            print(rows[-1], flush=True)
        del inputs, runs
    if args.out:
        with open(args.out, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
