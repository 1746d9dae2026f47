"""Expert parallelism in which every rank of a group gets the tokens of all ranks, and the host waits for nothing.

Where a token chooses several experts and there are few ranks, almost every token has an expert on every rank:
99.8% of them with 2 ranks and 8 of 128 experts. Sending all tokens to all ranks costs next to nothing more than
`dispatch.Dispatcher` does, and all sizes are then known in advance.

    x_TD    -> all-gather -> x_MD -> the op, for this rank's experts -> y_MD
    out_TD  <- sum over the ranks <- all-to-all, a block of T rows for each rank  <- y_MD

What the backward sends is the same: it gathers the gradient of out, and sends blocks of the gradients of x and of the
scores. A rank allocates for the most rows that could choose its experts, `P` times its even share, because the host
does not know how many do. The kernels work on the rows that there are. Saved pre-activations are bounded by the even
share: rows beyond it are computed again in the backward, so that what is kept until the backward does not depend on
the routing.

The ops below start a transfer and return its result before it has arrived, as torch's functional collectives do.
Between start and arrival: the router runs while x is gathered, the shared experts run while results come back, and in
the backward the shared experts' while the gradient of out is gathered and the router's while that of x comes back. A
tensor under way is touched by nothing but `_Arrived` and `sum_tokens`, which wait for it.

Between the GPUs of one host, the op of the experts sends by itself (`outlet`): it combines the rows of other ranks
first, straight into the buffers that these read, and those of its own while the others' are under way. In the backward
so do the gradients of x and of the scores, and the gradient of w1 is computed while both are under way.

Letters: T a rank's own tokens, P ranks, M = P T, E experts, K experts chosen per token, C any width.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims

from momoe_titan.config.flavor import configured_args
from momoe_titan.config.section import ALL_RANKS, Momoe
from momoe_titan.kernels import count_slots, resolve_backend
from momoe_titan.model.parallel.dispatch import ReceivedChoice, fair_share
from momoe_titan.model.parallel.peer_memory import RANKS_OF_A_HOST, connect, peers_of, staging_bytes

# The most rows that are sent per row that a rank needs; beyond it `Dispatcher` sends fewer.
MOST_SENT = 1.3

_lib = torch.library.Library("momoe_titan", "FRAGMENT")
_lib.define("gather_tokens(Tensor rows, int rank, int ranks, str group_name, bool first=False) -> Tensor")
_lib.define(
    "gather_choice(Tensor scores, Tensor ids, Tensor behind, int rank, int ranks, str group_name)"
    " -> (Tensor scores, Tensor ids)"
)
_lib.define("send_blocks(Tensor rows, int ranks, str group_name) -> Tensor")
_lib.define("sum_tokens(Tensor rows, int rank, int ranks, str group_name) -> Tensor")
_lib.define("count_chosen(Tensor ids, int num_experts, str backend) -> Tensor")
_collectives = torch.ops._c10d_functional


def _gather_tokens(rows_TC: torch.Tensor, rank: int, ranks: int, group_name: str, first: bool = False) -> torch.Tensor:
    """Starts to gather the rows of all ranks, (M, C) with those of rank 0 first. The input may be freed at once."""
    if (peers := peers_of(group_name)) is not None:
        return peers.gather([rows_TC], first)[0]
    num_tokens = rows_TC.shape[0]
    gathered_MC = rows_TC.new_empty(ranks * num_tokens, *rows_TC.shape[1:])
    own_TC = gathered_MC.narrow(0, rank * num_tokens, num_tokens)
    own_TC.copy_(rows_TC)
    return _collectives.all_gather_into_tensor_out(own_TC, ranks, group_name, out=gathered_MC)


def _gather_choice(
    scores_TK: torch.Tensor, ids_TK: torch.Tensor, behind: torch.Tensor, rank: int, ranks: int, group_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts to gather scores and chosen experts of all ranks, float32 and int32, both (M, K).

    Args:
        behind: what the gather of x, the layer's first transfer, has returned; else a compiler might exchange the two.
    """
    rows = scores_TK.float(), ids_TK.int()
    if (peers := peers_of(group_name)) is not None:
        scores_MK, ids_MK = peers.gather(rows, first=False)
    else:
        scores_MK, ids_MK = (_gather_tokens(t, rank, ranks, group_name) for t in rows)
    return scores_MK, ids_MK


