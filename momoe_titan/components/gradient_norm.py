"""The norm of a job's whole gradient, over all ranks that have a part of it, from one reading of each gradient."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from momoe_titan.kernels.multi_tensor import TL_DTYPES, SquareSum, runs_here


class GradientNorm:
    """Computes the 2-norm that TorchTitan's `clip_grad_norm_` computes, and leaves the gradients alone.

    Squares are summed first over this rank's parts, then over the ranks that share a parameter: those of FSDP, of
    expert and of tensor parallelism. What ranks hold alike counts once. The same gradients give the same bits. The host
    does not wait for the device.

    Args:
        stages: the ranks of pipeline parallelism, each with parameters of its own, or None.
    """

    def __init__(self, stages: ProcessGroup | None = None):
        self.stages = stages
        self._square_sums: dict[tuple[ProcessGroup, ...], SquareSum] = {}

    @torch.no_grad()
    def __call__(self, parameters: Iterable[Tensor], device: torch.device) -> Tensor:
        """The norm, float32 of no dimension.

        Args:
            parameters: whose `grad` counts, where there is one.
            device: of the result where there is no gradient.
        """
        # by the groups over which they are sharded
        parts: dict[tuple[ProcessGroup, ...], list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                groups, part = _part(parameter.grad)
                parts.setdefault(groups, []).append(part)
        sums = {groups: self._sum(groups, of_groups) for groups, of_groups in parts.items()}
        for group in dict.fromkeys(group for groups in sums for group in groups):
            members = [groups for groups in sums if group in groups]
            totals = torch.stack([sums[groups] for groups in members])
            torch.distributed.all_reduce(totals, group=group)
            sums.update(zip(members, totals, strict=True))
        total = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), device=device)
        if self.stages is not None:
            torch.distributed.all_reduce(total, group=self.stages)
        return total.sqrt()

    def _sum(self, groups: tuple[ProcessGroup, ...], gradients: list[Tensor]) -> Tensor:
        """The sum of squares of this rank's parts, float32."""
        if runs_here(gradients[0]) and all(g.dtype in TL_DTYPES for g in gradients):
            square_sum = self._square_sums.setdefault(groups, SquareSum())
            return square_sum([g.contiguous() for g in gradients])
        # no public name
        norms = torch._foreach_norm(gradients, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage] - as above
        return torch.stack(norms).square().sum()


def _part(gradient: Tensor) -> tuple[tuple[ProcessGroup, ...], Tensor]:
    """The groups of ranks among which a gradient is divided, and this rank's part."""
    if not isinstance(gradient, DTensor):
        return (), gradient
    if any(placement.is_partial() for placement in gradient.placements):
        whole = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
        gradient = gradient.redistribute(placements=whole)
    mesh = gradient.device_mesh
    divided = [dim for dim, p in enumerate(gradient.placements) if not p.is_replicate() and mesh.size(dim) > 1]
    return tuple(mesh.get_group(dim) for dim in divided), gradient.to_local()
