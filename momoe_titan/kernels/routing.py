"""Routing: sorts the choices of all tokens by expert, so that each expert's rows are contiguous.

A slot is one of a token's K choices; it is unused if its expert id is outside ``[0, E)``.
The sort is a stable counting sort in three launches: a histogram per block of slots, a scan
over the blocks, and the placement of every slot. With few slots each program counts all of
them itself, and one launch suffices. There are no atomics on global memory, and the host
never waits for the GPU.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from momoe_titan.kernels import gpu
from momoe_titan.kernels.launch import cdiv, launch, next_power_of_2

MAX_TILES = MAX_EXPERTS = 1 << 16  # 16 bits of a packed tile hold its number in its expert, 16 the expert
_SLOTS = 128  # slots that one program of the sort owns, a thread for each
_FEW_SLOTS = 8192  # up to this many slots, each program counts all slots itself and one launch suffices
_COUNTED = 1024  # slots counted per loop iteration in that mode

_ready = set()  # kinds of input for which the kernels of both ways of sorting are compiled


@dataclass(frozen=True)
class RoutingMetadata:
    """Where every (token, slot) pair stands once rows are sorted by expert.

    A flat slot is ``t * K + k``. Rows of one expert are contiguous and in the
    order of their flat slots. A slot whose expert id is outside ``[0, E)`` is
    unused: it has no row. R rows are allocated (T * K unless ``num_rows`` is
    given); rows from ``offsets_E1[E]`` on are padding.

    Example: T=3, K=2, E=3, ids = [[2, 0], [0, 1], [2, -1]], tile_rows=2::

        counts_E   = [2, 1, 2]
        offsets_E1 = [0, 2, 3, 5]
        token_R    = [0, 1, 1, 0, 2, 0]
        score_R    = scores_TK at [0, 1], [1, 0], [1, 1], [0, 0], [2, 0]; the last is 0
        row_TK     = [[3, 0], [1, 2], [4, -1]]
        tiles      = [0 << 16 | 0, 0 << 16 | 1, 0 << 16 | 2]     num_tiles = [3]
    """

    counts_E: torch.Tensor  # int32: rows of each expert
    offsets_E1: torch.Tensor  # int32 (E + 1): first row of each expert; the last is the number of rows in use
    token_R: torch.Tensor  # int32: token of each row; 0 for a padding row
    score_R: torch.Tensor  # float32: score of each row's slot, if scores are given; 0 for a padding row
    row_TK: torch.Tensor  # int32: row of each slot; -1 for an unused slot
    tiles: torch.Tensor  # int32: for each row tile, its number within its expert << 16 | expert
    num_tiles: torch.Tensor  # int32 (1): how many entries of tiles are in use
    tile_rows: int  # rows in a tile

    @property
    def max_tiles(self) -> int:
        """Upper bound of num_tiles, known on the host."""
        return self.tiles.numel()


def _align(count: int) -> int:
    # 16 bytes: Triton compiles a pointer again when its alignment changes
    return (count + 3) // 4 * 4


def _sections(num_tokens: int, num_chosen: int, num_experts: int, tile_rows: int, num_rows: int | None) -> list[int]:
    slots = num_tokens * num_chosen
    rows = slots if num_rows is None else num_rows
    max_tiles = (rows + tile_rows - 1) // tile_rows + num_experts
    return [num_experts, num_experts + 1, rows, rows, slots, max_tiles, 1]


def packed_size(num_tokens: int, num_chosen: int, num_experts: int, tile_rows: int, num_rows: int | None = None) -> int:
    """Elements of the one int32 buffer that holds all of RoutingMetadata."""
    return sum(_align(n) for n in _sections(num_tokens, num_chosen, num_experts, tile_rows, num_rows))


@functools.lru_cache(maxsize=64)
def _splits(
    num_tokens: int, num_chosen: int, num_experts: int, tile_rows: int, num_rows: int | None
) -> tuple[list[int], list[int]]:
    """Sizes of the sections of a packed buffer and of paddings that align the next one, and which are sections."""
    sizes, places = [], []
    for n in _sections(num_tokens, num_chosen, num_experts, tile_rows, num_rows):
        places.append(len(sizes))
        sizes += [n] if n == _align(n) else [n, _align(n) - n]  # a view costs the host 1 us
    return sizes, places


def unpack_routing(
    packed: torch.Tensor,
    num_tokens: int,
    num_chosen: int,
    num_experts: int,
    tile_rows: int,
    num_rows: int | None = None,
) -> RoutingMetadata:
    """Views of a packed buffer as RoutingMetadata; pass the num_rows that build_routing got."""
    sizes, places = _splits(num_tokens, num_chosen, num_experts, tile_rows, num_rows)
    views = packed.split_with_sizes(sizes)
    counts, offsets, token, score, row, tiles, num_tiles = (views[i] for i in places)
    score = score.view(torch.float32)
    return RoutingMetadata(counts, offsets, token, score, row.view(num_tokens, num_chosen), tiles, num_tiles, tile_rows)


@triton.jit
def _load_ids(ids_ptr, slots, num_slots, E: tl.constexpr, CACHE: tl.constexpr):
    """Expert ids of the slots, int32; -1 for every id outside [0, E)."""
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1, cache_modifier=CACHE)  # pyright: ignore[reportArgumentType] - jit
    return tl.where((ids >= 0) & (ids < E), ids, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _histogram_kernel(
    ids_ptr, hist_ptr, num_slots, num_blocks, E: tl.constexpr, SLOTS: tl.constexpr, E_POW2: tl.constexpr
):
    """Grid (blocks of slots,). hist[e, block] = slots of the block that chose expert e."""
    block = tl.program_id(0)
    slots = block * SLOTS + tl.arange(0, SLOTS)
    ids = _load_ids(ids_ptr, slots, num_slots, E, "")
    experts = tl.arange(0, E_POW2)
    counts = tl.histogram(ids, E_POW2, mask=ids >= 0)
    tl.store(hist_ptr + experts.to(tl.int64) * num_blocks + block, counts, mask=experts < E)


@triton.jit(do_not_specialize=["num_blocks"])
def _scan_kernel(hist_ptr, counts_ptr, total_ptr, num_blocks, BLOCKS: tl.constexpr):
    """Grid (E,). hist[e, :] becomes its exclusive prefix sum; its total goes to counts (int32, int64)."""
    expert = tl.program_id(0)
    base = hist_ptr + expert.to(tl.int64) * num_blocks
    total = tl.zeros((), tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        counts = tl.load(base + blocks, mask=blocks < num_blocks, other=0)
        tl.store(base + blocks, total + tl.cumsum(counts, 0) - counts, mask=blocks < num_blocks)
        total += tl.sum(counts)
    tl.store(counts_ptr + expert, total)
    tl.store(total_ptr + expert, total.to(tl.int64))


@triton.jit
def _count_before(values, index, limit):
    """Sum of values at indices below limit."""
    return tl.sum(tl.where(index < limit, values, 0))


@triton.jit
def _count(ids_ptr, num_slots, end, E: tl.constexpr, E_POW2: tl.constexpr, COUNTED: tl.constexpr):
    """Slots of every expert: all of them, and those below end."""
    counts = tl.zeros((E_POW2,), tl.int32)
    before = tl.zeros((E_POW2,), tl.int32)
    for start in range(0, num_slots, COUNTED):
        slots = start + tl.arange(0, COUNTED)
        ids = _load_ids(ids_ptr, slots, num_slots, E, "")
        counts += tl.histogram(ids, E_POW2, mask=ids >= 0)
        before += tl.histogram(ids, E_POW2, mask=(ids >= 0) & (slots < end))
    return counts, before


@triton.jit
def _place_slots(
    ids_ptr,
    scores_ptr,
    hist_ptr,
    token_ptr,
    score_ptr,
    row_ptr,
    block,
    counts,
    before,
    num_slots,
    num_rows,
    num_blocks,
    K: tl.constexpr,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    SCORED: tl.constexpr,
    FEW: tl.constexpr,
):
    """Writes the row of each slot of a block, and the token and score of each such row.

    counts: slots of each expert. before: if FEW, those of earlier blocks; otherwise hist has them.
    """
    slots = block * SLOTS + tl.arange(0, SLOTS)
    live = slots < num_slots
    ids = _load_ids(ids_ptr, slots, num_slots, E, "")
    used = ids >= 0
    chosen = tl.where(used, ids, 0)
    first = tl.cumsum(counts, 0) - counts
    if FEW:
        row = tl.gather(first + before, chosen, 0)
    else:
        earlier = tl.load(hist_ptr + chosen.to(tl.int64) * num_blocks + block, mask=used, other=0)
        row = tl.gather(first, chosen, 0) + earlier
    # Add the earlier slots of the block that chose the same expert. The sum is over dim 0: in Triton's default layout
    # one thread owns a column, so the sum needs no shuffles.
    same = (slots[:, None] < slots[None, :]) & (ids[:, None] == ids[None, :])
    row += tl.sum(same.to(tl.int32), axis=0)
    tl.store(row_ptr + slots, tl.where(used, row, -1), mask=live)
    tl.store(token_ptr + row, slots // K, mask=live & used)
    if SCORED:
        score = tl.load(scores_ptr + slots, mask=live & used, other=0.0).to(tl.float32)
        tl.store(score_ptr + row, score, mask=live & used)
    # padding rows, from the last offset on: give them a valid token
    unused = (slots >= tl.sum(counts)) & (slots < num_rows)
    tl.store(token_ptr + slots, tl.zeros_like(slots), mask=unused)
    if SCORED:
        tl.store(score_ptr + slots, tl.zeros_like(score), mask=unused)


@triton.jit
def _list_tiles(
    counts_ptr,
    total_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    expert,
    counts,
    experts,
    E: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    FEW: tl.constexpr,
):
    """Writes an expert's row tiles and offset, and if FEW its count; the last expert also writes the totals."""
    tiles = (counts + TILE_ROWS - 1) // TILE_ROWS
    first_tile = _count_before(tiles, experts, expert)
    my_tiles = _count_before(tiles, experts, expert + 1) - first_tile
    for start in range(0, my_tiles, TILES):
        tile = start + tl.arange(0, TILES)
        tl.store(tiles_ptr + first_tile + tile, (tile << 16) | expert, mask=tile < my_tiles)
    tl.store(offsets_ptr + expert, _count_before(counts, experts, expert))
    if FEW:
        mine = tl.sum(tl.where(experts == expert, counts, 0))
        tl.store(counts_ptr + expert, mine)
        tl.store(total_ptr + expert, mine.to(tl.int64))
    if expert == E - 1:
        tl.store(offsets_ptr + E, tl.sum(counts))
        tl.store(num_tiles_ptr, tl.sum(tiles))


