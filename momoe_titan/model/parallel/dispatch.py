"""Expert parallelism: each rank of a group owns E/P of the experts and works for the tokens of all.

A token goes once to each *rank* that owns experts it chose, whose weighted sum for the token comes
back as one row. Sending it once per *expert* costs K rows each way; once per rank, with choices
spread evenly over E = 128, costs 1.9 in place of 4 for P = 2 and K = 4, 5.3 in place of 8 for P = 8
and K = 8 (`fair_share`). What it takes beyond the token, its K expert ids and scores, is 8 K bytes
a row, against 2 D for the token in bfloat16. So it is done for any P and K.

    x_TD -> gather to x_ND, sorted by rank -> all-to-all -> x_MD -> the op, for this rank's experts
    out_TD <- sum over a token's rows <- y_ND <- all-to-all <- y_MD

The op takes received rows in the order of their arrival and gathers on the fly: nothing is padded
or permuted. The host waits for the device once per layer, to learn how many rows will come. The
collectives of a layer: counts (2 integers per pair of ranks), ids and scores, x; y. Of the backward:
dy; dx, and the gradient of the scores. What runs between `Dispatcher.send` and `Exchange.receive`,
the shared experts, overlaps with the all-to-all, and so does its backward.

With tensor parallelism, `expert_tensor_parallel_degree` 1 borrows its ranks: they own whole experts
too, and each sends the tokens of its part of the sequence. With the degree of tensor parallelism,
its ranks share each expert's hidden dimension, and all of them send all tokens, to the ranks that
have the same columns; what comes back is a share of the sum.

Letters: T a rank's own tokens, N rows it sends, M rows it receives, P ranks, E experts, K experts
chosen per token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from momoe_titan.kernels import (
    TokenGroups,
    count_slots,
    group_tokens,
    resolve_backend,
)

# Ops, so that activation checkpointing can keep what they return.
_lib = torch.library.Library("momoe_titan", "FRAGMENT")
_lib.define("exchange_counts(Tensor sent, str group_name) -> Tensor")
_lib.define("send_rows(Tensor rows, int[] received, int[] sent, str group_name) -> Tensor")


def _exchange_counts(sent_PC: torch.Tensor, group_name: str) -> torch.Tensor:
    """What this rank sends and what it receives, (2, P, C) on the host."""
    equal = [1] * sent_PC.shape[0]
    received_PC = torch.ops._c10d_functional.all_to_all_single(sent_PC, equal, equal, group_name)
    received_PC = torch.ops._c10d_functional.wait_tensor(received_PC)
    return torch.stack([sent_PC, received_PC]).cpu()


def _send_rows(rows: torch.Tensor, received: list[int], sent: list[int], group_name: str) -> torch.Tensor:
    """Starts an all-to-all of rows, sorted by rank; the result is there after `wait_tensor`."""
    return torch.ops._c10d_functional.all_to_all_single(rows, received, sent, group_name)


_lib.impl("exchange_counts", _exchange_counts, "CompositeExplicitAutograd")
_lib.impl("send_rows", _send_rows, "CompositeExplicitAutograd")


def fair_share(num_tokens: int, num_chosen: int, num_experts: int, num_ranks: int) -> tuple[int, int]:
    """(tokens, slots) that a rank sends each other one of T tokens that choose K of E experts, any K
    as likely as others: a token goes once to each rank that has one of its experts, which is to say
    to all but 1 in C(E, K) / C(E - E/P, K)."""
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


class Flight:
    """An all-to-all in two halves, so that other work can come between `depart` and `arrive`.

    In the backward the second half starts the way back, and the first half waits for it. For
    autograd an empty tensor stands for the rows under way, whose number is another on the way back.
    """

    def __init__(self, splits: Splits):
        self.splits = splits
        self.rows: torch.Tensor | None = None
        self._ticket: torch.Tensor | None = None

    def depart(self, rows_N: torch.Tensor) -> "Flight":
        self._ticket = _Depart.apply(rows_N, self)
        return self

    def arrive(self) -> torch.Tensor:
        # Kept on, the ticket's graph would hold this object, and this object the ticket.
        ticket, self._ticket = self._ticket, None
        return _Arrive.apply(ticket, self)

    def _start(self, rows: torch.Tensor, splits: Splits) -> torch.Tensor:
        self.rows = splits.start(rows)
        return rows.new_empty(0)

    def _wait(self) -> torch.Tensor:
        rows, self.rows = self.rows, None
        return torch.ops._c10d_functional.wait_tensor(rows)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_N: torch.Tensor, flight: Flight) -> torch.Tensor:
        ctx.flight = flight
        return flight._start(rows_N, flight.splits)

    @staticmethod
    def backward(ctx, dticket: torch.Tensor):
        return ctx.flight._wait(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ticket: torch.Tensor, flight: Flight) -> torch.Tensor:
        ctx.flight = flight
        return flight._wait()

    @staticmethod
    def backward(ctx, drows_M: torch.Tensor):
        flight = ctx.flight
        return flight._start(drows_M, flight.splits.reversed), None


class ReceivedChoice:
    """The experts of this rank that received rows chose.

    Attributes:
        ids_MK: int32, from the rank's first expert on: those of other ranks are below 0 or too high.
        scores_MK: float32.
        num_rows: how many (row, slot) pairs chose an expert of this rank.
    """

    # Not a dataclass: in one, FSDP would round the scores to the dtype of the parameters.
    def __init__(self, choice_MC: torch.Tensor, first_expert: int, num_rows: int):
        self.scores_MK, ids_MK = choice_MC.chunk(2, dim=1)
        self.ids_MK = ids_MK.detach().int() - first_expert
        self.num_rows = num_rows


class Exchange:
    """Tokens on their way to the ranks of their experts, and the way back. See `Dispatcher.send`."""

    def __init__(self, groups: TokenGroups, splits: Splits, x: Flight, choice: Flight, **received):
        self._groups = groups
        self._splits = splits
        self._x = x
        self._choice = choice
        self._received = received

    def receive(self) -> tuple[torch.Tensor, ReceivedChoice]:
        """x_MD and the choice of its rows, once they are there; to be called once."""
        return self._x.arrive(), ReceivedChoice(self._choice.arrive(), **self._received)

    def give_back(self, y_MD: torch.Tensor) -> torch.Tensor:
        """y_MD, a weighted sum over this rank's experts for each received row -> out_TD."""
        y_ND = Flight(self._splits.reversed).depart(y_MD).arrive()
        return self._groups.sum(y_ND)


