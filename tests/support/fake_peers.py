"""GPUs of one host that read each other's memory, played by processes on gloo that share some.

What a GPU reads on its side stream is read here as late as it may be: when it is waited for. A rank that wrote to a
staging buffer too early would change what the others get. A GPU may also read at once, which is refused here unless
the stream has waited for the barrier behind which the others have written.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from momoe_titan.kernels import outlet
from momoe_titan.model.parallel import peer_memory

BYTES = 1 << 20  # that a rank can share


class CurrentStream:
    """What runs at once.

    Attributes:
        barriers: that it has passed.
    """

    barriers = 0

    def barrier(self) -> None:
        dist.barrier()
        self.barriers += 1


CURRENT = CurrentStream()


class SideStream(TorchDispatchMode):
    """Keeps copies for later."""

    def __init__(self):
        super().__init__()
        self.kept: list[tuple[Any, tuple]] = []
        self.waited_for = -1  # barriers

    def wait_stream(self, stream: Any) -> None:
        if stream is CURRENT:
            self.waited_for = CURRENT.barriers
        else:
            self.kept += stream.kept
            stream.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            assert self.waited_for == CURRENT.barriers, "reads before the others have written"
            self.kept.append((func, args))
            return args[0]
        return func(*args, **(kwargs or {}))


def _keep(work) -> None:
    dist.distributed_c10d.Work.__init__(work)
    stream: Any = _get_current_dispatch_mode()
    work.kept, stream.kept = stream.kept, []


def _read(work, *_) -> bool:
    for func, args in work.kept:
        # On a GPU the host has started the copy long ago: it changes no version that autograd has noted since.
        with _unsafe_preserve_version_counter(args[0]):
            func(*args)
    work.kept = []
    return True


@dataclass(eq=False)
class Memory:
    """What a rank shares from a place on, as long as it holds this."""

    begin: int


class FakePeers:
    """The memory that some processes share; to be made before they fork."""

    def __init__(self, ranks: int):
        self.memory = torch.zeros(ranks, BYTES, dtype=torch.uint8).share_memory_()
        self.used = 0

    def empty_strided_p2p(self, shape, stride, dtype, device, group_name) -> Memory:
        begin, self.used = self.used, self.used + (shape[0] + 63) // 64 * 64
        assert self.used <= BYTES
        return Memory(begin)

    def rendezvous(self, mine: Memory) -> SimpleNamespace:
        begin, kept = mine.begin, weakref.ref(mine)

        def get_buffer(rank, shape, dtype):
            return self.memory[rank, begin : begin + shape[0]]

        def barrier():
            assert kept() is not None, "the memory is gone"
            CURRENT.barrier()

        return SimpleNamespace(get_buffer=get_buffer, barrier=barrier)

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """The ranks of every group that is connected inside can read each other, all of them."""
        self.used = 0
        patched: list[Any] = [
            mock.patch.object(peer_memory, "_on_one_host", lambda group: True),
            mock.patch.object(peer_memory, "_device", lambda: torch.device("cpu")),
            mock.patch.object(peer_memory, "_SymmetricMemory", self),
            mock.patch.object(symmetric_memory.Work, "__init__", _keep),
            mock.patch.object(symmetric_memory.Work, "wait", _read),
            mock.patch.object(torch.cuda, "Stream", SideStream),
            mock.patch.object(torch.cuda, "stream", lambda stream: stream),
            mock.patch.object(torch.cuda, "current_stream", lambda: CURRENT),
        ]
        with contextlib.ExitStack() as stack:
            for patch in patched:
                stack.enter_context(patch)
            try:
                yield
            finally:
                for table in (peer_memory._peers, peer_memory._tried, outlet.OUTLETS):
                    table.clear()
