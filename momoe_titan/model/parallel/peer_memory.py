"""Transfers between the GPUs of one host by their copy engines, which leave the multiprocessors to the kernels.

NCCL's kernels need multiprocessors, and a persistent kernel has all of them: the two then run one after the other, and
nothing is gained by starting a transfer early. On two H200s with 50 MB each way, a forward of an MoE layer takes
0.70 ms alone, 0.94 ms behind an all-gather by NCCL, and 0.98 ms beside it.

A rank writes what others are to have into a staging buffer that they can read (symmetric memory, mapped over NVLink),
meets them at a barrier, and reads theirs on a stream of its own.

    current stream      write to staging | barrier | kernels ......... | wait
    side stream                                    | read the others'  |

Why no rank reads a buffer before it is written: the barrier is behind the writes on the current stream of every rank,
and the side stream waits for it. Barriers release what was written before them to all ranks, and acquire it.

Why no rank writes to a buffer that another still reads. Buffers of a size are used in turn. The reads of a transfer are
over on a rank where its current stream has waited for them. All ranks start and await the same transfers in the same
order; so when this rank comes out of a barrier that is behind its own wait, the others have gone into it behind theirs,
and have read. `_Ring.next` refuses a buffer whose last transfer was not awaited before the last barrier. The count is
the host's, in the order in which it has started the work: that is the order on the device as long as everything runs
once. A CUDA graph runs again, behind work that the host did not know of when it captured the graph, and what follows a
replay cannot know which buffers that has used. Hence one barrier more, ahead of the first transfer: in a graph that of
the whole graph (`one_sequence`), for a replay begins when all that was started before has ended on this rank's current
stream, and so on every rank that comes to that barrier; anywhere else that of each layer.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _register_work, _SymmetricMemory
from torch.distributed import ProcessGroup
from torch.distributed._symmetric_memory import Work
from torchtitan.tools.logging import logger

from momoe_titan.kernels.outlet import OUTLETS, Blocks

RANKS_OF_A_HOST = 8  # where no launcher says how many: as the planner has it
_GRANULE = 2 * 2**20  # bytes
_SMALLEST = 16  # bytes of a buffer
_SIGNALS = 9216  # bytes that torch puts beside each, for barriers
_BUFFERS = 4  # of each size; a layer has up to three transfers under way
_peers: "dict[str, PeerCopies]" = {}  # by the group's name
_tried: set[str] = set()


class _Transfer(Work):
    """What `wait_tensor` waits for: the event of the side stream. Holds the tensors that are copied until then."""

    def __init__(self, copies: "PeerCopies", *tensors: torch.Tensor):
        super().__init__()
        self.copies, self.tensors = copies, tensors
        self.waited_after: int | None = None  # barriers that were passed by then

    def wait(self, *args: Any) -> bool:
        self.waited_after = self.copies.barriers
        self.tensors = ()
        return super().wait(*args)


@dataclass
class _Ring:
    """Staging buffers of one size.

    Attributes:
        buffers: for each, the buffers of all ranks.
        streams: on which they are read: those of others, and this rank's own. Small transfers wait for no large ones.
        users: the latest transfer of each.
    """

    buffers: list[list[torch.Tensor]]
    streams: tuple[torch.cuda.Stream, torch.cuda.Stream]
    users: list[_Transfer | None] = field(default_factory=lambda: [None] * _BUFFERS)
    turn: int = 0

    def next(self, barriers: int) -> int:
        """The buffer whose turn it is. So many barriers were passed: transfers that were waited for before the last of
        them are over on all ranks."""
        self.turn = (self.turn + 1) % _BUFFERS
        user = self.users[self.turn]
        if user is not None and (user.waited_after is None or user.waited_after >= barriers):
            raise RuntimeError(f"more than {_BUFFERS - 1} transfers between GPUs are under way")
        return self.turn


@dataclass
class _Staged:
    """What shares a staging buffer.

    Attributes:
        outs: tensors that are under way from now on.
        ring, turn: the buffer.
        arriving: rows of theirs, and where these are to be read.
        kept: rows of theirs that this rank has staged itself.
    """

    outs: list[torch.Tensor]
    ring: _Ring
    turn: int
    arriving: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    kept: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def buffers(self) -> list[torch.Tensor]:
        return self.ring.buffers[self.turn]


class PeerCopies:
    """Copies between the ranks of a group that are GPUs of one host.

    Attributes:
        device: of this rank.
        barriers: that the current stream has passed so far, or will have.
    """

    def __init__(self, group: ProcessGroup):
        self.group_name, self.rank, self.ranks = group.group_name, group.rank(), group.size()
        self.device = _device()
        self.barriers = 0
        self._rings: dict[int, _Ring] = {}
        self._handles: list[Any] = []
        self._memory: list[torch.Tensor] = []

    def try_out(self) -> None:
        """Raises RuntimeError where the GPUs cannot read each other's memory."""
        self._ring(_SMALLEST)

    def gather(self, rows: Sequence[torch.Tensor], first: bool) -> list[torch.Tensor]:
        """Starts to gather tensors from all ranks, (T, ...) -> (P T, ...). The layer's first transfer has to say so."""
        outs = [t.new_empty(self.ranks * t.shape[0], *t.shape[1:]) for t in rows]
        staged, offset = self._stage(outs, sum(t.nbytes for t in rows), first), 0
        for tensor, out in zip(rows, outs, strict=True):
            blocks, places = out.chunk(self.ranks), [_like(buffer[offset:], tensor) for buffer in staged.buffers]
            places[self.rank].copy_(tensor)
            staged.arriving += [(blocks[p], places[p]) for p in self._others()]
            # Not from the tensor, whose memory may be used again at once.
            staged.kept.append((blocks[self.rank], places[self.rank]))
            offset += tensor.nbytes
        self._start([staged])
        return outs

    def _others(self) -> list[int]:
        """The other ranks; each rank begins with another one."""
        return [(self.rank + step) % self.ranks for step in range(1, self.ranks)]

    def _stage(self, outs: list[torch.Tensor], num_bytes: int, first: bool = False) -> _Staged:
        """The next staging buffers of this size, of which this rank may write its own."""
        ring = self._ring(num_bytes)
        if first if _begun is None else self.group_name not in _begun:
            self._meet()
        if _begun is not None:
            _begun.add(self.group_name)
        return _Staged(outs, ring, ring.next(self.barriers))

    def _start(self, staged: list[_Staged]) -> None:
        """Behind one barrier, read for each of these what the others have staged."""
        self._meet()
        for s in staged:
            stream, beside = s.ring.streams
            stream.wait_stream(torch.cuda.current_stream())
            if s.kept:
                beside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(beside):
                    _copy_all(s.kept)
            with torch.cuda.stream(stream):
                _copy_all(s.arriving)
                if s.kept:
                    stream.wait_stream(beside)
                transfer = _Transfer(self, *s.outs)
            s.ring.users[s.turn] = transfer
            for out in s.outs:
                _register_work(out, transfer)

    def _meet(self) -> None:
        """Have the current streams of all ranks come here before any goes on."""
        self._handles[0].barrier()
        self.barriers += 1

    def _ring(self, num_bytes: int) -> _Ring:
        """The staging buffers of a size; all ranks come here the first time. Kept for CUDA graphs, which use them."""
        num_bytes = max(num_bytes, _SMALLEST)
        if num_bytes not in self._rings:
            buffers = []
            for _ in range(_BUFFERS):
                mine = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, self.device, self.group_name)
                handle = _SymmetricMemory.rendezvous(mine)
                buffers.append([handle.get_buffer(p, (num_bytes,), torch.uint8) for p in range(self.ranks)])
                self._handles.append(handle)
                self._memory.append(mine)
            self._rings[num_bytes] = _Ring(buffers, (torch.cuda.Stream(), torch.cuda.Stream()))
        return self._rings[num_bytes]


