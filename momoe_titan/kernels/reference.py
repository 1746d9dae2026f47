"""The layer in plain torch: the reference that tests compare with, and the backend where there is no GPU.

Both run the experts one after another and read their token counts on the host.
"""

import itertools

import torch
import torch.nn.functional as F

from momoe_titan.kernels.routing import RoutingMetadata


def momoe_mlp_ref(
    x_TD: torch.Tensor,
    w1_ED2F: torch.Tensor,
    w2_EFD: torch.Tensor,
    ids_TK: torch.Tensor,
    scores_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SwiGLU mixture of experts through torch's own autograd, in any floating dtype.

    ``out[t] = sum_k scores[t, k] * (up * silu(gate)) @ w2[e]`` with
    ``[up, gate] = x[t] @ w1[e]`` and ``e = ids[t, k]``; a slot whose id is outside
    ``[0, E)`` adds nothing. Shapes as in :func:`momoe_titan.kernels.momoe_mlp`,
    whose results it checks; everything autograd wants is kept for the backward.

    Returns:
        out_TD in the dtype of x, and the tokens per expert, int64 (E).
    """
    num_experts, ffn = w1_ED2F.shape[0], w2_EFD.shape[1]
    out_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)
    counts = []
    for e in range(num_experts):
        token, slot = torch.nonzero(ids_TK == e, as_tuple=True)
        up, gate = (x_TD[token] @ w1_ED2F[e]).split(ffn, dim=-1)
        y = (up * F.silu(gate)) @ w2_EFD[e]
        out_TD = out_TD.index_add(0, token, y.to(out_TD.dtype) * scores_TK[token, slot].to(out_TD.dtype)[:, None])
        counts.append(token.numel())
    return out_TD.to(x_TD.dtype), torch.tensor(counts, dtype=torch.int64, device=x_TD.device)


def _spans(routing: RoutingMetadata):
    """(expert, first row, end row) of every expert that has rows."""
    offsets = routing.offsets_E1.tolist()
    return [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(offsets)) if b > a]


def combine(rows_RD: torch.Tensor, routing: RoutingMetadata, scores_TK: torch.Tensor | None) -> torch.Tensor:
    """Sum over a token's slots, in slot order and float32, as combine.combine does."""
    row_TK = routing.row_TK.long()
    out = torch.zeros(row_TK.shape[0], rows_RD.shape[1], dtype=torch.float32, device=rows_RD.device)
    for k in range(row_TK.shape[1]):
        part = rows_RD[row_TK[:, k].clamp(min=0)].float() if len(rows_RD) else out
        if scores_TK is not None:
            part = part * scores_TK[:, k, None].float()
        out += part.where(row_TK[:, k, None] >= 0, 0.0)
    return out.to(rows_RD.dtype)


def torch_forward(
    x_TD: torch.Tensor,
    w1_ED2F: torch.Tensor,
    w2_EFD: torch.Tensor,
    scores_TK: torch.Tensor,
    routing: RoutingMetadata,
    num_saved: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward of the op: out_TD and z_S2F, the first ``num_saved`` rows of z."""
    ffn = w2_EFD.shape[1]
    num_rows = routing.token_R.numel()
    z_S2F = x_TD.new_zeros(num_saved, 2 * ffn)
    y_RD = x_TD.new_zeros(num_rows, x_TD.shape[1])
    token = routing.token_R.long()
    for e, a, b in _spans(routing):
        z = x_TD[token[a:b]] @ w1_ED2F[e]
        z_S2F[a:b] = z[: max(0, num_saved - a)]
        up, gate = z.float().split(ffn, dim=-1)
        torch.mm((up * F.silu(gate)).to(z.dtype), w2_EFD[e], out=y_RD[a:b])
    return combine(y_RD, routing, scores_TK), z_S2F


def torch_backward(
    dout_TD: torch.Tensor,
    x_TD: torch.Tensor,
    w1_ED2F: torch.Tensor,
    w2_EFD: torch.Tensor,
    scores_TK: torch.Tensor,
    z_S2F: torch.Tensor,
    routing: RoutingMetadata,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of the op: gradients of x, w1, w2 and the scores (README.md has the derivation)."""
    ffn = w2_EFD.shape[1]
    num_saved = z_S2F.shape[0]
    token, score_R = routing.token_R.long(), routing.score_R
    dx_RD = x_TD.new_zeros(token.numel(), x_TD.shape[1])
    dscore_R = torch.zeros(token.numel(), dtype=torch.float32, device=x_TD.device)
    dw1, dw2 = torch.zeros_like(w1_ED2F), torch.zeros_like(w2_EFD)
    for e, a, b in _spans(routing):
        x, dout = x_TD[token[a:b]], dout_TD[token[a:b]]
        # Multiply all of the expert's rows, as in the forward: a product of fewer rows may differ in its last bits.
        z = x @ w1_ED2F[e] if num_saved < b else z_S2F[a:b]
        up, gate = z.float().split(ffn, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        act = up * silu
        dact = (dout @ w2_EFD[e].T).float()
        dscore_R[a:b] = (dact * act).sum(-1)
        dact = dact * score_R[a:b, None]
        dz = torch.cat([dact * silu, dact * up * (sigmoid + silu * (1 - sigmoid))], dim=-1).to(z.dtype)
        torch.mm((act * score_R[a:b, None]).to(z.dtype).T, dout, out=dw2[e])
        torch.mm(dz, w1_ED2F[e].T, out=dx_RD[a:b])
        torch.mm(x.T, dz, out=dw1[e])
    dscores = torch.zeros_like(scores_TK)
    if len(dscore_R):
        dscores.copy_(dscore_R[routing.row_TK.clamp(min=0).long()].where(routing.row_TK >= 0, 0.0))
    return combine(dx_RD, routing, None), dw1, dw2, dscores
