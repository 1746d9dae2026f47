"""Thousands of random calls of the op on a GPU, by the Hopper kernels and by the portable ones.

    python -m tests.trust.fuzz --cases 10000 --processes 12

Each process takes some of the shapes that compile kernels anew, so that compiling is spread. Prints what failed, as
cases to put into tests/kernels/test_fuzz.py, and how near to the allowed error the rest came. Exit status 1 if any
case failed.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from momoe_titan.kernels import gemms
from tests.trust import cases as fuzz

# D, F, E, K, dtype and kind: each of them compiles kernels anew
HOPPER = [
    *[((64, 64, 4, 2), "bfloat16", "plain"), ((128, 192, 7, 3), "float16", "plain")],
    *[((320, 64, 5, 1), "bfloat16", "plain"), ((192, 448, 8, 8), "float16", "plain")],
    *[((256, 128, 33, 4), "bfloat16", "plain"), ((64, 320, 3, 2), "float16", "plain")],
    *[
        ((128, 64, 6, 2), "bfloat16", name)
        for name, kind in fuzz.KINDS.items()
        if name != "plain" and not (kind.biases and kind.scores_on_input)  # which the Hopper kernels do not take
    ],
]
PORTABLE = [
    *[((32, 48, 3, 2), dtype, "plain") for dtype in fuzz.DTYPES],
    *[((97, 47, 5, 3), dtype, "plain") for dtype in fuzz.DTYPES],
    *[
        ((16, 16, 4, 1), "bfloat16", "plain"),
        ((64, 64, 8, 2), "bfloat16", "plain"),
        ((600, 24, 3, 3), "float32", "plain"),
    ],
    *[((48, 130, 17, 4), "float16", "plain"), ((128, 64, 64, 6), "bfloat16", "plain")],
    *[
        ((40, 72, 5, 2), dtype, kind)
        for dtype, kind in zip(["bfloat16", "float32"] * 5, fuzz.KINDS, strict=True)
        if kind != "plain"
    ],
    *[
        ((33, 17, 4, 2), dtype, kind)
        for dtype, kind in (("float16", "gpt-oss"), ("float32", "geglu"), ("float16", "reglu"))
    ],
]
MAX_TOKENS = 400
GRACE = 15  # seconds for a case that began in time
Combination = tuple[tuple[int, int, int, int], str, str]


def combinations() -> list[tuple[str, Combination]]:
    """By the portable kernels, and by the Hopper kernels where they take it, which compile longer.

    A process has its share of the time left for each combination, so the last ones get what the others leave.
    """
    return [("portable", one) for one in PORTABLE] + [("hopper", one) for one in HOPPER]


def run(path: str, combination: Combination, count: int, seed: int, device: str, deadline: float) -> None:
    """`count` cases of one combination, or as many as begin before the deadline.

    Prints each few seconds how many have run, those that failed, and the largest excess of each result.
    """
    shape, dtype, kind = combination
    failed, worst = [], {}
    ran, begin = 0, time.time()
    told = begin

    def tell():
        row = {"path": path, "combination": combination, "ran": ran, "seconds": time.time() - begin}
        print(json.dumps({**row, "failed": failed, "worst": worst}), flush=True)

    checks = {"op": fuzz.check, "layer": fuzz.check_layer}
    if dtype == "float16" or kind != "plain":  # which the layer does not have
        del checks["layer"]
    backend = "triton" if device == "cuda" else "torch"

    @seeded(seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=fuzz.cases([shape], [dtype], [kind], MAX_TOKENS))
    def each(case):
        nonlocal ran, told
        if time.time() > deadline:
            return
        if time.time() > told + 2:
            tell()
            told = time.time()
        name = "layer" if "layer" in checks and case.seed % 5 == 0 else "op"
        ran += 1
        try:
            excess = checks[name](case, device, backend)
            values = torch.stack([value.double() for value in excess.values()]).tolist()
        except Exception:
            failed.append((name, repr(case), traceback.format_exc().splitlines()[-1]))
            return
        for key, value in zip(excess, values, strict=True):
            worst[key] = max(worst.get(key, 0.0), value)
            if not value <= 1:
                failed.append((name, repr(case), f"{key}: {value:.2f} of what is allowed"))

    hopper_supported = gemms.hopper.supported
    gemms.hopper.supported = hopper_supported if path == "hopper" else lambda *args: False
    each()
    gemms.hopper.supported = hopper_supported
    tell()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="of the combinations those with this number modulo --processes")
    parser.add_argument("--each", type=int, default=1, help="only each so-manyth combination, to compile less")
    parser.add_argument("--seconds", type=float, default=3600, help="no case begins later than that")
    parser.add_argument("--out", type=Path, help="a file for what became of each combination")
    parser.add_argument("--until", type=float, help="what --seconds comes to, in seconds since the epoch")
    args = parser.parse_args(argv)
    begin = time.time()
    end = args.until or begin + args.seconds
    every = combinations()[:: args.each]
    if args.only is not None:
        mine = list(enumerate(every))[int(args.only) :: args.processes]
        for nth, (i, combination) in enumerate(mine):
            deadline = time.time() + (end - time.time()) / (len(mine) - nth)
            count = -(-args.cases // len(every))
            run(*combination, count, args.seed + i, args.device, deadline)
        return 0

    rows: dict[tuple, dict] = {}  # the last one of each combination
    broken = 0
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(args.processes)]
        command = [
            sys.executable,
            "-m",
            "tests.trust.fuzz",
            *argv,
            "--until",
            str(end),
            "--processes",
            str(args.processes),
        ]
        children = [subprocess.Popen([*command, "--only", str(i)], stdout=output) for i, output in enumerate(outputs)]
        for child, output in zip(children, outputs, strict=True):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, end + GRACE - time.time()))
            child.kill()
            broken += child.wait() != 0
            output.seek(0)
            for line in output:
                if line.startswith("{") and line.endswith("}\n"):
                    row = json.loads(line)
                    rows[row["path"], str(row["combination"])] = row
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
    failed = [failure for row in rows.values() for failure in row["failed"]]
    for path in ("hopper", "portable"):
        some = [row for row in rows.values() if row["path"] == path]
        keys = sorted({key for row in some for key in row["worst"]})
        worst = {key: max(row["worst"].get(key, 0.0) for row in some) for key in keys}
        ran = sum(row["ran"] for row in some)
        told = ", ".join(f"{key} {value:.2f}" for key, value in worst.items())
        expected = sum(of == path for of, _ in every)
        print(f"{path}: {ran} cases of {len(some)} of {expected} combinations; largest of what is allowed: {told}")
    for name, case, why in failed[:20]:
        print(f"FAILED ({name}) {why}\n  {case}")
    print(f"{len(failed)} failed, {broken} processes broke, {time.time() - begin:.0f} s")
    return int(bool(failed or broken or len(rows) < len(every)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