class Dispatcher:
    """Sends tokens to the ranks of a group that own the experts they chose.

    Args:
        group: P ranks. Rank p owns the experts from p * E/P on.
        num_experts: E, a multiple of P.
        backend: of `momoe_mlp`.
    """

    def __init__(self, group: ProcessGroup, num_experts: int, backend: str):
        self.group = group
        self.num_experts = num_experts
        self.num_local_experts = num_experts // group.size()
        self.backend = backend

    def send(
        self,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor,
        scores_TK: torch.Tensor,
        make_room: Callable[[float, float, int], None] | None = None,
    ) -> tuple[Exchange, torch.Tensor]:
        """Start sending tokens; every rank of the group has to call it, be it with no tokens.

        Args:
            x_TD, ids_TK, scores_TK: of `momoe_mlp`, ids among all E experts. Scores are sent in
                float32.
            make_room: called before any rows are allocated, with the tokens (M) and the slots (R)
                that this rank receives, relative to the `fair_share`, and the bytes beyond it of
                the tokens (N) that it sends.

        Returns:
            The exchange, and the tokens per expert, int64 (E), of this rank's tokens alone.
        """
        backend = resolve_backend(self.backend, x_TD.device)
        counts_E = count_slots(ids_TK, self.num_experts, backend)
        groups = group_tokens(ids_TK // self.num_local_experts, self.group.size(), backend)
        slots_P = counts_E.view(-1, self.num_local_experts).sum(dim=1)
        exchanged_2PC = torch.ops.momoe_titan.exchange_counts(
            torch.stack([groups.counts_G, slots_P], dim=1), self.group.group_name
        )
        sent_PC, received_PC = exchanged_2PC.tolist()  # (tokens, slots) for and from each rank
        splits = Splits(
            [tokens for tokens, _ in sent_PC],
            [tokens for tokens, _ in received_PC],
            self.group.group_name,
        )
        num_sent = sum(splits.sent)
        num_rows = sum(slots for _, slots in received_PC)
        if make_room is not None:
            ranks = self.group.size()
            fair = fair_share(*ids_TK.shape, self.num_experts, ranks)
            tokens, slots = (max(1, ranks * n) for n in fair)
            row_bytes = x_TD.shape[1] * x_TD.element_size()
            make_room(sum(splits.received) / tokens, num_rows / slots, (num_sent - tokens) * row_bytes)
        # float32 holds ids up to 2^24
        choice_TC = torch.cat([scores_TK.float(), ids_TK.float()], dim=1)
        exchange = Exchange(
            groups,
            splits,
            choice=Flight(splits).depart(groups.gather(choice_TC, num_sent)),
            x=Flight(splits).depart(groups.gather(x_TD, num_sent)),
            first_expert=self.group.rank() * self.num_local_experts,
            num_rows=num_rows,
        )
        return exchange, counts_E
