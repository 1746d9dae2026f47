"""The forward of a few tokens without gradients, against the float64 oracle."""

import pytest
import torch

from momoe_titan.kernels import decode, momoe_mlp, momoe_mlp_ref
from momoe_titan.kernels.compile_count import cache_load_count, compile_count
from momoe_titan.kernels.gpu import interpreting
from tests.kernels.test_op import error, make_inputs

# (T, D, F, E, K) and why it is here
SHAPES = {
    "one_token": (1, 160, 80, 9, 2),  # up and down in one launch, and more columns than a program takes at a time
    "one_token_odd": (1, 97, 47, 5, 3),
    "one_token_many_parts": (1, 40, 800, 12, 10),  # the sum takes two steps
    "few_tokens": (2, 96, 80, 9, 2),  # rows are found by their slots
    "few_experts": (11, 64, 48, 3, 2),  # rows are found by their experts
    "odd_widths": (5, 97, 47, 30, 3),
    "many_slots": (16, 32, 40, 12, 5),  # more than a chunk of slots
    "split_sum": (2, 64, 200, 4, 1),
    "nothing_for_the_second_part": (3, 32, 64, 5, 2),
}


@torch.no_grad()
def check(x, w1, w2, ids, scores):
    out, counts = momoe_mlp(x, w1, w2, ids, scores, backend="triton")
    want, counts_want = momoe_mlp_ref(x.double(), w1.double(), w2.double(), ids, scores.double())
    in_dtype, _ = momoe_mlp_ref(x, w1, w2, ids, scores)
    assert out.dtype == x.dtype and counts.tolist() == counts_want.tolist()
    assert error(out, want) <= max(2 * error(in_dtype, want), torch.finfo(x.dtype).eps / 4)
    return out


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    counted, real = [], decode.forward
    monkeypatch.setattr(decode, "forward", lambda *args: counted.append(args[0].shape[0]) or real(*args))
    return counted


@pytest.mark.parametrize("name", SHAPES)
def test_forward(name, device, calls):
    for dtype in (torch.float16,) if interpreting() else (torch.float16, torch.bfloat16):
        inputs = make_inputs(SHAPES[name], dtype, device)[:5]
        assert torch.equal(check(*inputs), check(*inputs))
    assert set(calls) == {SHAPES[name][0]}


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name][0] == 1])
def test_one_token_whose_programs_do_not_run_at_once(name, device, monkeypatch):
    monkeypatch.setattr(decode, "fuses", lambda *args: False)
    inputs = make_inputs(SHAPES[name], torch.float16, device)[:5]
    assert torch.equal(check(*inputs), check(*inputs))


@pytest.mark.parametrize("experts", [3, 40])
def test_unused_slots_and_experts_named_twice(experts, device):
    x, w1, w2, ids, scores, _ = make_inputs((16, 32, 48, experts, 2), torch.float16, device)
    ids[0, 1], ids[1], ids[2, 0], ids[3] = -1, -1, experts, 2
    ids[5:] = 1  # 22 rows of tiles of 16, then 32 of them
    for some in (torch.ones_like(ids), torch.full_like(ids, -1), ids.int()):
        out = check(x, w1, w2, some, scores)
    assert (out[1] == 0).all()
    for t in range(5):
        one = check(x[t : t + 1], w1, w2, ids[t : t + 1], scores[t : t + 1])
        assert t != 1 or (one == 0).all()


def test_nan_stays_in_its_token(device):
    x, w1, w2, ids, scores, _ = make_inputs((7, 32, 48, 3, 2), torch.float16, device)
    clean = check(x, w1, w2, ids, scores)
    x[4] = float("nan")
    with torch.no_grad():
        out, _ = momoe_mlp(x, w1, w2, ids, scores, backend="triton")
    others = [t for t in range(7) if t != 4]
    assert out[4].isnan().all() and torch.equal(out[others], clean[others])


def test_only_few_tokens_without_gradients(device, calls):
    for tokens, dtype, grad in [(8, torch.float16, True), (17, torch.float16, False), (8, torch.float32, False)]:
        x, w1, w2, ids, scores, _ = make_inputs((tokens, 32, 32, 4, 2), dtype, device)
        momoe_mlp(x.requires_grad_(grad), w1, w2, ids, scores, backend="triton")
    assert calls == []


def test_fake_implementation(device):
    x, w1, w2, ids, scores, _ = make_inputs((3, 32, 32, 4, 2), torch.float16, device)
    for backend in ("triton", "torch"):
        args = (x, w1, w2, ids, scores, ids.numel(), 0.0, True, backend)
        torch.library.opcheck(
            torch.ops.momoe_titan.moe_forward.default, args, test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.gpu
def test_replays_from_a_graph_and_compiles_once():
    with torch.no_grad():
        x, w1, w2, ids, scores, _ = make_inputs((16, 512, 256, 16, 2), torch.bfloat16, "cuda")
        counts = []
        for tokens in range(1, 17):
            momoe_mlp(x[:tokens], w1, w2, ids[:tokens], scores[:tokens])
            counts.append(compile_count() + cache_load_count())
        assert set(counts[1:]) == {counts[1]}  # one token has kernels of its own
        some = [
            slice(4),
            *(slice(t, t + 1) for t in range(8)),
        ]  # one token after another: the launches of two forwards overlap
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [momoe_mlp(x[s], w1, w2, ids[s], scores[s])[0] for s in some]
        x.copy_(torch.randn_like(x))
        ids.copy_(ids.flip(0))
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        for s, got in zip(some, captured, strict=True):
            want = momoe_mlp(x[s], w1, w2, ids[s], scores[s])[0]
            torch.cuda.synchronize()
            assert torch.equal(got, want)
