import pytest
import torch

from momoe_titan.kernels import routing
from momoe_titan.kernels.launch import launch
from momoe_titan.kernels.routing import build_routing, build_routing_ref, unpack_routing

# name -> (ids_TK, E)
g = torch.Generator().manual_seed(0)
ROUTINGS = {
    "balanced": (torch.rand(45, 8, generator=g).topk(3, -1)[1], 8),
    "one_token": (torch.tensor([[4, 0]]), 5),
    "no_token": (torch.empty(0, 2, dtype=torch.int64), 5),
    "one_expert_chosen_once": (torch.zeros(7, 1, dtype=torch.int64), 1),
    "all_on_the_same_experts": (torch.tensor([[2, 5]]).expand(300, 2).contiguous(), 7),
    "every_expert": (torch.rand(9, 6, generator=g).argsort(-1), 6),
    "many_experts": (torch.rand(260, 200, generator=g).topk(5, -1)[1], 200),
    "unused_slots": (torch.tensor([[0, -1], [3, 1], [2**40, 2], [-1, -1], [1, 4]]), 4),
    "int32": (torch.rand(200, 8, generator=g).topk(2, -1)[1].int(), 8),
    "more_than_one_block_of_tiles": (torch.zeros(5000, 1, dtype=torch.int64), 2),
    "unused_slots_in_every_block": (torch.randint(-2, 8, (200, 2), generator=g), 6),
}


@pytest.mark.parametrize("spare, few", [(None, True), (0, True), (1, False), (None, False)])
@pytest.mark.parametrize("name", ROUTINGS)
def test_matches_reference(name, spare, few, device, monkeypatch):
    monkeypatch.setattr(routing, "_FEW_SLOTS", 1 << 20 if few else -1)
    ids, experts = ROUTINGS[name]
    scores = torch.rand(ids.shape)
    tile_rows = 16
    used = int(((ids >= 0) & (ids < experts)).sum())
    num_rows = None if spare is None else min(used + spare, ids.numel())
    packed, counts = build_routing(ids.to(device), scores.to(device), experts, tile_rows, num_rows)
    packed_ref, counts_ref = build_routing_ref(ids, scores, experts, tile_rows, num_rows)
    got = unpack_routing(packed.cpu(), *ids.shape, experts, tile_rows, num_rows)
    want = unpack_routing(packed_ref, *ids.shape, experts, tile_rows, num_rows)
    assert counts.tolist() == counts_ref.tolist()
    tiles = int(want.num_tiles)
    for field in ("counts_E", "offsets_E1", "token_R", "score_R", "row_TK", "num_tiles"):
        assert torch.equal(getattr(got, field), getattr(want, field)), field
    assert got.tiles[:tiles].tolist() == want.tiles[:tiles].tolist()


@pytest.mark.parametrize("blocks", [1024, 1025, 2500])
def test_scan_of_more_blocks_than_it_takes_at_a_time(blocks, device):
    """A block has 128 slots: beyond 131,072 slots the scan goes on from the sum so far."""
    counts = torch.randint(0, 129, (3, blocks), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    hist = counts.to(device, copy=True)
    total, total_64 = hist.new_empty(3), hist.new_empty(3, dtype=torch.int64)
    launch(routing._scan_kernel, (3,), hist, total, total_64, blocks, BLOCKS=1024)
    assert torch.equal(hist.cpu(), counts.cumsum(1, dtype=torch.int32) - counts)
    assert total.tolist() == total_64.tolist() == counts.sum(1).tolist()


@pytest.mark.parametrize("name", ROUTINGS)
def test_reference_sorts_stably(name):
    ids, experts = ROUTINGS[name]
    scores = torch.rand(ids.shape)
    packed, counts = build_routing_ref(ids, scores, experts, 16)
    r = unpack_routing(packed, *ids.shape, experts, 16)
    flat = ids.reshape(-1)
    used = (flat >= 0) & (flat < experts)
    rows = int(r.offsets_E1[-1])
    assert rows == used.sum() == counts.sum()
    row = r.row_TK.view(-1)
    assert sorted(row[used].tolist()) == list(range(rows)) and (row[~used] == -1).all()  # every used slot has a row
    order = used.nonzero().view(-1)[row[used].argsort()]  # slot of each row
    keys = list(zip(flat[order].tolist(), order.tolist(), strict=True))
    assert keys == sorted(keys)  # by expert, then in the order of the slots
    assert torch.equal(r.token_R[:rows].long(), order // ids.shape[1])
    assert torch.equal(r.score_R[:rows], scores.view(-1)[order])
    assert not r.token_R[rows:].any() and not r.score_R[rows:].any()
    covered = []
    for packed_tile in r.tiles[: int(r.num_tiles)].tolist():
        expert, number = packed_tile & 0xFFFF, packed_tile >> 16
        first = int(r.offsets_E1[expert]) + number * 16
        covered += range(first, min(first + 16, int(r.offsets_E1[expert + 1])))
    assert covered == list(range(rows))  # tiles own every row once
