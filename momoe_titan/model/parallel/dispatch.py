"""Expert parallelism: sends tokens to the ranks that own their experts, and the results back.

A token goes once to each *rank* that owns experts it chose. That rank's weighted sum for the token comes back
as one row. Sending it once per *expert* would cost K rows each way. Once per rank costs 1.9 in place of 4 with
P = 2 and K = 4, and 5.3 in place of 8 with P = 8 and K = 8, where E = 128 experts are chosen evenly
(`fair_share`). The token's K expert ids and scores travel with it, 8 K bytes beside the 2 D of a token in
bfloat16. This pays off for any P and K.

    x_TD -> gather to x_ND, sorted by rank -> all-to-all -> x_MD -> the op, for this rank's experts
    out_TD <- sum over a token's rows <- y_ND <- all-to-all <- y_MD

The op takes received rows in the order of their arrival and gathers on the fly: nothing is padded or permuted.
The host waits for the device once per layer, to learn how many rows will come. The collectives of a layer:
sizes (2 integers per pair of ranks), ids and scores, x; y. Of the backward: dy; dx, and the gradient of the
scores. What runs between `Dispatcher.dispatch` and `Exchange.receive`, the shared experts, overlaps with the
all-to-all, and so does its backward.

With tensor parallelism there are two ways. With `expert_tensor_parallel_degree` 1 its ranks own whole experts
too, and each sends the tokens of its part of the sequence. With the degree of tensor parallelism its ranks
split each expert's hidden dimension: all of them send all tokens, each to the ranks that have the same
columns, and what comes back is a partial sum.

Letters: T a rank's own tokens, N rows it sends, M rows it receives, P ranks, E experts, K experts
chosen per token.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from momoe_titan.kernels import TokenGroups, count_slots, group_tokens, resolve_backend

Sizes = list[list[int]]  # (tokens, slots) for each rank of the group

# Ops, so that activation checkpointing can keep what they return.
_lib = torch.library.Library("momoe_titan", "FRAGMENT")
_lib.define("exchange_counts(Tensor sent, str group_name) -> Tensor")
_lib.define("send_rows(Tensor rows, int[] received, int[] sent, str group_name) -> Tensor")


def _exchange_counts(sent_PC: torch.Tensor, group_name: str) -> torch.Tensor:
    """The numbers of rows that this rank sends and receives, (2, P, C) on the host."""
    equal = [1] * sent_PC.shape[0]
    received_PC = torch.ops._c10d_functional.all_to_all_single(sent_PC, equal, equal, group_name)
    received_PC = torch.ops._c10d_functional.wait_tensor(received_PC)
    return torch.stack([sent_PC, received_PC]).cpu()


def _send_rows(rows: torch.Tensor, received: list[int], sent: list[int], group_name: str) -> torch.Tensor:
    """Starts an all-to-all of rows, sorted by rank; the result is there after `wait_tensor`."""
    return torch.ops._c10d_functional.all_to_all_single(rows, received, sent, group_name)


_lib.impl("exchange_counts", _exchange_counts, "CompositeExplicitAutograd")
_lib.impl("send_rows", _send_rows, "CompositeExplicitAutograd")


class SizesExchange(Protocol):
    """Exchanges between the ranks of a group how many rows each is about to send."""

    def __call__(self, sent_P2: torch.Tensor, num_tokens: int, num_chosen: int) -> tuple[Sizes, Sizes]:
        """What this rank sends to each rank, and what it receives from each.

        Args:
            sent_P2: int64, (tokens, slots) for each rank.
            num_tokens, num_chosen: T and K of this rank.
        """
        ...


def exchange_sizes_over(
    group: ProcessGroup, sent_P2: torch.Tensor, num_tokens: int, num_chosen: int
) -> tuple[Sizes, Sizes]:
    """`SizesExchange` by an all-to-all of the group, for whose result the host waits."""
    sent, received = torch.ops.momoe_titan.exchange_counts(sent_P2, group.group_name).tolist()
    return sent, received


def fair_share(num_tokens: int, num_chosen: int, num_experts: int, num_ranks: int) -> tuple[int, int]:
    """(tokens, slots) that a rank sends to each rank where any K experts are as likely as others.

    A token goes once to each rank that owns one of its K experts. All K of its experts are elsewhere in
    C(E - E/P, K) of C(E, K) cases.
    """
    elsewhere = num_experts - num_experts // num_ranks
    missed = math.comb(elsewhere, num_chosen) / math.comb(num_experts, num_chosen)
    return round(num_tokens * (1 - missed)), num_tokens * num_chosen // num_ranks


@dataclass(frozen=True)
class Splits:
    """How many rows a rank exchanges with each of its group."""

    sent: list[int]
    received: list[int]
    group_name: str

    @property
    def reversed(self) -> "Splits":
        return Splits(self.received, self.sent, self.group_name)

    def start(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.ops.momoe_titan.send_rows(rows.contiguous(), self.received, self.sent, self.group_name)


class AsyncAllToAll:
    """An all-to-all in two halves, so that other work can come between `start` and `wait`.

    In the backward `wait` starts the way back, and `start` waits for it. For autograd an empty tensor, the
    handle, stands for the rows under way, whose number is another on the way back.
    """

    def __init__(self, splits: Splits):
        self.splits = splits
        self._rows: torch.Tensor | None = None
        self._handle: torch.Tensor | None = None

    def start(self, rows_N: torch.Tensor) -> "AsyncAllToAll":
        self._handle = _Start.apply(rows_N, self)
        return self

    def wait(self) -> torch.Tensor:
        # Forgotten here: the handle's graph holds this object, which would hold the handle.
        handle, self._handle = self._handle, None
        return _Wait.apply(handle, self)

    def _send(self, rows: torch.Tensor, splits: Splits) -> torch.Tensor:
        self._rows = splits.start(rows)
        return rows.new_empty(0)

    def _receive(self) -> torch.Tensor:
        rows, self._rows = self._rows, None
        return torch.ops._c10d_functional.wait_tensor(rows)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_N: torch.Tensor, exchange: AsyncAllToAll) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange._send(rows_N, exchange.splits)

    @staticmethod
    def backward(ctx, dhandle: torch.Tensor):
        return ctx.exchange._receive(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, handle: torch.Tensor, exchange: AsyncAllToAll) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange._receive()

    @staticmethod
    def backward(ctx, drows_M: torch.Tensor):
        exchange = ctx.exchange
        return exchange._send(drows_M, exchange.splits.reversed), None


class ReceivedChoice:
    """Which of this rank's experts the received rows chose.

    Attributes:
        ids_MK: int32, counted from the rank's first expert: those of other ranks are below 0 or too high.
        scores_MK: float32.
        num_rows: how many (row, slot) pairs chose an expert of this rank, at most.
        usual_rows: how many do where experts are chosen evenly, if num_rows is far more than usual.
        outlet: of `momoe_mlp`.
    """

    # Not a dataclass: in one, FSDP would round the scores to the dtype of the parameters.
    def __init__(
        self,
        scores_MK: torch.Tensor,
        ids_MK: torch.Tensor,
        first_expert: int,
        num_rows: int,
        usual_rows: int | None = None,
        outlet: str = "",
    ):
        self.scores_MK = scores_MK
        self.ids_MK = ids_MK.int() - first_expert
        self.num_rows = num_rows
        self.usual_rows = usual_rows
        self.outlet = outlet


class Exchange:
    """Tokens that are being sent to the ranks of their experts, and their way back. See `Dispatcher.dispatch`."""

    def __init__(self, groups: TokenGroups, splits: Splits, x: AsyncAllToAll, choice: AsyncAllToAll, **received):
        self._groups = groups
        self._splits = splits
        self._x = x
        self._choice = choice
        self._received = received

    def receive(self) -> tuple[torch.Tensor, ReceivedChoice]:
        """x_MD and the choice of its rows, once they are there; to be called once."""
        x_MD = self._x.wait()
        scores_MK, ids_MK = self._choice.wait().chunk(2, dim=1)
        return x_MD, ReceivedChoice(scores_MK, ids_MK.detach(), **self._received)

    def combine(self, y_MD: torch.Tensor) -> torch.Tensor:
        """y_MD, a weighted sum over this rank's experts for each received row -> out_TD."""
        y_ND = AsyncAllToAll(self._splits.reversed).start(y_MD).wait()
        return self._groups.sum(y_ND)


