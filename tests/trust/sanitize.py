"""compute-sanitizer over every kernel of the package at small shapes.

    python -m tests.trust.sanitize                                # all tools and kernels, side by side
    python -m tests.trust.sanitize --tools memcheck --groups portable

memcheck, initcheck and synccheck look at all kernels. racecheck looks at those that are plain Triton: it does not
know the barriers by which the warps of the Hopper kernels take turns (docs/kernels.md argues about each of them, and
tests.trust.stress delays them). initcheck does not know the stores of the tensor memory accelerator, and takes all that
the Hopper kernels and cuBLAS write for unwritten. So NaN is written there before each of the Hopper kernels, and
before the products that the loss kernel reads, and none may be in a result. What initcheck and racecheck find in
kernels of torch and cuBLAS is told and is no fault.
Each allocation is CUDA's own, so that a byte past its end belongs to nobody.
"""

import argparse
import contextlib
import functools
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from momoe_titan.kernels import gemms, momoe_mlp
from momoe_titan.kernels.hopper import launch
from tests.trust import cases

OUTPUTS = {  # of launches of the Hopper kernels
    "up_proj": ("act_RF", "z_SZ"),
    "recompute_z": ("z",),
    "down_proj": ("y_RD",),
    "up_proj_backward": ("dx_RD",),
    "down_proj_backward": ("dz", "act_scaled_RF", "dscore_partial"),
    "weight_grad": ("dw",),
}
PRINTED = 20_000  # findings of a report
TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")


def poisoned(kernel: Callable, outputs: tuple[str, ...]) -> Callable:
    """A launch of a Hopper kernel that finds NaN where it is to write."""

    @functools.wraps(kernel)
    def launched(*args, **kwargs):
        given = inspect.signature(kernel).bind(*args, **kwargs).arguments
        z = given.get("z") if "z" not in outputs else None
        keep = {z.saved.data_ptr(), z.rest.data_ptr()} if z is not None else set()  # whose place dz takes
        for written in (given[name] for name in outputs):
            if kernel.__name__ == "recompute_z":
                keep = {written.saved.data_ptr()} if written.num_saved else set()
            for t in (written.saved, written.rest) if isinstance(written, launch.SplitRows) else (written,):
                if t is not None and t.data_ptr() not in keep:
                    t.fill_(torch.nan)
        return kernel(*args, **kwargs)

    return launched


def poison_outputs() -> None:
    for name, outputs in OUTPUTS.items():
        setattr(launch, name, poisoned(getattr(launch, name), outputs))


class PoisonedProducts(TorchDispatchMode):
    """Matrix products of torch find NaN where they are to write."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        aten, product = torch.ops.aten, func.overloadpacket
        if product in (aten.mm, aten.addmm) and "out" in kwargs:
            if product is aten.mm or kwargs.get("beta", 1) == 0:  # otherwise it adds to what is there
                kwargs["out"].fill_(torch.nan)
        elif func in (aten.mm.default, aten.addmm.default):
            a, b = args[-2:]
            func, kwargs["out"] = product.out, a.new_full((a.shape[0], b.shape[1]), torch.nan)
        return func(*args, **kwargs)


def check(*results: torch.Tensor) -> None:
    if not torch.stack([t.isfinite().all() for t in results]).all():
        raise SystemExit("a result holds NaN: something was read that nobody wrote")


def experts(shape: tuple[int, ...], dtype: str, kind: str = "plain", percents: tuple[int, ...] = (0, 37, 100)) -> None:
    """The op on a ragged mask, forward and backward, with z kept and not, and without gradients."""
    tokens, *sizes = shape
    case = cases.ragged(tokens, tuple(sizes), dtype, kind)
    inputs = cases.make_inputs(case, "cuda")
    leaves = {name: t.requires_grad_() for name, t in inputs.leaves.items()}
    tensors, options = cases.arguments(case, leaves)
    for percent in percents:
        out, _ = momoe_mlp(*tensors, inputs.ids, leaves["scores"], percent, backend="triton", **options)
        for keep in (True, False):  # dz beside z, and over it
            check(out, *torch.autograd.grad(out, list(leaves.values()), inputs.dout, retain_graph=keep))
    with torch.no_grad():
        check(momoe_mlp(*tensors, inputs.ids, leaves["scores"], backend="triton", **options)[0])
        few = [tensors[0][:3], *tensors[1:], inputs.ids[:3], leaves["scores"][:3]]
        check(momoe_mlp(*few, backend="triton", **options)[0])  # decode.py


def hopper() -> None:
    poison_outputs()
    for shape in ((130, 128, 192, 3, 2), (300, 320, 64, 5, 1)):
        experts(shape, "bfloat16")


def hopper_variants() -> None:
    poison_outputs()
    launch.SYNC_FLOPS = 0  # programs keep together
    launch.UP_AT_A_TIME = launch.DOWN_BACKWARD_AT_A_TIME = (0, 2)
    launch.ROWS_AT_A_TIME = 1
    experts((130, 128, 192, 3, 2), "float16", percents=(37,))


def hopper_kinds(*kinds: str) -> None:
    poison_outputs()
    for kind in kinds:
        experts((130, 128, 64, 3, 2), "bfloat16", kind, percents=(37,))


def portable(*dtypes: str) -> None:
    gemms.hopper.supported = lambda *args: False
    for dtype in dtypes:
        experts((45, 32, 48, 3, 2), dtype)
    experts((7, 97, 47, 3, 3), dtypes[0], percents=(37,))


def portable_kinds() -> None:
    gemms.hopper.supported = lambda *args: False
    for kind in cases.KINDS:
        experts((20, 32, 16, 3, 2), "bfloat16", kind, percents=(37,))


def tests(*names: str, mode: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext) -> None:
    """Of kernels of the router, of losses, balancing and the optimizer: their own tests on a GPU, in this mode."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # which would hide a read of it from initcheck
    files = [f"tests/kernels/test_{name}.py" for name in names]
    with mode():
        status = pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", *files])
    if status != 0:
        raise SystemExit(f"tests of {names} end with status {status}")


