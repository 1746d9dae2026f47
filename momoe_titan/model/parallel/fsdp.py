"""FSDP and HSDP applied to a model: what is gathered together, when, and along which dimension weights are divided."""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra.parallelize import disable_fsdp_gradient_division
from torchtitan.tools.logging import logger

from momoe_titan.config.section import Momoe
from momoe_titan.model.experts import MomoeExperts
from momoe_titan.model.model import MomoeLlama, blocks_of
from momoe_titan.model.parallel.peer_collectives import PeerAllGather, PeerReduceScatter, buffers_bytes
from momoe_titan.model.parallel.peer_memory import RANKS_OF_A_HOST, connect, peers_of
from momoe_titan.model.parallel.reduce_scatter import NarrowReduceScatter

# A model with a larger group of weights is left to NCCL: the buffers for copies, five of a group, are kept.
MOST_COPIED = 256 * 2**20  # bytes


def apply_fsdp(model: MomoeLlama, parallel_dims: ParallelDims, job_config: JobConfig) -> None:
    """Shard the weights over the ranks of FSDP, in each replica of HSDP.

    A group of weights, which one collective gathers, is a block, the embedding, or the last norm with the output
    layer; with expert parallelism also the experts of a layer, unless `leaves_experts` says that FSDP has no part
    in them. What `parallelism.fsdp_reshard_after_forward` says is TorchTitan's: "default" keeps gathered weights
    for the backward only in a pipeline, and those of the last group. Weights are divided along their first
    dimension, the experts' along the second where there are more ranks than experts. Gradients are summed over
    ranks, not divided. Within a host, they are sent as narrow as they were computed where
    `training.mixed_precision_reduce` is wider, and summed in that; see also `peer_collectives`.
    """
    training, reshard = job_config.training, job_config.parallelism.fsdp_reshard_after_forward
    replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    mesh = parallel_dims.get_mesh([*replicate, "fsdp"])
    config: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": _precision(job_config),
        "reshard_after_forward": reshard == "always" or (reshard == "default" and not parallel_dims.pp_enabled),
    }
    if training.enable_cpu_offload:
        config["offload_policy"] = CPUOffloadPolicy()
    first, last = _ends(model)
    if model.model_args.tie_word_embeddings:
        # A weight that two modules share must be in one group, which begins and ends the forward: nothing is to be
        # freed in between.
        first, last = first + last, []
        fully_shard(first, **{**config, "reshard_after_forward": False})
    else:
        for ends, reshards in ((first, config["reshard_after_forward"]), (last, reshard == "always")):
            if ends:
                fully_shard(ends, **{**config, "reshard_after_forward": reshards})
    groups, ranks = [first], parallel_dims.get_mesh("fsdp").size()
    for block in blocks_of(model):
        group: list[nn.Module] = [block]
        placement, left = None, set()
        if block.moe_enabled and leaves_experts(block.moe.experts, parallel_dims, job_config):
            left = set(block.moe.experts.parameters())
            block.moe.experts.compute_dtype = config["mp_policy"].param_dtype
        elif block.moe_enabled and parallel_dims.ep_enabled:
            experts_mesh = parallel_dims.get_mesh([*replicate, "efsdp"])
            of_experts = _experts_placement(block, parallel_dims.get_mesh("efsdp").size(), parallel_dims.ep)
            fully_shard(block.moe.experts, **{**config, "mesh": experts_mesh}, shard_placement_fn=of_experts)
            group.append(block.moe.experts)
        elif block.moe_enabled:
            placement = _experts_placement(block, ranks)
        fully_shard(block, **config, shard_placement_fn=placement, ignored_params=left)
        groups.append(group)
    groups.append(last)
    fully_shard(model, **config)
    disable_fsdp_gradient_division(model)
    if parallel_dims.ep_enabled:
        _prefetch([group for group in groups if group])
    _set_collectives(groups, parallel_dims, config["mp_policy"], getattr(job_config, "momoe", Momoe()).fsdp_copies)
    if mesh.device_type == "cpu":
        reduce_by_sums(model)
    logger.info(f"Applied {'HSDP' if replicate else 'FSDP'} to the model")


def _precision(job_config: JobConfig) -> MixedPrecisionPolicy:
    training = job_config.training
    return MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
    )


