import json

import pytest
import torch

from momoe_titan.kernels import combine, versions
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.hopper import launch as hopper
from momoe_titan.kernels.routing import build_routing_ref, unpack_routing
from tests.support import commands

SHARED_LIMIT = 227 * 1024
# Releases that do not use these kernels may spill: docs/get_started.md has what they do.
IS_USED = versions.TRITON in versions.HOPPER_RELEASES

CASES = {  # (T, D, F, E, K): why
    "one token": (1, 128, 128, 4, 2),
    "column tails": (300, 320, 448, 5, 3),  # neither D nor F fills its last tile
    "narrow": (45, 192, 64, 7, 2),  # F smaller than any tile
    "one expert": (700, 256, 256, 4, 1),  # the others are empty
    "unused slots": (517, 256, 320, 6, 4),  # rows past the last offset, experts 0 and 5 empty
    "7B": (2048, 1536, 256, 128, 8),
    "wide": (4096, 4096, 448, 5, 3),  # up_proj takes few column tiles at a time; several tiles for each program
    "two programs": (700, 320, 448, 5, 3),  # which share all tiles: what one leaves to the next
    # of down_proj, under which four blocks of the tile before go out
    "two programs, three steps": (300, 128, 192, 5, 3),
    "two programs, one step": (517, 64, 64, 6, 4),  # experts 0 and 5 empty
    # dw: tiles of 15 steps, whose blocks go out apart, among tiles of one
    "two programs, one expert": (900, 576, 320, 4, 1),
    "seed": (1000, 2176, 1152, 64, 6),
}
ERROR = {torch.bfloat16: 5e-3, torch.float16: 1e-3}

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
)


def assert_experts_may_lie_apart(rows):
    """The kernels read how many rows lie between two experts' weights; they do not take it from the shape."""
    assert {row["kernel"] for row in rows if row["w_rows"] == 1} == set()
    assert {row["kernel"] for row in rows if row["w_rows"] == 0} <= {"weight_grad_kernel"}


def test_every_kernel_compiles_within_limits():
    """Triton's own cache has those that are as they were."""
    run = commands.run("tests/support/compile_hopper.py")
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    # how many rows of z are saved, column ranges and other shapes must not add to these: two dtypes of each
    kernels = sorted((row["kernel"], row["case"]) for row in rows if row["dtype"] == "torch.bfloat16")
    assert kernels == [
        *[("down_proj_backward_kernel", "down backward")] * 2,  # few column tiles at a time, or all
        *[("rows_kernel", "down")] * 2,
        *[("rows_kernel", "dx")] * 2,
        *[("rows_kernel", "dx, two buffers")] * 2,
        *[("up_proj_kernel", "up, none saved")] * 2,
        *[("up_proj_kernel", "up, some rows saved")] * 2,
        *[("up_proj_kernel", "z again")] * 2,
        ("weight_grad_kernel", "dw1"),
        ("weight_grad_kernel", "dw1, two buffers"),
        ("weight_grad_kernel", "dw2"),
    ]
    assert len(rows) == 2 * len(kernels)
    assert [row for row in rows if row["spills"] or row["stack"]] == [] or not IS_USED
    assert [row for row in rows if row["shared"] > SHARED_LIMIT] == []
    assert_experts_may_lie_apart(rows)


@pytest.mark.slow
def test_kernels_of_other_experts_compile_within_limits():
    """Each kind has its own up projection and backward of the down projection; a bias may spill a few registers."""
    run = commands.run("tests/support/compile_hopper.py", "others")
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 2 * 8 + 1
    assert [row for row in rows if row["shared"] > SHARED_LIMIT] == []
    spilling = [row for row in rows if row["spills"] > (16 if row["case"] in ("gpt-oss", "relu2") else 0)]
    assert spilling == [] or not IS_USED
    assert_experts_may_lie_apart(rows)


