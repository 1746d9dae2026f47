"""Kernels that one launch runs over many tensors, whose addresses are in a table on the device; the sum of all squares.

Every tensor is divided into chunks of `CHUNK` elements, one a program. A program looks up which tensor its chunk is of,
and reads from the table where that tensor begins.
"""

# Inside @triton.jit functions Triton evaluates constants and tuples itself; its stubs do not say so.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from momoe_titan.kernels import gpu
from momoe_titan.kernels.launch import launch, only_plans

# Measured on an H200: other sizes took 1 to 10% longer.
CHUNK = 4096  # elements of a program
BLOCK = 2048  # of these, what the warps of a program handle at a time: 16 bytes of bfloat16 a thread
NUM_WARPS = 8
TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_lib = torch.library.Library("momoe_titan", "FRAGMENT")
_lib.define("plan_traffic(Tensor[] read, Tensor[] written) -> ()")
_lib.impl("plan_traffic", lambda read, written: None, "CompositeExplicitAutograd")


def runs_here(t: Tensor) -> bool:
    """Whether the kernels run on tensors like t: on a GPU, there or planned."""
    return gpu.has_gpu(t.device) and not gpu.interpreting()


def plan_traffic(read: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Let a trace of a planned GPU know what a kernel, which is not launched there, would read and write."""
    torch.ops.momoe_titan.plan_traffic(list(read), list(written))


def is_aligned(address: int) -> bool:
    """Whether a tensor at this address can be read 16 bytes at a time."""
    return address % 16 == 0


class Table:
    """Integers on a device, sent again only where one of them has changed. The host does not wait.

    Attributes:
        sent: how often they were sent.
    """

    def __init__(self):
        self.sent = 0
        self._values: list[int] = []
        self._table: Tensor | None = None

    def on(self, device: torch.device, values: list[int]) -> Tensor:
        """These values, int64 on this device."""
        if self._table is None or self._table.device != device or self._values != values:
            self._values, self._table = values, _to_device(torch.tensor(values, dtype=torch.int64), device)
            self.sent += 1
        return self._table


class Chunks:
    """Divides tensors into chunks: made once, and anew where a size has changed.

    Attributes:
        count: of chunks.
        owners_C: (count) int32, the tensor that each chunk is of.
        extents_2N: (2, N) int64: of each tensor the number of elements, and its first chunk.
    """

    count: int
    owners_C: Tensor
    extents_2N: Tensor

    def __init__(self):
        self._sizes: list[int] = []
        self._device: torch.device | None = None

    def divide(self, sizes: list[int], device: torch.device) -> None:
        """Let the chunks be those of tensors with so many elements each."""
        if sizes == self._sizes and device == self._device:
            return
        self._sizes, self._device = sizes, device
        sizes_N = torch.tensor(sizes, dtype=torch.int64)
        counts_N = (sizes_N + CHUNK - 1) // CHUNK
        first_N = counts_N.cumsum(0) - counts_N
        self.count = int(counts_N.sum())
        owners_C = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(counts_N)
        self.owners_C = _to_device(owners_C, device)
        self.extents_2N = _to_device(torch.stack([sizes_N, first_N]), device)


def _to_device(host: Tensor, device: torch.device) -> Tensor:
    # PyTorch frees pinned memory only after what is being copied from it.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@triton.jit
def chunk_of(owners_ptr, extents_ptr, num_tensors, CHUNK: tl.constexpr):
    """This program's chunk: its tensor, where in the tensor it begins (int64), and its number of elements."""
    pid = tl.program_id(0)
    owner = tl.load(owners_ptr + pid)
    start = (pid - tl.load(extents_ptr + num_tensors + owner)) * CHUNK
    size = tl.minimum(tl.load(extents_ptr + owner) - start, CHUNK).to(tl.int32)
    return owner, start, size


@triton.jit
def address(table_ptr, index, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer in this place of the table."""
    ptr = tl.load(table_ptr + index).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit(do_not_specialize=["num_tensors"])
def _square_sums_kernel(
    table_ptr,
    owners_ptr,
    extents_ptr,
    sums_ptr,
    num_tensors,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (chunks,). sums[chunk] = the sum of the chunk's squares, in float32; NaN and infinities reach it."""
    owner, start, size = chunk_of(owners_ptr, extents_ptr, num_tensors, CHUNK)
    ptr = address(table_ptr, owner, DTYPE, ALIGNED) + start
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    # Two loops: a mask would keep Triton from wide accesses.
    if size == CHUNK:
        for i in tl.static_range(0, CHUNK, BLOCK):
            x = tl.load(ptr + i + offs).to(tl.float32)
            acc += x * x
    else:
        for i in range(0, size, BLOCK):
            x = tl.load(ptr + i + offs, mask=i + offs < size, other=0.0).to(tl.float32)
            acc += x * x
    tl.store(sums_ptr + tl.program_id(0), tl.sum(acc))


class SquareSum:
    """Computes the sum of squares of many tensors on one GPU, the same to the bit for the same tensors.

    Reads every tensor once, in one launch for each dtype. Keeps the tables for the next call.
    """

    def __init__(self):
        self._launches: dict[tuple, tuple[Table, Chunks]] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sum of all squares, float32 of no dimension; 0 for no tensors.

        Args:
            tensors: bfloat16, float16 or float32, on one GPU, each with all its elements side by side in memory, in
                any order.
        """
        device = tensors[0].device
        if only_plans():
            plan_traffic(tensors, [])
            return tensors[0].new_empty((), dtype=torch.float32)
        groups: dict[tuple, list[tuple[int, int]]] = {}
        for tensor in tensors:
            ptr = tensor.data_ptr()
            groups.setdefault((tensor.dtype, is_aligned(ptr)), []).append((ptr, tensor.numel()))
        parts = [self._sums(key, members, device) for key, members in groups.items()]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).sum()

    def _sums(self, key: tuple[torch.dtype, bool], tensors: list[tuple[int, int]], device: torch.device) -> Tensor:
        table, chunks = self._launches.setdefault(key, (Table(), Chunks()))
        chunks.divide([size for _, size in tensors], device)
        sums_C = torch.empty(chunks.count, dtype=torch.float32, device=device)
        ptrs_N = table.on(device, [ptr for ptr, _ in tensors])
        launch(
            _square_sums_kernel,
            (chunks.count,),
            ptrs_N,
            chunks.owners_C,
            chunks.extents_2N,
            sums_C,
            len(tensors),
            DTYPE=TL_DTYPES[key[0]],
            ALIGNED=key[1],
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
        return sums_C