class BlocksToPeers:
    """Results in P blocks of equally many rows, of which block p is for rank p: an `outlet.Sending`.

    What comes from rank p arrives in block p, in place of what was for it.
    """

    def __init__(self, copies: PeerCopies):
        self._copies, self._staged = copies, []

    def stage(self, rows_MC: torch.Tensor) -> Blocks:
        copies = self._copies
        blocks, rank = rows_MC.chunk(copies.ranks), copies.rank
        num_rows, num_bytes = blocks[0].shape[0], blocks[0].nbytes
        staged, sent = copies._stage([rows_MC], num_bytes * (copies.ranks - 1)), []

        def place(of: int, holder: int) -> torch.Tensor:
            return _like(staged.buffers[holder][_place(of, holder) * num_bytes :], blocks[0])

        for p in copies._others():
            sent.append((p * num_rows, (p + 1) * num_rows, place(p, rank)))
            staged.arriving.append((blocks[p], place(rank, p)))
        self._staged.append(staged)
        return Blocks((rank * num_rows, (rank + 1) * num_rows), sent)

    def start(self) -> None:
        self._copies._start(self._staged)


_begun: set[str] | None = None  # the groups that have begun to exchange in the sequence


@contextlib.contextmanager
def one_sequence() -> Iterator[None]:
    """Around a capture: all transfers in the block follow each other in this order each time that they run, and only
    the first of a group begins with a barrier.

    They begin with the first buffer of each size, and what follows the block goes on as if there had been none: which
    buffers ranks use does not depend on how often each has captured.
    """
    global _begun
    turns = [(ring, ring.turn) for copies in _peers.values() for ring in copies._rings.values()]
    before, _begun = _begun, set()
    for ring, _ in turns:
        ring.turn = 0
    try:
        yield
    finally:
        _begun = before
        for ring, turn in turns:
            ring.turn = turn


