"""A long job of the debug model, with a checkpoint each 20 steps and validation each 50: its memory must not grow.

    python -m tests.trust.soak --steps 2000

Reads the process's memory (what is its alone: private pages) and its open files from /proc twice a second. The first
quarter of the steps is warm-up. Exit status 1 where the memory of the rest grows by 0.1 MB per 100 steps or more by
the line of least squares, or the files do.

Two things grow and end, and must not be taken for a leak. The tokenizer library remembers 10,000 words, which takes
3.6 MB and, with the debug model's tokenizer, 300,000 tokens of new text: a step has 2,048 tokens here, so that the
warm-up has more. And the C library keeps memory that is free, in pieces that it cannot give back; it is told here to
have one arena, and to map every larger block by itself.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.trust import jobs

LIMIT = 0.1  # MB per 100 steps
JOB = (
    *("--checkpoint.enable", "--checkpoint.interval=20", "--checkpoint.keep_latest_k=3"),
    *("--validation.freq=50", "--validation.steps=2", "--metrics.log_freq=10"),
)
WIDE = ("--training.local_batch_size=64",)  # of 32 tokens
GIVES_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def private_mb(pid: int) -> float:
    """Memory of the process alone, in MB (10^6 bytes)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"Private_\w+: +(\d+) kB", text)) * 1024 / 1e6


def last_step(log: Path) -> int:
    steps = re.findall(r"step: +(\d+) ", log.read_text())
    return int(steps[-1]) if steps else 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--debugmodel", action="store_true", help="the whole debug model, in place of a tiny one")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    out = args.out or Path(tempfile.mkdtemp())
    os.environ |= GIVES_BACK
    process = jobs.start(out, *JOB, *([] if args.debugmodel else jobs.TINY + WIDE), f"--training.steps={args.steps}")
    rows = []
    while process.poll() is None:
        with contextlib.suppress(OSError):  # it ends just now
            step = last_step(out / "log.txt")
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            rows.append((step, private_mb(process.pid), files))
        time.sleep(0.5)
    if process.returncode != 0:
        print((out / "log.txt").read_text()[-2000:])
        return 1
    table = np.array([row for row in rows if row[0] >= args.steps // 4])
    (out / "memory.csv").write_text("".join(f"{step},{mb:.3f},{files}\n" for step, mb, files in rows))
    slopes = [np.polyfit(table[:, 0], table[:, column], 1)[0] * 100 for column in (1, 2)]
    first, last = (table[part, 2].max() for part in (slice(0, len(table) // 2), slice(len(table) // 2, None)))
    print(
        f"{args.steps} steps, {len(table)} readings: {slopes[0]:+.3f} MB per 100 steps at {table[-1, 1]:.0f} MB, "
        f"at most {first:.0f} files open in the first half and {last:.0f} in the second; {out}"
    )
    return int(slopes[0] >= LIMIT or last > first)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
