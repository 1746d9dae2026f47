"""FSDP's collectives between GPUs of one host by their copy engines, which leave the multiprocessors to the kernels.

FSDP has a place for both, `FSDPModule.set_custom_all_gather` and `set_custom_reduce_scatter`, and asks each for the
buffers that it fills. Here these are symmetric memory, which the other ranks can read over NVLink: the ranks meet at a
barrier when their buffers are filled, and each reads what it needs.

A buffer may be filled again when all others have read it. They have when this rank comes out of the next barrier of
the same kind, which they enter after they have read. Buffers of a size are therefore used in turn. FSDP fills a buffer
after it has used what came by the transfer before (gradients), or by the one before that (weights, of which it gathers
one group in advance): two buffers and three. Between the last transfer of a CUDA graph and the first of the next one,
which may be of the same buffer, the ranks meet in transfers of the other kind, or in the reduction of the norm.
"""

import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

from momoe_titan.kernels.sum_parts import sum_parts
from momoe_titan.model.parallel.peer_memory import whole_granules

GATHER_BUFFERS, REDUCE_BUFFERS = 3, 2  # of each size


def buffers_bytes(sizes: Iterable[int]) -> int:
    """Bytes of all buffers for groups of weights of these sizes, in bytes."""
    return (GATHER_BUFFERS + REDUCE_BUFFERS) * sum(map(whole_granules, set(sizes)))


class _Rings:
    """Buffers that the ranks of a group can read of each other, in turn for each size. Kept for CUDA graphs."""

    def __init__(self, group: dist.ProcessGroup, count: int):
        self.group, self.count = group, count
        self._buffers: dict[int, list[tuple[Tensor, Any]]] = {}
        self._used: dict[int, int] = {}  # how often a size was asked for
        self._users: dict[int, tuple[weakref.ref, Any]] = {}  # by address: what was given out, and its handle

    def next(self, num_bytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer whose turn it is. All ranks come here the first time."""
        if num_bytes not in self._buffers:
            memory = [symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(self.count)]
            handles = [symmetric_memory.rendezvous(m, self.group.group_name) for m in memory]
            self._buffers[num_bytes] = list(zip(memory, handles, strict=True))
        turn = self._used.get(num_bytes, 0)
        self._used[num_bytes] = turn + 1
        memory, handle = self._buffers[num_bytes][turn % self.count]
        before = self._users.get(memory.data_ptr())
        if before is not None and before[0]() is not None:
            raise RuntimeError(f"more than {self.count} of FSDP's buffers of {num_bytes} bytes are in use")
        given = memory.view(dtype)
        self._users[memory.data_ptr()] = weakref.ref(given), handle
        return given

    def handle(self, buffer: Tensor) -> Any:
        return self._users[buffer.data_ptr()][1]


class PeerAllGather:
    """An all-gather for FSDP. The ranks of `group` are GPUs of one host that can read each other."""

    def __init__(self, group: dist.ProcessGroup):
        self._rings = _Rings(group, GATHER_BUFFERS)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._rings.next(math.prod(size) * dtype.itemsize, dtype, device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Every rank has filled its own part of the output, which is `input_tensor`."""
        handle, ranks, rank = self._rings.handle(output_tensor), group.size(), group.rank()
        parts = output_tensor.chunk(ranks)
        handle.barrier()
        for step in range(1, ranks):
            p = (rank + step) % ranks
            parts[p].copy_(handle.get_buffer(p, parts[p].shape, parts[p].dtype, p * parts[p].numel()))


class PeerReduceScatter:
    """A reduce-scatter for FSDP: see `reduce_scatter.NarrowReduceScatter`, whose sums it has.

    Args:
        group: its ranks are GPUs of one host that can read each other.
        dtype: of the gradients.
    """

    def __init__(self, group: dist.ProcessGroup, dtype: torch.dtype):
        self.dtype = dtype
        self._rings = _Rings(group, REDUCE_BUFFERS)
        self._input_is_next = True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks for the input of a reduction and then for its output, both float32."""
        is_input, self._input_is_next = self._input_is_next, not self._input_is_next
        if is_input:
            return self._rings.next(math.prod(size) * self.dtype.itemsize, self.dtype, device)
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        handle, ranks, rank = self._rings.handle(input_tensor), group.size(), group.rank()
        received = torch.empty_like(input_tensor).view(ranks, -1)
        handle.barrier()
        for step in range(1, ranks):
            p = (rank + step) % ranks
            received[p].copy_(handle.get_buffer(p, received[p].shape, self.dtype, rank * received[p].numel()))
        sum_parts(output_tensor, received, own=(rank, input_tensor.view(ranks, -1)[rank]))
