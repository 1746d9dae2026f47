"""What an MoE layer exchanges under expert parallelism, without the layer."""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from momoe_titan.kernels.outlet import OUTLETS
from momoe_titan.model.parallel import gathered, peer_memory

assert gathered  # which defines them
ops = torch.ops.momoe_titan
STARTED = 6  # more than there are staging buffers


def exchange(rank: int, name: str, rows: torch.Tensor) -> list[torch.Tensor]:
    """What gathering and sending give, with several transfers under way at once and each buffer used again."""
    ranks, wait = dist.get_world_size(), torch.ops._c10d_functional.wait_tensor
    found = []
    for i in range(STARTED):
        x, scores = rows + i, rows[:, :8].float() - i
        gathered_x = ops.gather_tokens(x, rank, ranks, name, True)
        x.fill_(torch.nan)  # the input may be freed at once
        choice = ops.gather_choice(scores, scores.long(), gathered_x, rank, ranks, name)
        found += [wait(gathered_x).clone(), *(wait(t).clone() for t in choice)]
        both = _send_together(ranks, name, found[-3] - rank, found[-2] + rank)
        found += [ops.sum_tokens(t, rank, ranks, name) for t in both]
    return found


def _send_together(ranks: int, name: str, *results: torch.Tensor) -> list[torch.Tensor]:
    """As the op of the experts does by its outlet: the rows of others first, its own while these are under way."""
    if name not in OUTLETS:
        return [ops.send_blocks(rows.clone(), ranks, name) for rows in results]
    sending, outs = OUTLETS[name](), [torch.empty_like(rows) for rows in results]
    blocks = [sending.stage(out) for out in outs]
    for rows, block in zip(results, blocks, strict=True):
        for first, last, place in block.sent:
            place.copy_(rows[first:last])
    sending.start()
    for rows, out, block in zip(results, outs, blocks, strict=True):
        first, last = block.kept
        out[first:last] = rows[first:last]
    return outs


def replays(
    transfers: Callable[[torch.Tensor], list[torch.Tensor]], rows: torch.Tensor, rank: int, ranks: int, cycles: int
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(factor, what `transfers` gives for so many times `rows`) from one CUDA graph; at times, without it in between.

    Ranks come at different times, by so many cycles of the GPU.
    """
    graph, static = torch.cuda.CUDAGraph(), rows.clone()
    with peer_memory.one_sequence(), torch.cuda.graph(graph):
        got = transfers(static)
    for factor in (1, 2, 3, 2, 1):
        static.copy_(rows * factor)
        torch.cuda._sleep(cycles * (rank == factor % ranks))
        graph.replay()
        if factor != 3:  # or a replay follows another
            torch.cuda._sleep(cycles * (rank != factor % ranks))
            yield factor, transfers(rows * factor)
        yield factor, [tensor.clone() for tensor in got]