@pytest.mark.parametrize(
    "dtype, D, F, capability, answer",
    [
        (torch.bfloat16, 2176, 1152, (9, 0), True),
        (torch.float16, 64, 14336, (9, 0), True),
        (torch.float32, 2048, 1024, (9, 0), False),
        (torch.bfloat16, 600, 1024, (9, 0), False),
        (torch.bfloat16, 1024, 97, (9, 0), False),
        (torch.bfloat16, 2048, 1024, (8, 0), False),
        (torch.bfloat16, 2048, 1024, (10, 0), False),
    ],
)
def test_supported(dtype, D, F, capability, answer, monkeypatch):
    monkeypatch.setattr(versions, "TRITON", (3, 6))
    assert hopper.supported(dtype, D, F, capability) is answer
    monkeypatch.setattr(versions, "TRITON", (3, 8))
    assert not hopper.supported(dtype, D, F, capability)
    monkeypatch.setenv(versions.ANY_RELEASE, "1")
    assert hopper.supported(dtype, D, F, capability) is answer


def test_combine_of_column_ranges(device):
    tokens, chosen, width = 37, 3, 640
    ids = torch.rand(tokens, 5, device=device).topk(chosen, -1)[1]
    ids[3, 1] = -1
    packed, _ = build_routing_ref(ids, torch.rand(ids.shape, device=device), 5, 16)
    routing = unpack_routing(packed, tokens, chosen, 5, 16)
    rows, scores = torch.randn(tokens * chosen, width, device=device), torch.rand(tokens, chosen, device=device)
    picked = torch.where((routing.row_TK >= 0)[..., None], rows[routing.row_TK.clamp(min=0).long()], 0.0)
    for weights in (scores, None):
        want = (picked * (1.0 if weights is None else weights[..., None])).sum(1)
        whole, parts = torch.full((2, tokens, width), float("nan"), device=device)
        combine.combine(rows, routing, weights, whole)
        for begin, end in [(0, 256), (256, 512), (512, 640)]:
            combine.combine(rows[:, begin:end].contiguous(), routing, weights, parts[:, begin:end])
        assert torch.equal(whole, parts)
        torch.testing.assert_close(whole, want)


class Case:
    """Inputs, and what the launchers should make of them in float32, row by row."""

    def __init__(self, name, dtype):
        self.T, self.D, self.F, self.E, self.K = CASES[name]
        self.dtype, self.R = dtype, self.T * self.K
        self.generator = torch.Generator("cuda").manual_seed(1)
        ids = torch.rand(self.T, self.E, device="cuda", generator=self.generator).topk(self.K, -1)[1]
        if "one expert" in name:
            ids.fill_(2)
        if name in ("unused slots", "two programs, one step"):
            ids[(ids == 0) | (ids == self.E - 1)] = -1
        packed, _ = build_routing_ref(ids, torch.rand(ids.shape, device="cuda"), self.E, 128)
        self.routing = unpack_routing(packed, self.T, self.K, self.E, 128)
        self.offsets = self.routing.offsets_E1.tolist()
        self.used = self.offsets[-1]
        self.x, self.dout = self.randn(self.T, self.D), self.randn(self.T, self.D)
        self.w1 = self.randn(self.E, self.D, 2 * self.F, scale=self.D**-0.5)
        self.w2 = self.randn(self.E, self.F, self.D, scale=self.F**-0.5)
        self.experts, self.score = Experts(self.w1, self.w2), self.routing.score_R
        self.score.copy_(torch.rand(self.R, device="cuda", generator=self.generator))

    def randn(self, *size, scale=1.0):
        return (torch.randn(*size, device="cuda", generator=self.generator) * scale).to(self.dtype)

    def rows(self, cols):
        """Random rows; those of nobody hold NaN, which must reach no result."""
        rows = self.randn(self.R, cols)
        rows[self.used :] = float("nan")
        return rows

    def poisoned(self, *size, dtype=None):
        return torch.full(size, float("nan"), device="cuda", dtype=dtype or self.dtype)

    def tile_start(self, row):
        """First row of the 128-row tile that holds row."""
        begin = max(b for b in self.offsets if b <= row)
        return begin + (row - begin) // 128 * 128

    def split(self, rows, num_saved):
        """rows in two buffers; NaN where a buffer's rows belong to the other."""
        z = hopper.SplitRows.beside(rows[:num_saved].clone(), self.R)
        if num_saved not in (0, self.R):
            z.saved[self.tile_start(num_saved) :] = float("nan")
            z.rest.copy_(rows[z.first :])
            z.rest[: self.tile_start(num_saved) - z.first] = float("nan")
        elif num_saved == 0:
            z.rest.copy_(rows)
        return z

    def joined(self, z):
        """The rows of a `SplitRows`."""
        begin = self.tile_start(z.num_saved) if z.num_saved < self.R else self.R
        return torch.cat([z.saved[:begin], z.rest[begin - z.first :]])[: self.R]

    def gathered(self, t):
        return t[self.routing.token_R.long()].float()

    def by_expert(self, rows, w):
        """rows[r] @ w[expert of r] in float32; NaN for rows of nobody."""
        out = torch.full((self.R, w.shape[2]), float("nan"), device="cuda")
        for e in range(self.E):
            begin, end = self.offsets[e : e + 2]
            out[begin:end] = rows[begin:end].float() @ w[e].float()
        return out

    def check(self, got, want, rows=None):
        """The first rows, or all that are used, as wanted."""
        rows = self.used if rows is None else rows
        got, want = got[:rows], want[:rows]
        assert torch.isfinite(got).all()
        assert (got.float() - want).norm() <= ERROR[self.dtype] * want.norm()

    def untouched(self, got):
        assert torch.isnan(got).all()