def _send_blocks(rows_MC: torch.Tensor, ranks: int, group_name: str) -> torch.Tensor:
    """Starts to send block p of T rows to rank p; block p of the result, (M, C), comes from rank p."""
    even = [rows_MC.shape[0] // ranks] * ranks
    return _collectives.all_to_all_single(rows_MC, even, even, group_name)


def _sum_tokens(rows_MC: torch.Tensor, rank: int, ranks: int, group_name: str) -> torch.Tensor:
    """Waits for blocks that are under way; (T, C): their sum, in float32 inside."""
    blocks = _collectives.wait_tensor(rows_MC).unflatten(0, (ranks, -1))
    # Two are added by a kernel that is three times as fast, with the same result.
    return blocks[0] + blocks[1] if ranks == 2 else blocks.sum(dim=0)


def _count_chosen(ids_TK: torch.Tensor, num_experts: int, backend: str) -> torch.Tensor:
    return count_slots(ids_TK, num_experts, backend)


for _name, _body in (
    ("gather_tokens", _gather_tokens),
    ("gather_choice", _gather_choice),
    ("send_blocks", _send_blocks),
    ("sum_tokens", _sum_tokens),
    ("count_chosen", _count_chosen),
):
    _lib.impl(_name, _body, "CompositeExplicitAutograd")


@torch.library.register_fake("momoe_titan::gather_tokens", lib=_lib)
def _(rows_TC, rank, ranks, group_name, first=False):
    return rows_TC.new_empty(ranks * rows_TC.shape[0], *rows_TC.shape[1:])


@torch.library.register_fake("momoe_titan::gather_choice", lib=_lib)
def _(scores_TK, ids_TK, behind, rank, ranks, group_name):
    shape = ranks * ids_TK.shape[0], ids_TK.shape[1]
    return scores_TK.new_empty(shape, dtype=torch.float32), ids_TK.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("momoe_titan::send_blocks", lib=_lib)
def _(rows_MC, ranks, group_name):
    return torch.empty_like(rows_MC)


@torch.library.register_fake("momoe_titan::sum_tokens", lib=_lib)
def _(rows_MC, rank, ranks, group_name):
    return rows_MC.new_empty(rows_MC.shape[0] // ranks, *rows_MC.shape[1:])


@torch.library.register_fake("momoe_titan::count_chosen", lib=_lib)
def _(ids_TK, num_experts, backend):
    return ids_TK.new_empty(num_experts, dtype=torch.int64)


def _keep_ranks(ctx, inputs, output):
    _, *ctx.ranks = inputs[:4]


# The gradient of what is under way is itself under way.
def _gather_backward(ctx, drows_MC):
    return torch.ops.momoe_titan.sum_tokens(drows_MC, *ctx.ranks), None, None, None, None


def _sum_backward(ctx, drows_TC):
    return torch.ops.momoe_titan.gather_tokens(drows_TC.contiguous(), *ctx.ranks), None, None, None


def _keep_ranks_of_choice(ctx, inputs, output):
    _, _, _, *ctx.ranks = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.dtype = inputs[0].dtype


def _gather_choice_backward(ctx, dscores_MK, _):
    return torch.ops.momoe_titan.sum_tokens(dscores_MK, *ctx.ranks).to(ctx.dtype), None, None, None, None, None


torch.library.register_autograd(
    "momoe_titan::gather_choice", _gather_choice_backward, setup_context=_keep_ranks_of_choice, lib=_lib
)
torch.library.register_autograd("momoe_titan::gather_tokens", _gather_backward, setup_context=_keep_ranks, lib=_lib)
torch.library.register_autograd("momoe_titan::sum_tokens", _sum_backward, setup_context=_keep_ranks, lib=_lib)


class _Arrived(torch.autograd.Function):
    """Rows that were gathered, once they are there. The backward starts to send their gradients home, unless the op
    that has computed these has done so."""

    @staticmethod
    def forward(ctx, rows, ranks, group_name, sent):
        ctx.ranks, ctx.sent = (ranks, group_name), sent
        return _collectives.wait_tensor(rows)

    @staticmethod
    def backward(ctx, drows):
        if not ctx.sent:
            drows = torch.ops.momoe_titan.send_blocks(drows.contiguous(), *ctx.ranks)
        return drows, None, None, None


class _SentHome(torch.autograd.Function):
    """Results on their way to the ranks of their tokens. The backward waits for their gradients."""

    @staticmethod
    def forward(ctx, rows_MC, ranks, group_name, sent):
        if sent:
            return rows_MC.view_as(rows_MC)
        return torch.ops.momoe_titan.send_blocks(rows_MC.contiguous(), ranks, group_name)

    @staticmethod
    def backward(ctx, drows_MC):
        return _collectives.wait_tensor(drows_MC), None, None, None


def gathers_tokens(dispatch: str, num_ranks: int, num_chosen: int, num_experts: int) -> bool:
    """Whether every rank gets all tokens, by `momoe.expert_dispatch`.

    "auto" says so where it costs at most `MOST_SENT` times what the ranks need that evenly chosen experts are on.
    """
    if dispatch != "auto":
        return dispatch == ALL_RANKS
    needed, _ = fair_share(10**6, num_chosen, num_experts, num_ranks)
    return MOST_SENT * needed >= 10**6


def job_gathers_tokens(config: JobConfig) -> bool:
    """`gathers_tokens` of a job with expert parallelism by our dispatch."""
    args, ranks = configured_args(config), config.parallelism.expert_parallel_degree
    dispatch = getattr(config, "momoe", Momoe()).expert_dispatch
    return gathers_tokens(dispatch, ranks, args.moe_args.top_k, args.moe_args.num_experts)


def staging_of_job(config: JobConfig, dims: ParallelDims) -> int:
    """Bytes of a GPU, beside PyTorch's memory, in which the training batches of a job with a model of ours are staged:
    0 where ranks of expert parallelism are on several hosts, or no tokens are gathered."""
    ranks = config.parallelism.expert_parallel_degree
    if ranks == 1 or not job_gathers_tokens(config):
        return 0
    host = int(os.environ.get("LOCAL_WORLD_SIZE", RANKS_OF_A_HOST))
    if len({rank // host for rank in dist.get_process_group_ranks(dims.get_mesh("ep").get_group())}) > 1:
        return 0
    args, training = configured_args(config), config.training
    narrow = TORCH_DTYPE_MAP[training.mixed_precision_param].itemsize
    divided = dims.cp * (1 if dims.etp_enabled else dims.tp)  # a sequence, among ranks that send their own part
    tokens = training.local_batch_size * training.seq_len // divided
    return staging_bytes(transfer_sizes(tokens, args.dim * narrow, args.moe_args.top_k, ranks))


def transfer_sizes(num_tokens: int, row_bytes: int, num_chosen: int, ranks: int) -> list[int]:
    """Bytes of what a rank stages in a layer: x; results and gradients of x; scores and ids; gradients of scores.

    Args:
        num_tokens, num_chosen: T and K.
        row_bytes: of a row of x.
    """
    rows, numbers = num_tokens * row_bytes, num_tokens * num_chosen * 4
    return [rows, rows * (ranks - 1), 2 * numbers, numbers * (ranks - 1)]


class TokenGatherer:
    """Gathers the tokens of all ranks of a group, and sends results home.

    Args:
        group: P ranks, with equally many tokens each. Rank p owns the experts from p * E/P on.
        num_experts: E, a multiple of P.
        backend: of `momoe_mlp`.

    Attributes:
        outlet: of `momoe_mlp`, by which it sends its results; "" where the ranks are no GPUs that read each other.
    """

    def __init__(self, group: ProcessGroup, num_experts: int, backend: str):
        self.rank, self.ranks, self.group_name = group.rank(), group.size(), group.group_name
        connect(group)
        self.outlet = "" if peers_of(group.group_name) is None else group.group_name
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.ranks
        self.backend = backend

    def gather(self, x_TD: torch.Tensor) -> torch.Tensor:
        """x_TD -> x_MD, under way: for `gather_choice` and `receive`."""
        return torch.ops.momoe_titan.gather_tokens(x_TD.contiguous(), *self._ranks, True)

    def gather_choice(
        self, ids_TK: torch.Tensor, scores_TK: torch.Tensor, x_MD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen experts and scores -> scores float32, ids int32, both (M, K), under way: for `receive`."""
        choice = scores_TK.contiguous(), ids_TK.contiguous()
        return torch.ops.momoe_titan.gather_choice(*choice, x_MD.detach(), *self._ranks)

    @property
    def _ranks(self) -> tuple[int, int, str]:
        return self.rank, self.ranks, self.group_name

    def count_chosen(self, ids_TK: torch.Tensor) -> torch.Tensor:
        """The tokens per expert, int64 (E), of this rank's tokens alone."""
        backend = resolve_backend(self.backend, ids_TK.device)
        return torch.ops.momoe_titan.count_chosen(ids_TK, self.num_experts, backend)

    def receive(
        self, x_MD: torch.Tensor, scores_MK: torch.Tensor, ids_MK: torch.Tensor
    ) -> tuple[torch.Tensor, ReceivedChoice]:
        """What is under way, once it is there: x_MD, and which of this rank's experts its rows chose."""
        how = self.ranks, self.group_name, bool(self.outlet)
        # In this order, so that the backward sends the gradient of the scores first: the router's waits for it, and
        # runs while that of x is under way.
        x_MD = _Arrived.apply(x_MD, *how)
        scores_MK = _Arrived.apply(scores_MK, *how)
        ids_MK = _collectives.wait_tensor(ids_MK)
        num_tokens, num_chosen = x_MD.shape[0], ids_MK.shape[-1]
        choice = ReceivedChoice(
            scores_MK,
            ids_MK,
            first_expert=self.rank * self.num_local_experts,
            num_rows=num_tokens * min(num_chosen, self.num_local_experts),
            usual_rows=num_tokens * num_chosen // self.ranks,
            outlet=self.outlet,
        )
        return x_MD, choice

    def send_home(self, y_MD: torch.Tensor) -> torch.Tensor:
        """y_MD, a weighted sum over this rank's experts for each token -> (M, D), under way: for `sum`."""
        return _SentHome.apply(y_MD, self.ranks, self.group_name, bool(self.outlet))

    def sum(self, y_MD: torch.Tensor) -> torch.Tensor:
        """Results under way -> out_TD, once they are there, the sum of all ranks' for each of this rank's tokens."""
        return torch.ops.momoe_titan.sum_tokens(y_MD, *self._ranks)