def _copy_all(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for out, source in pairs:
        out.copy_(source)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _place(rank: int, holder: int) -> int:
    """Which block of `holder`'s staging buffer, which has none for itself, is for `rank`."""
    return rank - (rank > holder)


def _like(buffer: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The first bytes of a buffer, as rows of the same shape and dtype."""
    return buffer[: rows.nbytes].view(rows.dtype).view(rows.shape)


def connect(group: ProcessGroup) -> None:
    """Have `peers_of` give the group's copies, where its ranks are GPUs of one host that can read each other.

    To be called on all ranks.
    """
    if group.group_name in _tried or not _on_one_host(group):
        return
    _tried.add(group.group_name)
    reason = ""
    copies = PeerCopies(group)
    try:
        copies.try_out()
    except RuntimeError as error:  # of the driver, or a container that forbids it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    works = torch.tensor(not reason, dtype=torch.int32, device=copies.device)
    dist.all_reduce(works, dist.ReduceOp.MIN, group=group)
    if works:
        _peers[group.group_name] = copies
        OUTLETS[group.group_name] = functools.partial(BlocksToPeers, copies)
    else:
        logger.warning(
            "NCCL carries what these GPUs exchange, which takes longer than copies between them: they "
            f"cannot read each other's memory{reason and ': '}{reason}"
        )


def peers_of(group_name: str) -> PeerCopies | None:
    """What copies between the ranks of a group, or None: the collectives of the group are to be used."""
    return _peers.get(group_name)


def staging_bytes(sizes: Iterable[int]) -> int:
    """What the staging buffers of transfers of these sizes take of a GPU, beside PyTorch's memory."""
    return _BUFFERS * sum(map(whole_granules, {_SMALLEST, *sizes}))


def whole_granules(num_bytes: int) -> int:
    """What the driver gives for a buffer of so many bytes."""
    return -(-(num_bytes + _SIGNALS) // _GRANULE) * _GRANULE


def _on_one_host(group: ProcessGroup) -> bool:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0))
    if not torch.cuda.is_available() or "nccl" not in dist.get_backend_config(group):
        return False
    if not local or torch.cuda.device_count() < local:
        return False
    ranks = dist.get_process_group_ranks(group)
    devices = [rank % local for rank in ranks]
    return len({rank // local for rank in ranks}) == 1 and all(
        a == b or torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices
    )
