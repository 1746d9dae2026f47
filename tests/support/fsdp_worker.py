"""Short training runs on the CPU, in several processes; test_fsdp.py starts it.

Usage: fsdp_worker.py OUT PROCESSES JSON, where JSON is a list of runs. The processes are forks of
this one, because importing torch takes longer than training does. A run has replicate, shard
(degrees), mode (activation checkpointing), param_dtype, backend, optimizer, non_finite_on (a rank
whose loss is NaN) and infinite_on (a rank with one infinite element in its gradients). Every rank
trains on its part of the same batches; rank 0 writes what came of it to OUT.
"""

import json
import sys
from unittest import mock

import torch
import torch.distributed as dist

# TorchTitan reads the device type when it is imported, and knows no CPU.
with mock.patch("torch._utils._get_available_device_type", return_value="cpu"):
    from torchtitan.distributed import ParallelDims
    from torchtitan.distributed import utils as dist_utils
from torch.distributed.tensor import DTensor

from momoe_titan.model import parallelize_momoe_llama
from tests.support.forks import in_gloo_forks
from tests.support.tiny import (
    batch,
    build,
    job_config,
    loss_of,
    moes,
    optimizers_for,
    tiny_args,
)

STEPS = 3


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run(settings) -> dict:
    rank, world = dist.get_rank(), dist.get_world_size()
    dims = ParallelDims(
        dp_replicate=settings["replicate"],
        dp_shard=settings["shard"],
        cp=1,
        tp=1,
        pp=1,
        ep=1,
        etp=1,
        world_size=world,
    )
    dims.build_mesh()
    config = job_config()
    config.training.mixed_precision_param = settings["param_dtype"]
    config.activation_checkpoint.mode = settings["mode"]
    config.activation_checkpoint.selective_ac_option = "op"
    dist_utils.set_determinism(dims, torch.device("cpu"), config.debug, ["pp"])
    # 5 experts on 2 or 4 ranks: shards of different size, and an empty one on 4
    rule = {"load_balance_rule": settings.get("rule", "sign"), "tie_word_embeddings": settings.get("tied", False)}
    args = tiny_args(backend=settings["backend"], load_balance_off_layers=[2], **rule)
    model = build(args, 0, lambda m: parallelize_momoe_llama(m, dims, config))
    if settings.get("tied"):
        assert model.output.weight is model.tok_embeddings.weight
    init = {
        name.replace("_checkpoint_wrapped_module.", "").removeprefix("module."): whole(p).clone()
        for name, p in model.named_parameters()
    }
    optimizers = optimizers_for(model, dims, implementation=settings["optimizer"])
    losses, counts = [], []
    for step in range(STEPS):
        tokens, labels = (t.chunk(world)[rank] for t in batch(step))
        # DDP averages gradients over its ranks; sharded data parallelism is told not to
        scale = 1 if settings["shard"] == 1 else 1 / world
        loss = loss_of(model, tokens, labels, scale)
        if settings["non_finite_on"] == rank and step == 1:
            loss = loss * float("nan")
        loss.backward()
        if settings.get("infinite_on") == rank and step == 1:
            grad = model.layers["2"].moe.experts.w2.grad
            (grad.to_local() if isinstance(grad, DTensor) else grad)[-1, -1, -1] = float("inf")
        total = loss.detach() / (world if settings["shard"] == 1 else 1)
        dist.all_reduce(total)
        losses.append(total)
        dist_utils.clip_grad_norm_(list(model.parameters()), 1.0)
        optimizers.step()
        optimizers.zero_grad()
        counts.append(optimizers.load_balancer.counts_LE)
    result = {
        "losses": torch.stack(losses),
        "counts": torch.stack(counts),
        "bias": torch.stack([moe.expert_bias for moe in moes(model)]),
        "init": init,
    }
    everyone = [None] * world
    dist.all_gather_object(everyone, (result["counts"].tolist(), result["bias"].tolist()))
    assert all(other == everyone[0] for other in everyone), "ranks disagree"
    assert not any(moe.tokens_per_expert.any() for moe in moes(model))
    return result


def worker(out: str, runs: list[dict]) -> None:
    results = [run(settings) for settings in runs]
    if dist.get_rank() == 0:
        torch.save(results, out)


def main(out: str, processes: str, runs: str) -> None:
    torch.set_num_threads(1)
    sys.exit(not in_gloo_forks(int(processes), out + ".store", lambda: worker(out, json.loads(runs))))


if __name__ == "__main__":
    main(*sys.argv[1:])
