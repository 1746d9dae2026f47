"""Launches the Hopper kernels thousands of times with random delays in producer and consumers; no bit may change.

    python -m tests.trust.stress --launches 10000

One process compiles the kernels as they are and keeps their results, another compiles them with sleeps of random
length before waits, loads, arrivals and stores (`random_delay` of hopper/pipeline.py) and compares every launch.
"""

import argparse
import hashlib
import itertools
import subprocess
import sys
import time

import torch
from triton.experimental.gluon import language as gl

from momoe_titan.kernels import momoe_mlp
from momoe_titan.kernels.hopper import launch, pipeline

SHAPES = {  # T, D, F, E, K: why
    "tails": (517, 320, 448, 6, 4),  # neither D nor F fills its last tile
    "few steps": (1200, 128, 64, 5, 3),  # fewer steps in a tile than blocks to store
    "one expert": (900, 576, 320, 4, 1),  # long weight gradients beside empty ones
    "many tiles": (4096, 512, 512, 64, 6),  # several for each program
}
PERCENTS = (0, 37, 100)
NAMES = ("out", "dx", "dw1", "dw2", "dscores")
LAUNCHES = {0: 7, 37: 7, 100: 6}  # of Hopper kernels in a forward and a backward, by save_percent


def inputs(shape, dtype=torch.bfloat16):
    T, D, F, E, K = shape
    g = torch.Generator("cuda").manual_seed(0)

    def randn(*size, scale=1.0):
        return (torch.randn(size, generator=g, device="cuda") * scale).to(dtype)

    ids = torch.rand(T, E, generator=g, device="cuda").topk(K, -1)[1]
    if E == 4:
        ids = torch.full_like(ids, 1)
    scores = torch.rand(T, K, generator=g, device="cuda")
    leaves = randn(T, D), randn(E, D, 2 * F, scale=D**-0.5), randn(E, F, D, scale=F**-0.5), scores
    return [t.requires_grad_() for t in leaves], ids, randn(T, D)


def results(leaves, ids, dout, percent):
    x, w1, w2, scores = leaves
    out, _ = momoe_mlp(x, w1, w2, ids, scores, percent, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:16]


def child(launches: int) -> None:
    """Prints the digest of each result of the first round, then how many results of later rounds were others."""
    launch.SYNC_FLOPS = 0  # programs keep together however small the work
    work = {name: inputs(shape) for name, shape in SHAPES.items()}
    first = {}
    for name, percent in itertools.product(work, PERCENTS):
        first[name, percent] = results(*work[name], percent)
        print("bits", name.replace(" ", "_"), percent, *map(digest, first[name, percent]), flush=True)
    done, other = 0, torch.zeros((), dtype=torch.int64, device="cuda")
    begin = time.monotonic()
    while done < launches:
        for (name, percent), want in first.items():
            got = results(*work[name], percent)
            other += sum((~torch.eq(g, w).all()).long() for g, w in zip(got, want, strict=True))
            done += LAUNCHES[percent]
    print("launches", done, "other", int(other), f"{time.monotonic() - begin:.1f} s")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launches", type=int, default=10_000)
    parser.add_argument("--child", choices=["plain", "delays"])
    args = parser.parse_args(argv)
    if args.child:
        if args.child == "delays":
            pipeline.DELAYS = gl.constexpr(True)
        child(args.launches)
        return 0
    bits, failed = {}, 0
    children = {
        kind: subprocess.Popen(
            [sys.executable, "-m", "tests.trust.stress", "--child", kind, "--launches", str(launches)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for kind, launches in (("plain", 200), ("delays", args.launches))
    }
    for kind, process in children.items():
        out, _ = process.communicate()
        lines = out.splitlines()
        bits[kind] = {tuple(line.split()[1:3]): line.split()[3:] for line in lines if line.startswith("bits")}
        last = next((line for line in lines if line.startswith("launches")), "")
        print(f"{kind}: {last or 'did not end'}")
        failed += process.returncode != 0 or " other 0 " not in last
    for case, want in bits["plain"].items():
        for name, a, b in zip(NAMES, want, bits["delays"].get(case, [""] * 5), strict=True):
            if a != b:
                failed += 1
                print(f"OTHER BITS with delays: {name} of {case}")
    print(f"{len(bits['plain'])} cases, {failed} failed")
    return int(failed > 0 or not bits["plain"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