def leaves_experts(experts: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> bool:
    """Whether FSDP leaves a layer's experts to expert parallelism: each rank has its own, nothing to gather or reduce.

    So it is where expert parallelism has all ranks of FSDP, and FSDP would keep the narrow weights between forward and
    backward. It would copy weights and gradients only to cast them; `ComputeWeights` has the optimizer do that.
    """
    owned = parallel_dims.ep_enabled and parallel_dims.get_mesh("efsdp").size() == 1
    keeps = job_config.parallelism.fsdp_reshard_after_forward == "never"
    shares = parallel_dims.dp_replicate_enabled or parallel_dims.pp_enabled or job_config.training.enable_cpu_offload
    return owned and keeps and not shares and isinstance(experts, MomoeExperts)


def _ends(model: MomoeLlama) -> tuple[list[nn.Module], list[nn.Module]]:
    """What comes before the blocks and after them; a pipeline stage may lack both."""
    before, after = [model.tok_embeddings], [model.norm, model.output]
    return [m for m in before if m is not None], [m for m in after if m is not None]


def _experts_placement(block: Any, ranks: int, expert_ranks: int = 1) -> Callable[[nn.Parameter], Any] | None:
    """Along which dimension FSDP divides each weight of a block, or of its experts; None for the first.

    Where there are more ranks than experts, the experts are divided along their second dimension. If that cannot be
    divided evenly, or tensor parallelism has divided it, some ranks stay without any; a warning says so.

    Args:
        ranks: among which FSDP divides each weight.
        expert_ranks: among which expert parallelism has divided the experts before.
    """
    experts = block.moe.experts
    num_experts = block.moe.num_experts // expert_ranks
    if ranks <= num_experts:
        return None
    weights = set(experts.parameters())
    if any(weight.shape[1] % ranks or _is_divided(weight, 1) for weight in weights):
        _warn_once(  # not for each layer
            f"FSDP over {ranks} ranks leaves {ranks - num_experts} of them without any of the {num_experts} "
            "experts, and the others with that much more: set parallelism.expert_parallel_degree, or replicate (HSDP)"
        )
        return None
    return lambda parameter: Shard(1) if parameter in weights else Shard(0)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _is_divided(weight: nn.Parameter, dim: int) -> bool:
    return isinstance(weight, DTensor) and any(p.is_shard(dim) for p in weight.placements)


def _prefetch(groups: Sequence[Sequence[nn.Module]]) -> None:
    """Have each group gather the next one before it computes, forward and backward.

    FSDP does that by itself where the host is ahead of the device, which it is not where it waits for the sizes that
    expert parallelism sends.

    Args:
        groups: in the order of the forward; each begins with the module whose forward and backward enclose the others'.
    """
    for (outer, *_), following in itertools.pairwise(groups):
        cast(FSDPModule, outer).set_modules_to_forward_prefetch(cast(Any, following))
    for (outer, *_), following in itertools.pairwise(groups[::-1]):
        cast(FSDPModule, outer).set_modules_to_backward_prefetch(cast(Any, following))


def _set_collectives(
    groups: Sequence[Sequence[nn.Module]], parallel_dims: ParallelDims, policy: MixedPrecisionPolicy, copies: bool
) -> None:
    """Give each group collectives of ours where they are faster; say where `momoe.fsdp_copies` cannot be had.

    Args:
        groups: the modules of each group of weights; behind a block its experts, if they are a group of their own.
        copies: what `momoe.fsdp_copies` says.
    """
    for kind, enabled in (("pipeline", parallel_dims.pp_enabled), ("expert", parallel_dims.ep_enabled)):
        if copies and enabled:
            _say_why_not(f"there is {kind} parallelism", parallel_dims.get_mesh("fsdp"))
            copies = False
    if parallel_dims.pp_enabled:  # FSDP adds up microbatches in the wider dtype before it reduces them
        return
    _exchange_within_host(groups, parallel_dims.get_mesh("fsdp"), policy, copies)
    if parallel_dims.ep_enabled:
        experts = [group[1:] for group in groups[1:-1] if group[1:]]
        _exchange_within_host(experts, parallel_dims.get_mesh("efsdp"), policy, copies=False)


def _reason_for_nccl(mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> str | None:
    """Why FSDP's own reduction is to be used, or None."""
    narrow, ranks = policy.param_dtype, dist.get_process_group_ranks(mesh.get_group())
    hosts = {rank // int(os.environ.get("LOCAL_WORLD_SIZE", RANKS_OF_A_HOST)) for rank in ranks}
    if narrow is None or narrow.itemsize >= 4 or policy.reduce_dtype != torch.float32:
        return "training.mixed_precision_param is not narrower than training.mixed_precision_reduce, float32"
    # Between hosts NCCL's rings carry less than an all-to-all.
    return "FSDP's ranks are on several hosts" if len(hosts) > 1 else None


def _exchange_within_host(
    groups: Sequence[Sequence[nn.Module]], mesh: DeviceMesh, policy: MixedPrecisionPolicy, copies: bool
) -> None:
    """Have the ranks of a host exchange gradients in the dtype they have and sum them in float32; and copy by their
    copy engines, where GPUs can read each other's memory.

    Args:
        groups: the modules of each group of weights.
        mesh: the ranks that FSDP divides their weights among.
        copies: whether copy engines may be used.
    """
    narrow, reason = policy.param_dtype, _reason_for_nccl(mesh, policy)
    if narrow is None or reason is not None:
        if copies:
            _say_why_not(reason, mesh)
        return
    if copies and _sizes(groups, narrow) is None:
        _say_why_not(f"a group of weights has more than {MOST_COPIED // 2**20} MiB", mesh)
        copies = False
    peers = _peer_collectives(mesh, narrow) if copies else None
    for modules in filter(None, groups):
        fsdp: Any = modules[0]  # one speaks for its group
        if peers is not None:
            fsdp.set_custom_all_gather(peers[0])
            fsdp.set_custom_reduce_scatter(peers[1])
        else:
            fsdp.set_custom_reduce_scatter(NarrowReduceScatter(narrow))


def _peer_collectives(mesh: DeviceMesh, narrow: torch.dtype) -> tuple[PeerAllGather, PeerReduceScatter] | None:
    group = mesh.get_group()
    connect(group)
    if peers_of(group.group_name) is None:
        _say_why_not("FSDP's ranks are no GPUs that can read each other's memory", mesh)
        return None
    return PeerAllGather(group), PeerReduceScatter(group, narrow)


def _say_why_not(reason: str | None, mesh: DeviceMesh) -> None:
    if mesh.device_type != "cpu":  # where nobody expects it
        logger.info(f"momoe.fsdp_copies has no effect: {reason}")


def _sizes(groups: Sequence[Sequence[nn.Module]], dtype: torch.dtype) -> list[int] | None:
    """Bytes of the weights of each group, gathered in this dtype; None where one is too large for copies."""
    weights = ([p.numel() for module in modules for p in module.parameters()] for modules in groups if modules)
    sizes = [sum(of_group) * dtype.itemsize for of_group in weights]
    return None if max(sizes, default=0) > MOST_COPIED else sizes


def staging_bytes(model: MomoeLlama, parallel_dims: ParallelDims, job_config: JobConfig) -> int:
    """What the buffers of `momoe.fsdp_copies` take of a GPU beside PyTorch's memory, where GPUs can read each other's.

    Args:
        model: after `apply_fsdp`, or before it.
    """
    wanted = parallel_dims.fsdp_enabled and getattr(job_config, "momoe", Momoe()).fsdp_copies
    if not wanted or parallel_dims.pp_enabled or parallel_dims.ep_enabled:
        return 0
    policy = _precision(job_config)
    narrow = policy.param_dtype
    if narrow is None or _reason_for_nccl(parallel_dims.get_mesh("fsdp"), policy) is not None:
        return 0
    first, last = _ends(model)
    ends = [first + last] if model.model_args.tie_word_embeddings else [first, last]
    return buffers_bytes(_sizes([*ends, *([block] for block in blocks_of(model))], narrow) or [])


def reduce_by_sums(model: nn.Module) -> None:
    """Make FSDP sum gradients over ranks without dividing them.

    TorchTitan asks for gradients divided by 1, for which FSDP uses a reduction that gloo lacks.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
