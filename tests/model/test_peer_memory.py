"""Copies between the GPUs of one host are what NCCL's collectives give, to the bit."""

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed._symmetric_memory import get_signal_pad_size

from momoe_titan.model.parallel import gathered, peer_memory
from tests.support import commands
from tests.support.tiny import job_config, tiny_args
from tests.support.transfers import exchange, replays


def _compare() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = dist.group.WORLD
    transfers = functools.partial(exchange, rank, group.group_name)
    rows = torch.arange(96 * 64, device="cuda").view(96, 64).remainder(251).bfloat16() * (rank + 1)
    want = {factor: transfers(rows * factor) for factor in (1, 2, 3)}
    peer_memory.connect(group)
    assert peer_memory.peers_of(group.group_name) is not None, "the GPUs do not reach each other"
    for _ in range(2):
        _assert_equal(transfers(rows), want[1])
    for factor, got in replays(transfers, rows, rank, ranks, 10**7):
        _assert_equal(got, want[factor])
    dist.barrier()
    os._exit(0)


def _assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.gpu
def test_copies_between_gpus_are_what_nccl_gives():
    if (count := torch.cuda.device_count()) < 2:
        pytest.skip("needs two GPUs")
    ranks = 2 if count < 4 else 4
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    launch += [f"--master_port={commands.free_port()}", "-m", __name__]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120, cwd=commands.ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_staging_buffer_is_not_used_again_too_early():
    """Its last transfer has to be over on all ranks: waited for, and then another barrier passed."""

    def user(waited_after):
        return SimpleNamespace(waited_after=waited_after)

    def ring(waited_after):
        return peer_memory._Ring([[]] * 4, None, users=[None, user(waited_after), None, None])

    assert ring(3).next(barriers=4) == 1 and ring(3).next(barriers=5) == 1
    for unfinished in (None, 4, 5):
        with pytest.raises(RuntimeError, match="more than 3 transfers"):
            ring(unfinished).next(barriers=4)


def test_a_rank_that_captures_alone_keeps_its_turn(monkeypatch):
    """It would read and write other buffers than the rest from then on."""
    ring = peer_memory._Ring([[]] * 4, None)
    monkeypatch.setitem(peer_memory._peers, "of a test", SimpleNamespace(_rings={16: ring}))
    for captures in (0, 1, 3):
        ring.turn = 2
        for _ in range(captures):
            with peer_memory.one_sequence():
                assert [ring.next(barriers=1) for _ in range(3)] == [1, 2, 3]
        assert ring.next(barriers=1) == 3


@pytest.mark.parametrize("fails", [False, True])
def test_where_copies_fail_nccl_is_used_and_a_warning_says_so(fails, monkeypatch, caplog):
    class Memory:
        @staticmethod
        def empty_strided_p2p(shape, stride, dtype, device, group_name):
            return torch.empty(shape, dtype=dtype)

        @staticmethod
        def rendezvous(mine):
            if fails:
                raise RuntimeError("not permitted\nsomewhere")
            return SimpleNamespace(get_buffer=lambda rank, shape, dtype: mine)

    group = SimpleNamespace(group_name="tried in a test", rank=lambda: 0, size=lambda: 2)
    monkeypatch.setattr(peer_memory, "_on_one_host", lambda group: True)
    monkeypatch.setattr(peer_memory, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(peer_memory, "_SymmetricMemory", Memory)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **options: None)
    for _ in range(2):  # of each layer
        peer_memory.connect(group)
    assert (peer_memory.peers_of(group.group_name) is None) == fails
    assert [r.getMessage() for r in caplog.records if "NCCL" in r.getMessage()] == [
        "NCCL carries what these GPUs exchange, which takes longer than copies between them: they cannot "
        "read each other's memory: not permitted"
    ] * fails
    peer_memory._peers.pop(group.group_name, None)
    peer_memory.OUTLETS.pop(group.group_name, None)
    peer_memory._tried.discard(group.group_name)


@pytest.mark.parametrize(
    "ranks, chosen, experts, auto", [(2, 8, 128, True), (2, 4, 32, True), (4, 8, 128, True), (8, 8, 128, False)]
)
def test_tokens_go_to_all_ranks_where_that_sends_little_more(ranks, chosen, experts, auto):
    assert gathered.gathers_tokens("auto", ranks, chosen, experts) is auto
    assert gathered.gathers_tokens("all_ranks", ranks, chosen, experts)
    assert not gathered.gathers_tokens("chosen_ranks", ranks, chosen, experts)


def test_how_much_a_layer_stages():
    """Tokens; results and gradients for three others; scores and ids; gradients of scores for three others."""
    assert gathered.transfer_sizes(num_tokens=5, row_bytes=16, num_chosen=2, ranks=4) == [80, 240, 80, 120]


@pytest.mark.parametrize(
    "host, dispatch, tp, granules",
    [(8, "auto", 1, 25 + 3), (8, "auto", 2, 13 + 3), (1, "auto", 1, 0), (8, "chosen_ranks", 1, 0)],
)
def test_the_plan_knows_what_is_staged(host, dispatch, tp, granules, monkeypatch):
    """Four buffers of 48 MiB for tokens and results of two ranks, and small ones for choices, gradients of scores and
    the trial, in granules of 2 MiB, each with what its barriers need."""
    assert get_signal_pad_size() <= peer_memory._SIGNALS
    args = tiny_args(moe={"num_experts": 32, "top_k": 4}, dim=768)
    monkeypatch.setattr(gathered, "configured_args", lambda config: args)
    config = job_config(expert_dispatch=dispatch)
    config.parallelism.expert_parallel_degree = 2
    config.training.local_batch_size, config.training.seq_len = 16, 2048
    config.training.mixed_precision_param = "bfloat16"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(host))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1])
    mesh = SimpleNamespace(get_group=lambda: None)
    dims = SimpleNamespace(cp=1, tp=tp, etp_enabled=False, get_mesh=lambda name: mesh)
    assert gathered.staging_of_job(config, dims) == granules * 4 << 21


if __name__ == "__main__":
    _compare()
