"""Four processes load a Hugging Face folder into sharded weights and save it again.

Usage: hf_worker.py FOLDER, with a folder "whole" in it; tests/model/test_hugging_face_weights.py starts it.
The processes are forks of this one, because importing torch takes longer.
"""

import sys
from types import SimpleNamespace
from unittest import mock

import torch

# TorchTitan reads the device type when it is imported, and knows no CPU.
with mock.patch("torch._utils._get_available_device_type", return_value="cpu"):
    from torchtitan.distributed import ParallelDims
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torchtitan.components.checkpoint import (
    MODEL,
    AsyncMode,
    CheckpointManager,
    ModelWrapper,
)

from momoe_titan.model import MomoeStateDictAdapter, parallelize_momoe_llama
from tests.support.forks import in_gloo_forks
from tests.support.tiny import build, job_config, tiny_args


def parallel(replicate: int, shard: int, ep: int = 1, tp: int = 1):
    dims = ParallelDims(dp_replicate=replicate, dp_shard=shard, cp=1, tp=tp, pp=1, ep=ep, etp=1, world_size=4)
    dims.build_mesh()
    return build(tiny_args(), 0, lambda model: parallelize_momoe_llama(model, dims, job_config()))


def by_hand(names: tuple[str, str], placements_of):
    """State dict of a model with weights sharded as `placements_of(name)` says, over a 2x2 mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    state_dict = build(tiny_args({"num_experts": 5}), 0).state_dict()
    for name, tensor in state_dict.items():
        if not name.endswith("weight") and ".experts." not in name:
            continue
        whole = DTensor.from_local(tensor, mesh, [Replicate(), Replicate()])
        state_dict[name] = whole.redistribute(mesh, placements_of(name))
    return state_dict


def experts_and_columns(name: str):
    """As expert and tensor parallelism do."""
    if name.endswith("experts.w1"):
        return [Shard(0), Shard(3)]
    if name.endswith("experts.w2"):
        return [Shard(0), Shard(1)]
    return [Replicate(), Shard(0) if name.endswith(("wq.weight", "wk.weight")) else Replicate()]


def experts_and_rows(name: str):
    """As FSDP does where there are more ranks than experts."""
    return [Shard(0), Shard(1)] if ".experts.w" in name else [Shard(0), Replicate()]


def strided(name: str):
    """As FSDP over expert or tensor parallelism does."""
    if ".experts.w" in name or name.endswith(("wq.weight", "wk.weight")):
        return [_StridedShard(0, split_factor=2), Shard(0)]
    return [Shard(0), Replicate()]


def columns_twice(name: str):
    """As FSDP over expert tensor parallelism does where there are more ranks than experts."""
    if name.endswith("experts.w1"):
        return [Shard(1), Shard(3)]
    if name.endswith("experts.w2"):
        return [_StridedShard(1, split_factor=2), Shard(1)]
    return [Shard(0), Replicate()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check(case: str, folder: str, states, read) -> None:
    manager = SimpleNamespace(sd_adapter=MomoeStateDictAdapter(tiny_args(), None), states={MODEL: states})
    CheckpointManager.dcp_load(manager, states.state_dict(), f"{folder}/whole", from_hf=True, from_quantized=False)
    for name, tensor in states.state_dict().items():
        assert torch.equal(whole(tensor), read[name]), (case, name)
    CheckpointManager.dcp_save(manager, states.state_dict(), f"{folder}/{case}", AsyncMode.DISABLED, to_hf=True)


def worker(folder: str) -> None:
    plain = build(tiny_args(), 0)
    manager = SimpleNamespace(sd_adapter=MomoeStateDictAdapter(tiny_args(), None), states={MODEL: ModelWrapper(plain)})
    CheckpointManager.dcp_load(manager, plain.state_dict(), f"{folder}/whole", from_hf=True, from_quantized=False)
    read = plain.state_dict()
    # 5 experts over 4 ranks: shards of different size and an empty one; and half a head of keys
    check("fsdp", folder, ModelWrapper(parallel(1, 4)), read)
    check("hsdp", folder, ModelWrapper(parallel(2, 2)), read)
    check("expert parallelism", folder, ModelWrapper(parallel(1, 4, ep=2)), read)
    check("tensor parallelism", folder, ModelWrapper(parallel(1, 2, tp=2)), read)
    for case, names, placements_of in (
        ("experts and their columns", ("ep", "etp"), experts_and_columns),
        ("experts and their rows", ("ep", "efsdp"), experts_and_rows),
        ("strided", ("efsdp", "ep"), strided),
        ("columns sharded twice", ("efsdp", "etp"), columns_twice),
    ):
        state_dict = by_hand(names, placements_of)
        states = SimpleNamespace(state_dict=lambda d=state_dict: d, load_state_dict=state_dict.update)
        check(case, folder, states, read)


def main(folder: str) -> None:
    torch.set_num_threads(1)
    sys.exit(not in_gloo_forks(4, f"{folder}/store", lambda: worker(folder)))


if __name__ == "__main__":
    main(sys.argv[1])
