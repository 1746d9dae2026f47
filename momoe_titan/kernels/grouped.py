"""Experts on rows that are sorted by expert already, as expert parallelism and other dispatchers hand them over."""

from typing import Any

import torch
from torch import Tensor

from momoe_titan.kernels.op import momoe_mlp


def momoe_grouped_mlp(
    x_RD: Tensor,
    w1_EDZ: Tensor | tuple[Tensor, Tensor],
    w2_EFD: Tensor,
    counts_E: Tensor,
    scores_R: Tensor | None = None,
    save_percent: float = 0.0,
    **options: Any,
) -> Tensor:
    """Experts on rows sorted by expert: ``out[r] = scores[r] * expert(x[r])``, the first ``counts[0]`` by expert 0.

    Differentiable in x, the weights, the biases and scores. Does not wait for the device.

    Args:
        x_RD: the rows; those past the sum of the counts are padding, whose output and gradient is 0.
        w1_EDZ, w2_EFD, save_percent: of `momoe_mlp`.
        counts_E: rows of each expert, int32 or int64, on the device of x.
        scores_R: any floating dtype; all 1 where left out.
        **options: all others of `momoe_mlp` but `check_ids`.

    Returns:
        out_RD in the dtype of x, or of autocast where it is on.

    Raises:
        ValueError: as `momoe_mlp`; counts that don't fit.
    """
    if counts_E.shape != w2_EFD.shape[:1] or counts_E.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"counts must be int32 or int64 of shape (E,) = {tuple(w2_EFD.shape[:1])}, "
            f"got {counts_E.dtype} of shape {tuple(counts_E.shape)}"
        )
    if scores_R is not None and scores_R.shape != x_RD.shape[:1]:
        raise ValueError(f"scores must be (R,) = {tuple(x_RD.shape[:1])}, got {tuple(scores_R.shape)}")
    rows = torch.arange(x_RD.shape[0], device=x_RD.device)
    # Past the last row this is E, which is no expert.
    ids = torch.searchsorted(counts_E.cumsum(0), rows, right=True)
    scores = x_RD.new_ones(x_RD.shape[0], dtype=torch.float32) if scores_R is None else scores_R
    out_RD, _ = momoe_mlp(x_RD, w1_EDZ, w2_EFD, ids[:, None], scores[:, None], save_percent, **options)
    return out_RD
