"""Launches kernels: by Triton the first time, and with less host time once they are compiled."""

import contextlib
import functools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from momoe_titan.kernels import gpu, launch_check

logger = logging.getLogger(__name__)

_take_compiled: Callable[[Any], None] | None = None  # gets the kernels of a planned GPU while they are compiled
_wait: Callable[[], None] | None = None  # before this process compiles a kernel
_past_triton: bool | None = None  # whether compiled kernels are launched without Triton; None until it is checked
_compiled = {}  # (kernel, device, specialisation) -> its compiled kernel, and the constants that follow its arguments


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv costs the host as much as a launch's arguments."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for 0)."""
    return 1 << (n - 1).bit_length() if n > 0 else 1


def on_its_device(body: Callable[..., Any]) -> Callable[..., Any]:
    """body, whose first argument is a tensor, with that tensor's CUDA device as the current one, where kernels go."""

    @functools.wraps(body)
    def run(tensor, *args, **options):
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return body(tensor, *args, **options)
        with torch.cuda.device(tensor.device):
            return body(tensor, *args, **options)

    return run


def launch(kernel: Any, grid: tuple[int, ...], *args, **options) -> None:
    """Launch ``kernel`` over ``grid``; an empty grid launches nothing, and nothing is while a GPU is only planned.

    Every kernel of the package goes through here; ``args`` are the positional arguments in order,
    ``options`` the constants that follow them, and the compiler's options. What Triton compiled is
    looked up by the properties of the arguments that it compiles for, which is faster than Triton's
    own way to it; before any is, a check finds out whether that does the same here, and where it does
    not, Triton launches all (see `launch_check`). Where Triton's cache of compiled kernels can't be
    read, written or loaded, a temporary one takes its place, with one warning.
    """
    if not all(grid):
        return
    if gpu.planned() is not None:
        if _take_compiled is not None:
            _take_compiled(kernel.warmup(*args, grid=grid, **options))
        return
    if not isinstance(kernel, JITFunction):  # the interpreter's
        _launch_slowly(kernel, grid, args, options)
        return
    try:
        device = driver.active.get_current_device()  # pyright: ignore[reportAttributeAccessIssue] - all GPUs' drivers have it
    except OSError:  # Triton builds its driver in its cache, which is not usable: mended below
        device = None
    key = (kernel.fn, device, *_specialisation(args), *options, *options.values())
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
        return
    compiled = _launch_slowly(kernel, grid, args, options)
    if compiled is not None and _may_go_past_triton():
        _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])


@contextlib.contextmanager
def compiling_ahead(then: Callable[[Any], None] = lambda compiled: None) -> Iterator[None]:
    """Within the block, launches on a GPU that is only planned compile their kernels; `then` gets each of them."""
    global _take_compiled
    _take_compiled = then
    try:
        yield
    finally:
        _take_compiled = None


def only_plans() -> bool:
    """Whether the GPU is only planned, and nothing is compiled for it: no kernel needs to be launched then."""
    return gpu.planned() is not None and _take_compiled is None


def before_compiling(wait: Callable[[], None]) -> None:
    """Have `wait` called once, before this process next asks Triton for a kernel that it has not launched yet."""
    global _wait
    _wait = wait


def _may_go_past_triton() -> bool:
    """Whether compiled kernels may be launched without Triton, which the first call finds out on the GPU.

    While a CUDA graph is captured nothing can be found out, and the answer is no.
    """
    global _past_triton
    if _past_triton is None:
        try:
            if torch.cuda.is_current_stream_capturing():
                return False
            why = launch_check.difference()
        except Exception as error:  # whatever it is, Triton's own launch does without
            why = f"{type(error).__name__}: {error}"
        _past_triton = why is None
        if why is not None:
            logger.warning(
                "momoe_titan: Triton %s launches every kernel itself, which takes the host longer: the shorter way "
                "that this package knows is not the same here (%s)",
                triton.__version__,
                why,
            )
    return _past_triton


@functools.lru_cache(maxsize=4096)  # to find it takes half as long
def _kind_of(number: int) -> int:
    # 1 is compiled in, multiples of 16 are known to be ones, and the type is the first that fits
    int32, uint64 = -(2**31) <= number < 2**31, number >= 2**63
    return (number == 1) + 2 * (number % 16 == 0) + 4 * int32 + 8 * uint64


def _specialisation(args) -> list:
    """A key that differs whenever Triton would compile the kernel anew; it may differ more often."""
    found = []
    for arg in args:
        if type(arg) is int:
            found.append(_kind_of(arg))
        elif isinstance(arg, torch.Tensor):
            found += arg.dtype, arg.data_ptr() % 16 == 0
        elif type(arg) is float or arg is None:
            found.append(type(arg))
        else:
            found.append(arg.specialisation)
    return found


def _launch_slowly(kernel, grid, args, options):
    """Through Triton, which compiles the kernel if it has to; returns the compiled one."""
    global _wait
    if _wait is not None:
        wait, _wait = _wait, None
        wait()
    try:
        return kernel[grid](*args, **options)
    except (OSError, json.JSONDecodeError, RuntimeError) as error:
        if not _is_cache_fault(error):
            raise
        broken, triton.knobs.cache.dir = triton.knobs.cache.dir, tempfile.mkdtemp(prefix="momoe_titan-triton-")
        warnings.warn(f"Triton's cache {broken} is not usable ({error}); using {triton.knobs.cache.dir}", stacklevel=3)
        kernel.device_caches.clear()
        return kernel[grid](*args, **options)


def _is_cache_fault(error: Exception) -> bool:
    if isinstance(error, RuntimeError):
        return "kernel image" in str(error)  # a damaged binary
    return True