def act_of(z):
    up, gate = z.chunk(2, -1)
    return up * torch.nn.functional.silu(gate)


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def case(request, name, monkeypatch):
    if request.param is torch.float16 and name in ("7B", "wide", "seed"):
        pytest.skip("float16 differs from bfloat16 in nothing that depends on the shape")
    if "two programs" in name:
        monkeypatch.setattr(hopper, "num_programs", lambda device: 2)
    if name in ("two programs", "seed"):
        monkeypatch.setattr(hopper, "UP_AT_A_TIME", (0, 2))
        monkeypatch.setattr(hopper, "DOWN_BACKWARD_AT_A_TIME", (0, 2))
        monkeypatch.setattr(hopper, "ROWS_AT_A_TIME", 1)
    if name not in ("wide", "seed"):
        monkeypatch.setattr(hopper, "SYNC_FLOPS", 0)
    return Case(name, request.param)


def saved_counts(case):
    """Nothing, all, within a tile, at ends of tiles and experts, and beyond the last used row."""
    edges = {0, case.R, case.R * 3 // 10, min(case.R, 70), min(case.R, 128), case.R - 1, (case.used + case.R) // 2}
    return sorted(edges | {next(offset for offset in case.offsets if offset > 0)})


@pytest.mark.gpu
@on_hopper
def test_up_proj(case):
    z_want = case.by_expert(case.gathered(case.x), case.w1)
    for num_saved in saved_counts(case):
        z, act = case.poisoned(case.R + 200, 2 * case.F), case.poisoned(case.R, case.F)
        hopper.up_proj(case.x, case.experts, case.routing, z[:num_saved], num_saved, act)
        case.check(act, act_of(z_want))
        case.untouched(act[case.used :])
        kept = min(num_saved, case.used)
        case.check(z[:kept], z_want[:kept])
        case.untouched(z[kept:])


@pytest.mark.gpu
@on_hopper
def test_recompute_z(case):
    z_want = case.by_expert(case.gathered(case.x), case.w1)
    for num_saved in saved_counts(case):
        z = hopper.SplitRows.beside(case.poisoned(num_saved, 2 * case.F), case.R)
        z.rest.fill_(float("nan"))
        hopper.recompute_z(case.x, case.experts, case.routing, z)
        if num_saved < case.R:
            first, begin = min(num_saved, case.used), min(case.tile_start(num_saved), case.used)
            case.check(z.rest[first - z.first :], z_want[first:], rows=case.used - first)
            case.untouched(z.rest[: begin - z.first])  # the tile around num_saved is written whole
            case.untouched(z.rest[case.used - z.first :])
        if z.saved is not z.rest:
            case.untouched(z.saved)


@pytest.mark.gpu
@on_hopper
def test_rows_kernels(case):
    act, dz = case.rows(case.F), case.rows(2 * case.F)
    dx_want = case.by_expert(dz, case.w1.transpose(1, 2))
    for launch, rows, w, want in [
        (hopper.down_proj, act, case.w2, case.by_expert(act, case.w2)),
        (hopper.up_proj_backward, dz, case.experts, dx_want),
        *((hopper.up_proj_backward, case.split(dz, n), case.experts, dx_want) for n in saved_counts(case)),
    ]:
        for begin, end in [(0, case.D), (0, 64), (64, case.D)]:
            if begin == end:
                continue
            out = case.poisoned(case.R, end - begin)
            launch(rows, w, case.routing, out, begin)
            case.check(out, want[:, begin:end])
            case.untouched(out[case.used :])


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dz_is", ["apart", "over z", "over the rest of z"])
def test_down_proj_backward(case, dz_is):
    rows = case.rows(2 * case.F)
    up, gate = rows.float().chunk(2, -1)
    dact = case.by_expert(case.gathered(case.dout), case.w2.transpose(1, 2))
    sigmoid = torch.sigmoid(gate)
    s = case.score[:, None]
    dz_want = torch.cat([s * dact * gate * sigmoid, s * dact * up * sigmoid * (1 + gate * (1 - sigmoid))], -1)
    for num_saved in saved_counts(case):
        act = case.poisoned(case.R, case.F)
        dscore = case.poisoned(case.R, hopper.dscore_parts(case.F), dtype=torch.float32)
        z, dz = case.split(rows, num_saved), case.poisoned(case.R, 2 * case.F)
        if dz_is == "over z":
            dz = z
        elif dz_is == "over the rest of z":
            dz.copy_(rows)
            dz[: case.tile_start(num_saved)] = float("nan")
            z = hopper.SplitRows(z.saved, dz, num_saved)
        hopper.down_proj_backward(case.dout, case.experts, case.routing, z, dz, act, dscore)
        dz = case.joined(dz) if dz_is == "over z" else dz
        case.check(dz, dz_want)
        case.check(act, s * act_of(rows.float()))
        case.check(dscore.sum(1), (dact * act_of(rows.float())).sum(1))
        for out in (dz, act, dscore):
            case.untouched(out[case.used :])


@pytest.mark.gpu
@on_hopper
def test_weight_grad(case):
    act, dz = case.rows(case.F), case.rows(2 * case.F)
    for gathered, rows, transposed in [(case.x, dz, False), (case.dout, act, True)]:
        want = torch.zeros(case.E, gathered.shape[1], rows.shape[1], device="cuda")
        for e in range(case.E):
            begin, end = case.offsets[e : e + 2]
            want[e] = case.gathered(gathered)[begin:end].T @ rows[begin:end].float()
        want = want.transpose(1, 2) if transposed else want
        for some in [rows] if transposed else [rows, *(case.split(rows, n) for n in saved_counts(case))]:
            dw = case.poisoned(*want.shape)
            hopper.weight_grad(gathered, some, case.routing, dw.transpose(1, 2) if transposed else dw)
            assert torch.isfinite(dw).all()
            assert (dw.float() - want).norm() <= ERROR[case.dtype] * want.norm()
            assert all((dw[e] == 0).all() for e in range(case.E) if case.offsets[e] == case.offsets[e + 1])


@pytest.mark.gpu
@on_hopper
def test_no_tokens():
    def new(*size):
        return torch.full(size, 7.0, device="cuda", dtype=torch.bfloat16)

    none = torch.empty(0, 2, device="cuda")
    packed, _ = build_routing_ref(none.long(), none, 3, 128)
    routing = unpack_routing(packed, 0, 2, 3, 128)
    x, w1, w2, act, y = new(0, 128), new(3, 128, 256), new(3, 128, 128), new(0, 128), new(0, 128)
    z = hopper.SplitRows.beside(new(0, 256), 0)
    dscore = torch.empty(0, 1, device="cuda")
    experts = Experts(w1, w2)
    hopper.up_proj(x, experts, routing, None, 0, act)
    hopper.recompute_z(x, experts, routing, z)
    hopper.down_proj(act, w2, routing, y)
    hopper.down_proj_backward(x, experts, routing, z, z, act, dscore)
    hopper.up_proj_backward(z, experts, routing, y)
    hopper.weight_grad(x, z, routing, w1)
    assert (w1 == 0).all()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("name", ["7B", "wide"])
def test_same_bits_every_time(name, monkeypatch):
    """With `ProgramSync`, without it, and with a program that never runs, so that the others reach max_polls."""
    case = Case(name, torch.bfloat16)
    launched_with, program_sync = [], hopper._program_sync

    def recorded(*args):
        launched_with.append(program_sync(*args))
        return launched_with[-1]

    def one_is_missing(*args):
        counts, _ = program_sync(*args)
        counts[-1] = 0
        return counts, 3

    def run():
        act, y, dx = (case.poisoned(case.R, n) for n in (case.F, case.D, case.D))
        kept, scaled = case.poisoned(999, 2 * case.F), case.poisoned(case.R, case.F)
        dz = hopper.SplitRows.beside(kept, case.R)
        dscore = case.poisoned(case.R, hopper.dscore_parts(case.F), dtype=torch.float32)
        dw1, dw2 = torch.empty_like(case.w1), torch.empty_like(case.w2)
        hopper.up_proj(case.x, case.experts, case.routing, kept, 999, act)
        hopper.down_proj(act, case.w2, case.routing, y)
        hopper.recompute_z(case.x, case.experts, case.routing, dz)
        hopper.down_proj_backward(case.dout, case.experts, case.routing, dz, dz, scaled, dscore)
        hopper.up_proj_backward(dz, case.experts, case.routing, dx)
        hopper.weight_grad(case.x, dz, case.routing, dw1)
        hopper.weight_grad(case.dout, scaled, case.routing, dw2.transpose(1, 2))
        return act, y, case.joined(dz), scaled, dscore, dx, dw1, dw2

    first = run()
    for sync_flops, how in [(1e30, recorded), (0, recorded), (0, one_is_missing), (0, recorded), (1e30, recorded)]:
        monkeypatch.setattr(hopper, "SYNC_FLOPS", sync_flops)
        monkeypatch.setattr(hopper, "_program_sync", how)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))
    published = [counts for counts, max_polls in launched_with if max_polls]
    assert len(published) == 2 * 4 and len(launched_with) == 4 * 4  # up, z again, dw1, dw2
    assert all((counts == 1 << 30).all() for counts in published)  # every program has retired