class Dispatcher:
    """Sends tokens to the ranks of a group that own the experts they chose.

    Args:
        group: P ranks. Rank p owns the experts from p * E/P on.
        num_experts: E, a multiple of P.
        backend: of `momoe_mlp`.

    Attributes:
        exchange_sizes: how ranks learn what they will receive. May be replaced, by what knows it otherwise.
    """

    def __init__(self, group: ProcessGroup, num_experts: int, backend: str):
        self.group = group
        self.num_experts = num_experts
        self.num_local_experts = num_experts // group.size()
        self.backend = backend
        self.exchange_sizes: SizesExchange = functools.partial(exchange_sizes_over, group)

    def dispatch(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        scores_TK: torch.Tensor,
        reserve: Callable[[float, float, int], None] | None = None,
    ) -> tuple[Exchange, torch.Tensor]:
        """Start sending tokens; every rank of the group has to call it, be it with no tokens.

        Args:
            x_TD, ids_TK, scores_TK: of `momoe_mlp`, ids among all E experts. Scores are sent in
                float32.
            reserve: called before any rows are allocated, with three numbers: the tokens (M) and the slots (R)
                that this rank receives, both relative to the `fair_share`; and by how many bytes the tokens (N)
                that it sends exceed theirs.

        Returns:
            The exchange, and the tokens per expert, int64 (E), of this rank's tokens alone.
        """
        backend = resolve_backend(self.backend, x_TD.device)
        ranks = self.group.size()
        counts_E = count_slots(ids_TK, self.num_experts, backend)
        groups = group_tokens(ids_TK // self.num_local_experts, ranks, backend)
        slots_P = counts_E.view(-1, self.num_local_experts).sum(dim=1)
        sent_P2, received_P2 = self.exchange_sizes(torch.stack([groups.counts_G, slots_P], dim=1), *ids_TK.shape)
        splits = Splits(
            [tokens for tokens, _ in sent_P2],
            [tokens for tokens, _ in received_P2],
            self.group.group_name,
        )
        num_sent = sum(splits.sent)
        num_rows = sum(slots for _, slots in received_P2)
        if reserve is not None:
            num_tokens, num_chosen = ids_TK.shape
            fair = fair_share(num_tokens, num_chosen, self.num_experts, ranks)
            tokens, slots = (max(1, ranks * n) for n in fair)
            row_bytes = x_TD.shape[1] * x_TD.element_size()
            reserve(sum(splits.received) / tokens, num_rows / slots, (num_sent - tokens) * row_bytes)
        # float32 holds ids up to 2^24
        choice_TC = torch.cat([scores_TK.float(), ids_TK.float()], dim=1)
        exchange = Exchange(
            groups,
            splits,
            choice=AsyncAllToAll(splits).start(groups.gather(choice_TC, num_sent)),
            x=AsyncAllToAll(splits).start(groups.gather(x_TD, num_sent)),
            first_expert=self.group.rank() * self.num_local_experts,
            num_rows=num_rows,
        )
        return exchange, counts_E
