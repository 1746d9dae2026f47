"""FSDP and HSDP applied to a model: what is gathered together, when, and along which dimension weights are divided."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra.parallelize import disable_fsdp_gradient_division
from torchtitan.tools.logging import logger

from momoe_titan.model.model import MomoeLlama, blocks_of


def apply_fsdp(model: MomoeLlama, parallel_dims: ParallelDims, job_config: JobConfig) -> None:
    """Shard the weights over the ranks of FSDP, in each replica of HSDP.

    A group of weights, which one collective gathers, is a block, the embedding, or the last norm with the output layer;
    with expert parallelism also the experts of a layer. What `parallelism.fsdp_reshard_after_forward` says is
    TorchTitan's: "default" keeps gathered weights for the backward only in a pipeline, and those of the last group.
    Weights are divided along their first dimension, the experts' along the second where there are more ranks than
    experts. Gradients are summed over ranks, not divided.
    """
    training, reshard = job_config.training, job_config.parallelism.fsdp_reshard_after_forward
    replicate = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    mesh = parallel_dims.get_mesh([*replicate, "fsdp"])
    config: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        ),
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
        placement = None
        if block.moe_enabled and parallel_dims.ep_enabled:
            experts_mesh = parallel_dims.get_mesh([*replicate, "efsdp"])
            of_experts = _experts_placement(block, parallel_dims.get_mesh("efsdp").size(), parallel_dims.ep)
            fully_shard(block.moe.experts, **{**config, "mesh": experts_mesh}, shard_placement_fn=of_experts)
            group.append(block.moe.experts)
        elif block.moe_enabled:
            placement = _experts_placement(block, ranks)
        fully_shard(block, **config, shard_placement_fn=placement)
        groups.append(group)
    groups.append(last)
    fully_shard(model, **config)
    disable_fsdp_gradient_division(model)
    if parallel_dims.ep_enabled:
        _prefetch([group for group in groups if group])
    if mesh.device_type == "cpu":
        reduce_by_sums(model)
    logger.info(f"Applied {'HSDP' if replicate else 'FSDP'} to the model")


def _ends(model: MomoeLlama) -> tuple[list[nn.Module], list[nn.Module]]:
    """What comes before the blocks and after them; a pipeline stage may lack both."""
    before, after = [model.tok_embeddings], [model.norm, model.output]
    return [m for m in before if m is not None], [m for m in after if m is not None]


def _experts_placement(block: nn.Module, ranks: int, expert_ranks: int = 1) -> Callable[[nn.Parameter], Any] | None:
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
        logger.warning(
            f"FSDP over {ranks} ranks leaves {ranks - num_experts} of them without any of the {num_experts} "
            "experts, and the others with that much more: set parallelism.expert_parallel_degree, or replicate (HSDP)"
        )
        return None
    return lambda parameter: Shard(1) if parameter in weights else Shard(0)


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


def reduce_by_sums(model: nn.Module) -> None:
    """Make FSDP sum gradients over ranks without dividing them.

    TorchTitan asks for gradients divided by 1, for which FSDP uses a reduction that gloo lacks.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
