"""A long job of the debug model, with a checkpoint each 20 steps and validation each 50: its memory must not grow.

    python -m tests.trust.soak --steps 2000

Counted each 25 steps: what the process has asked of the C library and not given back, Python's memory included; its
private pages; its open files. The first quarter of the steps is warm-up. Exit status 1 where the memory in use grows
by 0.1 MB per 100 steps or more by the line of least squares, or the files do.

Three things grow and end, and must not be taken for a leak. The tokenizer library remembers 10,000 words, which takes
3.6 MB and, with the debug model's tokenizer, 300,000 tokens of new text: a step has 2,048 tokens here, so that the
warm-up has more. The C library keeps free memory in pieces that it cannot give back, so that private pages come and go
by 15 MB. And torch keeps a record of collective operations, about 1 kB each: TorchTitan sets comm.trace_buf_size to
20,000 of them, which thousands of checkpoints do not fill. The job runs without it.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.trust import jobs

LIMIT = 0.1  # MB (10^6 bytes) per 100 steps
JOB = (
    *("--checkpoint.enable", "--checkpoint.interval=20", "--checkpoint.keep_latest_k=3"),
    *("--validation.freq=50", "--validation.steps=2", "--metrics.log_freq=10"),
    "--comm.trace_buf_size=0",
    "--experimental.custom_import=tests.support.memory_probe",
)
WIDE = ("--training.local_batch_size=64",)  # of 32 tokens


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--debugmodel", action="store_true", help="the whole debug model, in place of a tiny one")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    file = out / "memory.csv"
    os.environ |= {"MOMOE_TITAN_MEMORY": str(file.absolute()), "PYTHONMALLOC": "malloc"}
    model = [] if args.debugmodel else jobs.TINY + WIDE
    process = jobs.start(out, *model, *JOB, f"--training.steps={args.steps}")
    if process.wait() != 0:
        print((out / "log.txt").read_text()[-2000:])
        return 1
    table = np.loadtxt(file, delimiter=",")
    table = table[table[:, 0] >= args.steps // 4]
    in_use, private = (np.polyfit(table[:, 0], table[:, column] / 1e6, 1)[0] * 100 for column in (1, 2))
    half = len(table) // 2
    first, last = table[:half, 3].max(), table[half:, 3].max()
    print(
        f"{args.steps} steps, {len(table)} readings: {in_use:+.3f} MB per 100 steps at {table[-1, 1] / 1e6:.0f} MB in "
        f"use; private pages {private:+.3f} at {table[-1, 2] / 1e6:.0f} MB; at most {first:.0f} files open in the "
        f"first half and {last:.0f} in the second; {out}"
    )
    return int(in_use >= LIMIT or last > first)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