KINDS = [kind for kind in cases.KINDS if kind != "plain"]
GROUPS: dict[str, Callable[[], None]] = {  # of kernels, each in a process of its own
    "hopper": hopper,
    "hopper-variants": hopper_variants,
    "hopper-kinds-1": functools.partial(hopper_kinds, *KINDS[::2]),
    "hopper-kinds-2": functools.partial(hopper_kinds, *KINDS[1::2]),
    "portable": functools.partial(portable, "bfloat16"),
    "portable-float32": functools.partial(portable, "float32"),
    "portable-kinds": portable_kinds,
    "routing": functools.partial(tests, "router", "routing", "grouping"),
    "balancing": functools.partial(tests, "quantile", "entropy", "balance"),
    "optimizer-and-loss": functools.partial(tests, "adamw", "cross_entropy", "sum_parts", mode=PoisonedProducts),
}


def findings(tool: str, report: str) -> tuple[int, int]:
    """How many errors a report of compute-sanitizer counts, -1 where it did not come to its end, and ours of them.

    Only Triton's kernels name a line of Python. An error that is not printed, since there are too many, counts as ours,
    and so does any of memcheck and synccheck, which may come from what torch's kernels were given.
    """
    if tool == "racecheck":
        found = re.search(r"RACECHECK SUMMARY: (\d+) hazard", report)
    else:
        found = re.search(r"ERROR SUMMARY: (\d+) error", report)
    if not found:
        return -1, -1
    if tool in ("memcheck", "synccheck"):
        return int(found[1]), int(found[1])
    blocks = re.split(r"^=+ (?=Uninitialized|Error|Warning)", report, flags=re.M)[1:]
    others = [block for block in blocks if not re.search(r"\.py:\d+", re.sub(r".*Host Frame.*", "", block))]
    return int(found[1]), int(found[1]) - len(others)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--reports", default="sanitizer", help="folder for the reports")
    parser.add_argument("--seconds", type=float, default=3600, help="a process that takes longer is ended")
    parser.add_argument("--processes", type=int, default=16, help="side by side")
    parser.add_argument("--child", choices=GROUPS)
    args = parser.parse_args(argv)
    if args.child:
        GROUPS[args.child]()
        torch.cuda.synchronize()
        return 0
    sanitizer = shutil.which("compute-sanitizer", path=os.environ["PATH"] + ":/usr/local/cuda/bin")
    if sanitizer is None:
        raise SystemExit("compute-sanitizer is not there: it comes with the CUDA toolkit")
    reports = Path(args.reports)
    reports.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin, failed = time.monotonic(), 0
    waiting = [(tool, group) for group in args.groups for tool in args.tools]
    waiting = [(tool, group) for tool, group in waiting if tool != "racecheck" or not group.startswith("hopper")]
    running: dict[tuple[str, str], subprocess.Popen] = {}
    while running or waiting:
        while waiting and len(running) < args.processes:
            tool, group = waiting.pop(0)
            command = [sanitizer, "--log-file", str(reports / f"{tool}-{group}.txt"), "--tool", tool]
            command += ["--show-backtrace", "no", "--print-limit", str(PRINTED)]  # the stacks take most of the time
            child = [sys.executable, "-m", "tests.trust.sanitize", "--child", group]
            with open(reports / f"{tool}-{group}.log", "w") as log:
                running[tool, group] = subprocess.Popen(
                    [*command, *child], env=environment, stdout=log, stderr=log, start_new_session=True
                )
        for (tool, group), process in list(running.items()):
            late = time.monotonic() - begin > args.seconds
            if process.poll() is None and not late:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            del running[tool, group]
            report = reports / f"{tool}-{group}.txt"
            found, ours = findings(tool, report.read_text() if report.exists() else "")
            failed += ours != 0 or process.wait() != 0
            said = "no time left" if late else "did not end" if found < 0 else f"{found} findings, {ours} of them ours"
            print(f"{tool} {group}: {said}, status {process.wait()}, {time.monotonic() - begin:.0f} s", flush=True)
        time.sleep(0.2)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
