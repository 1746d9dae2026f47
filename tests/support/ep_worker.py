"""Short training runs with expert parallelism on the CPU, on 2 and 4 processes.

The processes are forks of the test's own, because importing torch takes longer than training does.
A run has replicate, shard, ep (degrees), mode (activation checkpointing), compile, param_dtype, backend, save_percent,
num_experts, dispatch (momoe.expert_dispatch), keeps (FSDP keeps gathered weights for the backward), peers
(tokens travel as between GPUs that read each other's memory), starve (the last of `ep` ranks gets no token), room
(memory for so many times the z that a rank saves in a layer at its fair share of tokens; 0: no budget)
and save (folder of a checkpoint to write). Every rank trains on its part of the same batches. The
results go to FOLDER/PROCESSES.pt.
"""

import contextlib
import functools
import gc
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

# TorchTitan reads the device type when it is imported, and knows no CPU.
with mock.patch("torch._utils._get_available_device_type", return_value="cpu"):
    from torchtitan.distributed import ParallelDims, parallel_dims
    from torchtitan.distributed import utils as dist_utils
from torch.distributed.checkpoint import save
from torch.distributed.tensor import DTensor

from momoe_titan.memory.activation_eviction import ActivationBudget
from momoe_titan.memory.plan import CUBLAS_BYTES, MemoryPlan, Moment
from momoe_titan.model import parallelize_momoe_llama
from momoe_titan.model.parallel import peer_memory
from momoe_titan.model.parallel.dispatch import AsyncAllToAll
from tests.support.fake_peers import FakePeers
from tests.support.forks import in_gloo_forks
from tests.support.tiny import (
    SEQ,
    batch,
    build,
    job_config,
    loss_of,
    moes,
    optimizers_for,
    tiny_args,
)

STEPS = 3


def args_for(settings):
    return tiny_args(
        moe={"num_experts": settings["num_experts"]},
        save_percent=[settings["save_percent"]],
        backend=settings["backend"],
        load_balance_off_layers=[2],
        expert_dispatch=settings["dispatch"],
    )


def starve(model, num_experts):
    """Keep tokens from choosing any of these last experts: their scores are at most 1."""
    for moe in moes(model):
        moe.expert_bias[-num_experts:] = -10


def attach_budget(model, settings, world) -> ActivationBudget:
    """As if nothing but z took memory."""
    args, layers = model.model_args, [moe.experts for moe in moes(model)]
    z = [(str(i), 8 * SEQ // world * args.moe_args.top_k * 2 * args.moe_hidden_dim * 4) for i in range(len(layers))]
    moments = [Moment("loss", z[:i], 0, {}) for i in range(len(z) + 1)]
    names = [name for name, _ in z]
    plan = MemoryPlan(names, moments, {}, 1, layer_growth={name: (0, 0) for name in names})
    budget = ActivationBudget(plan, layers)
    budget.room = settings["room"] * z[0][1] + CUBLAS_BYTES
    for layer in layers:
        layer.activation_budget = budget
    return budget


def clean(name):
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(settings, peers: FakePeers) -> dict:
    with peers.connected() if settings["peers"] else contextlib.nullcontext():
        return _run(settings)


def _run(settings) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    dims = ParallelDims(
        dp_replicate=settings["replicate"],
        dp_shard=settings["shard"],
        cp=1,
        tp=1,
        pp=1,
        ep=settings["ep"],
        etp=1,
        world_size=world,
    )
    dims.build_mesh()
    config = job_config()
    config.training.mixed_precision_param = settings["param_dtype"]
    if settings["keeps"]:
        config.parallelism.fsdp_reshard_after_forward = "never"
    config.activation_checkpoint.mode = settings["mode"]
    config.activation_checkpoint.selective_ac_option = "op"
    config.compile.enable, config.compile.backend = settings["compile"], "aot_eager"
    dist_utils.set_determinism(dims, torch.device("cpu"), config.debug, ["pp"])
    model = build(args_for(settings), 0, lambda m: parallelize_momoe_llama(m, dims, config))
    if settings["starve"]:
        starve(model, settings["num_experts"] // settings["ep"])
    budget = attach_budget(model, settings, world) if settings["room"] else None
    optimizers = optimizers_for(model, dims, implementation="fused")
    losses, counts, norms, grads = [], [], [], {}
    gc.collect()
    gc.disable()  # as TorchTitan does: what a step leaves behind in cycles would stay
    for step in range(STEPS):
        tokens, labels = (t.chunk(world)[rank] for t in batch(step))
        loss = loss_of(model, tokens, labels, 1 / world)
        held = [] if budget is None else [(i, storage().nbytes()) for i, storage in budget._saved]
        loss.backward()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total)
        if step == 0:
            grads = {clean(n): whole(p.grad).clone() for n, p in model.named_parameters()}
        norms.append(dist_utils.clip_grad_norm_(list(model.parameters()), 1.0, ep_enabled=True))
        optimizers.step()
        optimizers.zero_grad()
        counts.append(optimizers.load_balancer.counts_LE)
    del loss  # and its graph
    assert not any(type(o) is AsyncAllToAll for o in gc.get_objects()), "a step leaves tokens behind"
    gc.enable()
    result = {
        "losses": torch.stack(losses),
        "norms": torch.stack(norms),
        "counts": torch.stack(counts),
        "bias": torch.stack([moe.expert_bias for moe in moes(model)]),
        "grads": grads,
        "weights": {clean(n): whole(p.detach()).clone() for n, p in model.named_parameters()},
    }
    everyone = [None] * world
    mine = [result[name].tolist() for name in ("counts", "bias", "norms")]
    dist.all_gather_object(everyone, mine)
    assert all(other == mine for other in everyone), "ranks disagree"
    if settings["peers"]:
        (copies,) = peer_memory._peers.values()
        result["staged"] = set(copies._rings)
    if budget is not None:
        assert all(storage() is None for _, storage in budget._saved), "z outlives its backward"
        dist.all_gather_object(everyone, (budget.evicted_bytes, held))
        result["shed"] = everyone
    if settings["save"]:
        save({clean(n): t for n, t in model.state_dict().items()}, checkpoint_id=settings["save"])
    return result


def worker(runs: list[dict], out: str, peers: FakePeers) -> None:
    parallel_dims.device_type = "cpu"  # whoever imported it first
    torch._dynamo.reset()
    results = [run(settings, peers) for settings in runs]
    if dist.get_rank() == 0:
        torch.save(results, out)


def train(folder: Path, runs: dict[int, list[dict]]) -> bool:
    """Whether all runs of these numbers of processes ended well."""
    return all(
        in_gloo_forks(
            world,
            f"{folder}/store{world}",
            functools.partial(worker, its_runs, f"{folder}/{world}.pt", FakePeers(world)),
        )
        for world, its_runs in runs.items()
    )
