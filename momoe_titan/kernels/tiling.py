"""Pieces that the grouped GEMM kernels share, and how a kernel is launched."""

import functools
import json
import tempfile
import warnings

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

_compiled = {}  # (kernel, device, specialisation) -> its compiled kernel, and the constants that follow its arguments


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. triton.cdiv costs the host as much as a launch's arguments."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for 0)."""
    return 1 << (n - 1).bit_length() if n > 0 else 1


def on_its_device(body):
    """body, whose first argument is a tensor, with that tensor's CUDA device as the current one, where kernels go."""

    @functools.wraps(body)
    def run(tensor, *args, **options):
        if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
            return body(tensor, *args, **options)
        with torch.cuda.device(tensor.device):
            return body(tensor, *args, **options)

    return run


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launch ``kernel`` over ``grid``; an empty grid launches nothing.

    Every kernel of the package goes through here; ``args`` are the positional arguments in order,
    ``options`` the constants that follow them, and the compiler's options. What Triton compiled is
    looked up by the properties of the arguments that it compiles for, which is faster than Triton's
    own way to it. Where Triton's cache of compiled kernels can't be read, written or loaded, a
    temporary one takes its place, with one warning.
    """
    if not all(grid):
        return
    if not isinstance(kernel, JITFunction):  # the interpreter's
        _launch_slowly(kernel, grid, args, options)
        return
    try:
        device = driver.active.get_current_device()
    except OSError:  # Triton builds its driver in its cache, which is not usable: mended below
        device = None
    key = (kernel.fn, device, *_specialisation(args), *options.items())
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)[:3]](*args, *constants)
        return
    compiled = _launch_slowly(kernel, grid, args, options)
    if compiled is not None:
        _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(args) :])


def _specialisation(args) -> list:
    """What Triton may compile a kernel for again, in values that differ where Triton's do, or more often."""
    found = []
    for arg in args:
        if type(arg) is int:
            # 1 is compiled in, multiples of 16 are known to be ones, and the type is the first that fits
            int32, uint64 = -(2**31) <= arg < 2**31, arg >= 2**63
            found.append((arg == 1) + 2 * (arg % 16 == 0) + 4 * int32 + 8 * uint64)
        elif isinstance(arg, torch.Tensor):
            found += arg.dtype, arg.data_ptr() % 16 == 0
        elif type(arg) is float or arg is None:
            found.append(type(arg))
        else:
            found.append(arg.specialisation)
    return found


def _launch_slowly(kernel, grid, args, options):
    """Through Triton, which compiles the kernel if it has to; returns the compiled one."""
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


@triton.jit
def tile_span(tiles_ptr, offsets_ptr, tile, BLOCK_M: tl.constexpr):
    """Expert of a row tile (int64), its first row, and the end of the expert's rows."""
    packed = tl.load(tiles_ptr + tile)
    expert = packed & 0xFFFF
    row = tl.load(offsets_ptr + expert) + ((packed >> 16) & 0xFFFF) * BLOCK_M
    end = tl.load(offsets_ptr + expert + 1)
    return expert.to(tl.int64), row, end


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in float32. UPCAST serves the interpreter, whose bfloat16 dot is wrong."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_block(ptrs, row_mask, col_mask, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr):
    """A 2-D block; rows and columns outside their masks read as 0."""
    if EVEN_ROWS:
        if EVEN_COLS:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=col_mask[None, :], other=0.0)
    else:
        if EVEN_COLS:
            return tl.load(ptrs, mask=row_mask[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=row_mask[:, None] & col_mask[None, :], other=0.0)


@triton.jit
def rows_matmul(
    a_ptr,
    rows,
    b_ptr,
    cols,
    col_mask,
    stride_bk,
    stride_bn,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """acc_mn = A[rows] @ B[:, cols] in float32.

    A has K columns, contiguous; rows may be any int64 row numbers (a gather).
    B is addressed by its two strides, so it may be stored either way round.
    """
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * K + k[None, :]
    b_ptrs = b_ptr + k[:, None] * stride_bk + cols[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a = load_block(a_ptrs, rows >= 0, k0 + k < K, True, EVEN_K)
        b = load_block(b_ptrs, k0 + k < K, col_mask, EVEN_K, EVEN_N)
        acc = dot(a, b, acc, PRECISION, UPCAST)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * stride_bk
    return acc
