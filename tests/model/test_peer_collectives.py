"""FSDP's collectives by reading other ranks' buffers, with ranks of one process that share its memory."""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from momoe_titan.model.parallel import peer_collectives
from momoe_titan.model.parallel.fsdp import reduce_by_sums
from momoe_titan.model.parallel.peer_collectives import PeerAllGather, PeerReduceScatter, buffers_bytes
from tests.support.forks import in_gloo_forks

RANKS = 3
CPU = torch.device("cpu")


class Memory:
    """Symmetric memory of ranks that come here one after another, each for its next buffer."""

    def __init__(self):
        self.buffers: dict[int, list[torch.Tensor]] = {rank: [] for rank in range(RANKS)}
        self.rank = self.barriers = 0

    def empty(self, num_bytes, dtype, device):
        self.buffers[self.rank].append(torch.empty(num_bytes, dtype=dtype))
        return self.buffers[self.rank][-1]

    def rendezvous(self, memory, group_name):
        (index,) = (i for i, m in enumerate(self.buffers[self.rank]) if m is memory)

        def get_buffer(rank, shape, dtype, offset):
            whole = self.buffers[rank][index].view(dtype)
            return whole[offset : offset + shape.numel()].view(shape)

        def barrier():
            self.barriers += 1

        return SimpleNamespace(get_buffer=get_buffer, barrier=barrier)


@pytest.fixture
def memory(monkeypatch):
    memory = Memory()
    monkeypatch.setattr(peer_collectives.symmetric_memory, "empty", memory.empty)
    monkeypatch.setattr(peer_collectives.symmetric_memory, "rendezvous", memory.rendezvous)
    return memory


def group(rank):
    return SimpleNamespace(group_name="group", size=lambda: RANKS, rank=lambda: rank)


def on_all_ranks(memory, work):
    results = []
    for memory.rank in range(RANKS):
        results.append(work(memory.rank))
    return results


def test_gathers_the_parts_of_all_ranks(memory):
    gathers = [PeerAllGather(group(rank)) for rank in range(RANKS)]
    for call in range(5):

        def fill(rank, call=call):
            out = gathers[rank].allocate((RANKS * 4,), dtype=torch.bfloat16, device=CPU)
            part = out.narrow(0, rank * 4, 4)
            part.fill_(10 * call + rank)
            return out, part

        filled = on_all_ranks(memory, fill)
        on_all_ranks(memory, lambda rank, filled=filled: gathers[rank](*filled[rank], group(rank)))
        want = torch.arange(RANKS).repeat_interleave(4) + 10 * call
        assert all(torch.equal(out.long(), want) for out, _ in filled)
        del filled
    assert memory.barriers == 5 * RANKS
    assert all(len(buffers) == 3 for buffers in memory.buffers.values())


def test_adds_the_gradients_of_all_ranks_in_float32(memory):
    torch.manual_seed(0)
    sent = torch.randn(RANKS, RANKS * 4).bfloat16()
    scatters = [PeerReduceScatter(group(rank), torch.bfloat16) for rank in range(RANKS)]

    def fill(rank):
        buffer = scatters[rank].allocate((RANKS * 4,), dtype=torch.float32, device=CPU)
        assert buffer.dtype == torch.bfloat16
        return buffer.copy_(sent[rank])

    filled = on_all_ranks(memory, fill)
    outs = [scatter.allocate((4,), dtype=torch.float32, device=CPU) for scatter in scatters]
    on_all_ranks(memory, lambda rank: scatters[rank](outs[rank], filled[rank], group(rank), None))
    torch.testing.assert_close(torch.cat(outs), sent.float().sum(0), rtol=1e-6, atol=1e-6)


def test_a_buffer_in_use_is_not_given_out_again(memory):
    gather = PeerAllGather(group(0))
    kept = [gather.allocate((6,), dtype=torch.bfloat16, device=CPU) for _ in range(3)]
    with pytest.raises(RuntimeError, match="more than 3"):
        gather.allocate((6,), dtype=torch.bfloat16, device=CPU)
    assert len(kept) == 3


class Local(PeerAllGather):
    """Its buffers, and gloo's transfer."""

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self._rings.handle(output_tensor)
        dist.all_gather_into_tensor(output_tensor, input_tensor.clone(), group=group)


class LocalScatter(PeerReduceScatter):
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self._rings.handle(input_tensor)
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, dtype=torch.float32, out=output_tensor)


def trains_with_these_buffers(replicas: int) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("replicas", "shards"))
    shards = mesh["shards"]
    mesh = mesh if replicas > 1 else shards
    results = []
    for reshard, ours in itertools.product((False, True), (False, True)):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))  # groups of one size
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        for module in (*model, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        reduce_by_sums(model)
        gather, scatter = Local(shards.get_group()), LocalScatter(shards.get_group(), torch.bfloat16)
        for module in model:
            module.set_gradient_divide_factor(1.0)
            if ours:
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(scatter)
        losses = []
        for step in range(3):
            for _ in range(2):  # microbatches
                loss = model(torch.full((3, 6), step + 1.0)).square().sum()
                loss.backward()
            with torch.no_grad():
                losses += [loss.detach(), *(model(torch.ones(2, 6)).sum() for _ in range(2))]  # as validation does
            for module in model:
                module.reshard()
            for parameter in model.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.01)
                parameter.grad = None
        results.append(torch.stack(losses))
        made = [of_size for rings in (gather._rings, scatter._rings) for of_size in rings._buffers.values()]
        in_all = sum(memory.nbytes for of_size in made for memory, _ in of_size)
        assert in_all == (5 * 2 * (36 + 6) if ours else 0)  # as many as are planned
    assert buffers_bytes([84, 84]) == 5 * 2 * 2**20
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("replicas", [1, 2])
def test_fsdp_needs_no_more_buffers(replicas, tmp_path, monkeypatch):
    """With and without weights kept for the backward, over microbatches and validations; with HSDP too."""
    symmetric = peer_collectives.symmetric_memory
    monkeypatch.setattr(symmetric, "empty", lambda n, dtype, device: torch.empty(n, dtype=dtype))
    monkeypatch.setattr(symmetric, "rendezvous", lambda memory, group_name: memory)
    work = functools.partial(trains_with_these_buffers, replicas)
    assert in_gloo_forks(2 * replicas, tmp_path / "store", work)
