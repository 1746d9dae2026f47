"""What the link between GPUs gives: collectives of the sizes of our models, alone.

    torchrun --nproc_per_node=2 benchmarks/communication.py --out communication.json

The sizes are those of one block's weights, which FSDP gathers and whose gradients it reduces, and those of the rows
that a rank sends in expert parallelism. For each, the file has the time of one call, and the GB/s that a GPU sends:
(n - 1)/n of the whole tensor's bytes over n ranks, over the time. How a training step hides them is shown by
`step_breakdown.py`, on as many ranks.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WARMUP, CALLS, ROUNDS = 3, 10, 3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Elements of one block; of the weights outside of blocks; of a token.
SIZES = {"500M": (40.5e6, 50.3e6, 768), "1.4B": (77.2e6, 50.3e6, 768), "7B": (157.5e6, 100.7e6, 1536)}
TOKENS = 65536  # rows that a rank sends in expert parallelism over two ranks, one of them its own: twice 32,768 tokens


def gathered(numel: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    whole = torch.zeros(numel, dtype=dtype, device=device)
    part = torch.zeros(numel // dist.get_world_size(), dtype=dtype, device=device)
    return lambda: dist.all_gather_into_tensor(whole, part)


def reduced(numel: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    whole = torch.zeros(numel, dtype=dtype, device=device)
    part = torch.zeros(numel // dist.get_world_size(), dtype=dtype, device=device)
    return lambda: dist.reduce_scatter_tensor(part, whole)


def exchanged(numel: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    sent = torch.zeros(numel, dtype=dtype, device=device)
    received = torch.zeros_like(sent)
    return lambda: dist.all_to_all_single(received, sent)


def all_reduced(numel: int, dtype: torch.dtype, device: torch.device) -> Callable[[], Any]:
    whole = torch.zeros(numel, dtype=dtype, device=device)
    return lambda: dist.all_reduce(whole)


KINDS = {
    "all-gather": (gathered, 1),
    "reduce-scatter": (reduced, 1),
    "all-to-all": (exchanged, 1),
    "all-reduce": (all_reduced, 2),  # sends the tensor twice
}


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the median over rounds; the slowest rank's."""
    for _ in range(WARMUP):
        call()
    times = []
    for _ in range(ROUNDS):
        _wait(device)
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        _wait(device)
        times.append((time.perf_counter() - begin) / CALLS)
    slowest = torch.tensor(statistics.median(times), dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(kind: str, numel: float, dtype: str, what: str, device: torch.device) -> dict[str, Any]:
    """One row of the table."""
    ranks = dist.get_world_size()
    make, times = KINDS[kind]
    whole = int(numel) // ranks**2 * ranks**2
    taken = seconds(make(whole, DTYPES[dtype], device), device)
    num_bytes = whole * DTYPES[dtype].itemsize
    return {
        "collective": kind,
        "of": what,
        "dtype": dtype,
        "MB": num_bytes / 1e6,
        "us": 1e6 * taken,
        "GB/s": times * num_bytes * (ranks - 1) / ranks / taken / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="JSON file for the results")
    parser.add_argument("--flavors", default="500M,1.4B,7B", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes, for a trial")
    args = parser.parse_args()
    names = args.flavors.split(",")
    if unknown := [name for name in names if name not in SIZES]:
        parser.error(f"--flavors is {args.flavors!r}: {unknown[0]!r} is none of {', '.join(SIZES)}")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    rows = []
    for name in names:
        block, ends, width = (numel * args.scale for numel in SIZES[name])
        for kind, dtype in (("all-gather", "bfloat16"), ("reduce-scatter", "bfloat16"), ("reduce-scatter", "float32")):
            rows.append(measure(kind, block, dtype, f"a block of {name}", device))
        rows.append(measure("reduce-scatter", ends, "float32", f"embedding and output of {name}", device))
        rows.append(measure("all-to-all", TOKENS * width, "bfloat16", f"tokens of {name}", device))
    for what, numel in (("a number", 1), ("counts", 1e4)):  # such as a loss, and the histograms of routers
        rows.append(measure("all-reduce", max(numel, dist.get_world_size() ** 2), "float32", what, device))
    if dist.get_rank() == 0:
        for row in rows:
            print(f"{row['collective']:15} {row['of']:32} {row['dtype']:9} {row['MB']:9.3f} MB", end=" ")
            print(f"{row['us']:8.0f} us {row['GB/s']:7.1f} GB/s", flush=True)
        hardware = torch.cuda.get_device_name(device) if on_gpu else "CPU"
        result = {"ranks": dist.get_world_size(), "device": hardware, "torch": torch.__version__, "rows": rows}
        Path(args.out).write_text(json.dumps(result, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