@triton.jit(do_not_specialize=["num_slots", "num_rows", "num_blocks"])
def _place_kernel(
    ids_ptr,
    scores_ptr,
    hist_ptr,
    counts_ptr,
    total_ptr,
    offsets_ptr,
    token_ptr,
    score_ptr,
    row_ptr,
    tiles_ptr,
    num_tiles_ptr,
    num_slots,
    num_rows,
    num_blocks,
    K: tl.constexpr,
    E: tl.constexpr,
    SLOTS: tl.constexpr,
    E_POW2: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SCORED: tl.constexpr,
    FEW: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Grid (blocks of slots + E,). The first programs place their slots, the last E list an expert's tiles.

    One launch for both, which need the same counts. If FEW all programs count the slots themselves; otherwise hist
    and counts come from the kernels above.
    """
    pid = tl.program_id(0)
    experts = tl.arange(0, E_POW2)
    if FEW:
        counts, before = _count(ids_ptr, num_slots, pid * SLOTS, E, E_POW2, COUNTED)  # pyright: ignore[reportGeneralTypeIssues] - jit
    else:
        counts = tl.load(counts_ptr + experts, mask=experts < E, other=0)
        before = counts  # not read
    if pid < num_blocks:
        _place_slots(
            ids_ptr,
            scores_ptr,
            hist_ptr,
            token_ptr,
            score_ptr,
            row_ptr,
            pid,
            counts,
            before,
            num_slots,
            num_rows,
            num_blocks,
            K,
            E,
            SLOTS,
            SCORED,
            FEW,
        )
    else:
        _list_tiles(
            counts_ptr,
            total_ptr,
            offsets_ptr,
            tiles_ptr,
            num_tiles_ptr,
            pid - num_blocks,
            counts,
            experts,
            E,
            TILE_ROWS,
            TILES,
            FEW,
        )


def _sort_options(num_experts: int) -> dict[str, int]:
    e_pow2 = max(2, next_power_of_2(num_experts))
    return dict(E=num_experts, SLOTS=_SLOTS, E_POW2=e_pow2, num_warps=_SLOTS // 32)


def histogram(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Slots that name each expert, int32 (E, blocks of slots), of contiguous ids."""
    num_slots = ids_TK.numel()
    num_blocks = cdiv(num_slots, _SLOTS)
    hist = ids_TK.new_empty(num_experts, num_blocks, dtype=torch.int32)
    launch(_histogram_kernel, (num_blocks,), ids_TK, hist, num_slots, num_blocks, **_sort_options(num_experts))
    return hist


def build_routing(
    ids_TK: torch.Tensor, scores_TK: torch.Tensor | None, num_experts: int, tile_rows: int, num_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the slots of ``ids_TK`` by expert.

    Args:
        ids_TK: int32 or int64, contiguous; an id outside ``[0, num_experts)`` marks an unused slot.
        scores_TK: any floating dtype, contiguous; without it score_R is undefined.
        num_experts: E.
        tile_rows: rows in a tile of the GEMMs that will use the result.
        num_rows: R, between the number of used slots and T * K; None means T * K.

    Returns:
        The packed int32 buffer (see :func:`unpack_routing`) and the tokens per
        expert, int64 (E).
    """
    return route_rows(ids_TK, scores_TK, num_experts, tile_rows, num_rows)[:2]


def route_rows(
    ids_TK: torch.Tensor, scores_TK: torch.Tensor | None, num_experts: int, tile_rows: int, num_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, RoutingMetadata]:
    """The same, and the packed buffer unpacked."""
    num_tokens, num_chosen = ids_TK.shape
    shape = (num_tokens, num_chosen, num_experts, tile_rows, num_rows)
    packed = ids_TK.new_empty(packed_size(*shape), dtype=torch.int32)
    counts_E = ids_TK.new_empty(num_experts, dtype=torch.int64)
    routing = unpack_routing(packed, *shape)
    few = num_tokens * num_chosen <= _FEW_SLOTS
    kind = (ids_TK.device, ids_TK.dtype, scores_TK is None or scores_TK.dtype, num_chosen, num_experts, tile_rows)
    if kind not in _ready and num_tokens and not gpu.interpreting() and gpu.planned() is None:
        # Run the other way once, so that its kernels are compiled too: a new number of tokens must not compile any.
        _ready.add(kind)
        _sort(ids_TK, scores_TK, routing, counts_E, not few)
    _sort(ids_TK, scores_TK, routing, counts_E, few)
    return packed, counts_E, routing


def _sort(ids_TK, scores_TK, r: RoutingMetadata, counts_E, few: bool) -> None:
    num_experts, num_slots = counts_E.shape[0], ids_TK.numel()
    num_blocks = cdiv(num_slots, _SLOTS)
    hist = r.counts_E  # not read if few
    if not few:
        hist = histogram(ids_TK, num_experts)
        launch(_scan_kernel, (num_experts,), hist, r.counts_E, counts_E, num_blocks, BLOCKS=1024)
    launch(
        _place_kernel,
        (num_blocks + num_experts,),
        ids_TK,
        scores_TK if scores_TK is not None else r.score_R,
        hist,
        r.counts_E,
        counts_E,
        r.offsets_E1,
        r.token_R,
        r.score_R,
        r.row_TK,
        r.tiles,
        r.num_tiles,
        num_slots,
        r.token_R.shape[0],
        num_blocks,
        K=ids_TK.shape[1],
        TILE_ROWS=r.tile_rows,
        TILES=256,
        SCORED=scores_TK is not None,
        FEW=few,
        COUNTED=_COUNTED,
        **_sort_options(num_experts),
    )


def build_routing_ref(
    ids_TK: torch.Tensor, scores_TK: torch.Tensor | None, num_experts: int, tile_rows: int, num_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as :func:`build_routing` in plain torch, equal in every used entry; waits for the device."""
    num_tokens, num_chosen = ids_TK.shape
    device = ids_TK.device
    shape = (num_tokens, num_chosen, num_experts, tile_rows, num_rows)
    packed = torch.zeros(packed_size(*shape), dtype=torch.int32, device=device)
    r = unpack_routing(packed, *shape)
    ids = ids_TK.reshape(-1).long()
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    counts_E = torch.bincount(ids, minlength=num_experts + 1)[:num_experts]
    rows_in_use = int(counts_E.sum())
    slot = torch.sort(ids, stable=True)[1][:rows_in_use]
    r.counts_E.copy_(counts_E)
    r.offsets_E1[1:].copy_(counts_E.cumsum(0))
    r.token_R[:rows_in_use].copy_(slot // num_chosen)
    if scores_TK is not None:
        r.score_R[:rows_in_use].copy_(scores_TK.reshape(-1)[slot])
    r.row_TK.fill_(-1).view(-1)[slot] = torch.arange(rows_in_use, dtype=torch.int32, device=device)
    tiles_E = (counts_E + tile_rows - 1) // tile_rows
    expert = torch.repeat_interleave(torch.arange(num_experts, device=device), tiles_E)
    first = (tiles_E.cumsum(0) - tiles_E)[expert]
    r.tiles[: expert.numel()].copy_(((torch.arange(expert.numel(), device=device) - first) << 16) | expert)
    r.num_tiles.fill_(expert.numel())
    return packed, counts_E