@pytest.mark.gpu
@on_hopper
def test_program_sync_publishes_every_tile(monkeypatch):
    """Programs would poll for seconds if a tile were never published; none should have to."""
    monkeypatch.setattr(hopper, "SYNC_FLOPS", 0)
    monkeypatch.setattr(hopper, "MAX_POLLS", 10**7)
    case = Case("wide", torch.bfloat16)
    z, act, dw1 = (
        torch.empty(n, device="cuda", dtype=case.dtype) for n in ((case.R, 896), (case.R, 448), case.w1.shape)
    )
    for launch in (
        lambda: hopper.up_proj(case.x, case.experts, case.routing, z, case.R, act),
        lambda: hopper.weight_grad(case.x, z, case.routing, dw1),
    ):
        launch()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        launch()
        events[1].record()
        torch.cuda.synchronize()
        assert events[0].elapsed_time(events[1]) < 500  # ms; a tile that is not published takes longer


@pytest.mark.gpu
@on_hopper
def test_offsets_past_2_to_31():
    T, D, F, E = 540_000, 4096, 64, 2  # T * D = 2.2e9 elements
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(T, D, device="cuda", dtype=torch.bfloat16)
    x[-300:] = torch.randn(300, D, device="cuda")
    w1 = torch.randn(E, D, 2 * F, device="cuda", dtype=torch.bfloat16) / D**0.5
    w2 = torch.randn(E, F, D, device="cuda", dtype=torch.bfloat16) / F**0.5
    ids = (torch.arange(T, device="cuda")[:, None] >= 1000).long()
    packed, _ = build_routing_ref(ids, torch.ones(T, 1, device="cuda"), E, 128)
    routing = unpack_routing(packed, T, 1, E, 128)
    act, y = x.new_empty(T, F), x.new_empty(T, D)
    hopper.up_proj(x, Experts(w1, w2), routing, None, 0, act)
    hopper.down_proj(act, w2, routing, y)
    want = act_of(x[-300:].float() @ w1[1].float())
    assert (act[-300:] - want).norm() <= 5e-3 * want.norm()
    assert (act[:-300] == 0).all()
    want = act[-300:].float() @ w2[1].float()
    assert (y[-300:] - want).norm() <= 5e-3 * want.norm()
    dz = torch.randn(T, 2 * F, device="cuda", dtype=torch.bfloat16)
    dw1 = torch.empty_like(w1)
    hopper.weight_grad(x, dz, routing, dw1)
    want = x[-300:].float().T @ dz[-300:].float()
    assert (dw1[1] - want).norm() <= 5e-3 * want.norm()
    assert (dw1[0] == 0).all()
