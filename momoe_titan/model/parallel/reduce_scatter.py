"""A reduce-scatter for FSDP that sends gradients in the dtype in which they were computed, and adds in float32."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from momoe_titan.kernels.sum_parts import sum_parts


class NarrowReduceScatter:
    """What `FSDPModule.set_custom_reduce_scatter` takes, for gradients narrower than float32.

    FSDP asks for a float32 reduction of such gradients by widening them first. NCCL then sends twice the bytes. Here
    every rank gets the others' gradients of its shard as they are, by an all-to-all, and adds them in float32. On two
    ranks the sums are the same to the bit; on more they differ from NCCL's by the order of the summands.

    Args:
        dtype: of the gradients.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._input_is_next = True

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP asks for the input of a reduction and then for its output, both float32."""
        is_input, self._input_is_next = self._input_is_next, not self._input_is_next
        return torch.empty(*size, dtype=self.dtype if is_input else dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        """Sums over ranks, whatever `op` says: FSDP is told not to divide gradients."""
        assert input_tensor.dtype == self.dtype and output_tensor.dtype == torch.float32 and not async_op
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        sum_parts(output_tensor, received.view(group.size(), -1))
