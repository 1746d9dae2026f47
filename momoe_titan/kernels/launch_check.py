"""Checks at first use whether a compiled kernel may be launched past Triton, which is what `launch` does.

`launch` looks a compiled kernel up by what it believes that Triton compiles for, and hands it the arguments itself.
Under a release of Triton that compiles for more, or takes arguments in another way, that would be wrong without a word.
So one small kernel is launched both ways on arguments that `launch` holds for alike: Triton must take the same compiled
kernel for all of them, and every argument has to arrive.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CONSTANT = 5  # that follows the arguments

# Pairs which `launch` takes for alike: 1, then a multiple of 16 and a number that is none, of 32, 64, unsigned 64 bits.
INTEGERS = (
    (1, 1),
    (48, -(2**31)),
    (7, 24),
    (2**32, -(2**40)),
    (2**33 + 5, -(2**31) - 1),
    (2**63, 2**64 - 16),
    (2**63 + 1, 2**64 - 1),
)
NUMBERS = (0.25, 16.0)
TENSORS = (4, 32), (1, 6)  # first elements of slices of 4-byte numbers: aligned to 16 bytes, and not
NUM_VALUES = 16  # that hold the len(INTEGERS) + 4 results: a row of them is aligned to 16 bytes like the one before


@triton.jit
def probe_kernel(
    out_ptr, aligned_ptr, odd_ptr, none, one, many, some, far_many, far, most_many, most, number, CONSTANT: tl.constexpr
):
    """Writes all arguments as int64."""
    tl.store(out_ptr, one)
    tl.store(out_ptr + 1, many)
    tl.store(out_ptr + 2, some)
    tl.store(out_ptr + 3, far_many)
    tl.store(out_ptr + 4, far)
    tl.store(out_ptr + 5, most_many)
    tl.store(out_ptr + 6, most)
    tl.store(out_ptr + 7, 4 * number)
    tl.store(out_ptr + 8, tl.load(aligned_ptr))
    tl.store(out_ptr + 9, tl.load(odd_ptr))
    if none is None:
        tl.store(out_ptr + 10, CONSTANT)


def arguments(i: int, out: Tensor, numbers: Tensor) -> tuple:
    """The kernel's arguments before its constant, for i = 0 or 1; numbers are 0, 1, 2, .. in int32."""
    aligned, odd = (numbers[first[i] :] for first in TENSORS)
    return out, aligned, odd, None, *(pair[i] for pair in INTEGERS), NUMBERS[i]


def expected(i: int) -> list[int]:
    """What the kernel writes for these arguments."""
    integers = [pair[i] - 2**64 if pair[i] >= 2**63 else pair[i] for pair in INTEGERS]
    written = [*integers, int(4 * NUMBERS[i]), TENSORS[0][i], TENSORS[1][i], CONSTANT]
    return written + [0] * (NUM_VALUES - len(written))


def difference(kernel: Any = probe_kernel, device: torch.device | str = "cuda") -> str | None:
    """What is another thing if kernels are launched past Triton, in words; None if nothing is.

    Launches on a stream of its own and waits for that one alone.
    """
    stream = torch.cuda.Stream() if torch.device(device).type == "cuda" else None
    with torch.cuda.stream(stream):  # does nothing for None
        numbers = torch.arange(64, dtype=torch.int32, device=device)
        out = torch.zeros(2, 2, NUM_VALUES, dtype=torch.int64, device=device)
        compiled = []
        for i in range(2):
            compiled.append(kernel[(1,)](*arguments(i, out[0, i], numbers), CONSTANT=CONSTANT))
            compiled[0][(1, 1, 1)](*arguments(i, out[1, i], numbers), CONSTANT)
        written = out.tolist()
    if compiled[0] is not compiled[1]:
        return "Triton compiles a kernel anew for arguments that are alike in all that is looked at"
    for way, values in zip(("by Triton", "past Triton"), written, strict=True):
        for i in range(2):
            if values[i] != expected(i):
                return f"a kernel launched {way} got {values[i]} in place of {expected(i)}"
    return None
