"""Buffers that stay float32 when their module is cast to a narrower dtype."""

import torch
from torch import nn


class Float32Buffers(nn.Module):
    """Base class for a module with buffers whose dtype no cast changes.

    A balancing step of 1e-3 vanishes in bfloat16 next to a bias of 1. `module.bfloat16()` and the
    like therefore move the named buffers to another device at most, and leave their values alone.
    """

    float32_buffers: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            cast = getattr(self, name)
            if cast.dtype != torch.float32:
                setattr(self, name, buffer.to(cast.device))
        return self
