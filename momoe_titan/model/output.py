"""The output layer, which gives logits, or for labels the loss without ever holding all logits."""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from momoe_titan.kernels.cross_entropy import Shard, linear_cross_entropy


class OutputLayer(nn.Linear):
    """A linear layer without bias from D features to V logits, with the cross entropy built in.

    Args:
        dim: D.
        vocab_size: V.
        chunk_mib: MiB of logits to hold at a time where labels are given.

    Attributes:
        gathers_logits: under tensor parallelism, which shards the weight by rows: whether logits are whole and plain
            tensors on every rank, or DTensors with a part of the vocabulary each.
    """

    def __init__(self, dim: int, vocab_size: int, chunk_mib: float):
        super().__init__(dim, vocab_size, bias=False)
        self.chunk_bytes = int(chunk_mib * 2**20)
        self.gathers_logits = False

    def forward(self, input: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits, or the sum of the cross entropies.

        Args:
            input: (B, L, D); under tensor parallelism a DTensor, sharded by the sequence.
            labels: (B, L) int64, whole on every rank of tensor parallelism; -100 for tokens without a loss.

        Returns:
            Without labels (B, L, V). With labels the sum over the tokens, (1) float32: pipeline schedules concatenate
            what their microbatches return.
        """
        if isinstance(input, DTensor):
            input = input.redistribute(placements=[Replicate()] * input.device_mesh.ndim)
        if labels is None:
            logits = F.linear(input, self.weight)
            if self.gathers_logits and isinstance(logits, DTensor):
                logits = logits.redistribute(placements=[Replicate()]).to_local()
            return logits
        weight, shard = self.weight, None
        if isinstance(weight, DTensor):
            shard = _shard_of(weight)
            weight = weight.to_local()
        if isinstance(input, DTensor):
            # Each rank's classes give a part of the gradient.
            input = input.to_local(grad_placements=[Partial()])
        loss = linear_cross_entropy(
            input.reshape(-1, input.shape[-1]),
            weight,
            labels.reshape(-1),
            dtype=_product_dtype(weight),
            chunk_bytes=self.chunk_bytes,
            shard=shard,
        )
        return torch.stack((loss,))  # not a view, of which FSDP warns


def _product_dtype(weight: torch.Tensor) -> torch.dtype:
    """What F.linear would compute in."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _shard_of(weight_VD: DTensor) -> Shard:
    """The classes of this rank, by the rule by which DTensor cuts rows."""
    mesh, num_classes = weight_VD.device_mesh, weight_VD.shape[0]
    most = -(-num_classes // mesh.size())
    first = min(most * mesh.get_local_rank(), num_classes)
    return Shard(first, num_classes, functools.partial(_gather, mesh))


def _gather(mesh: DeviceMesh, stats_2C: torch.Tensor) -> torch.Tensor:
    """(2, C) of each rank -> (ranks, 2, C)."""
    return functional.all_gather_tensor(stats_2C, 0, mesh).view(mesh.size(), *stats_2C.shape)
