"""The layer in plain torch: the reference that tests compare with, and the backend where there is no GPU.

Both run the experts one after another and read their token counts on the host.
"""

import itertools

import torch

from momoe_titan.kernels.activations import activate, activate_backward, is_gated
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.routing import RoutingMetadata


def momoe_mlp_ref(
    x_TD: torch.Tensor,
    w1_EDZ: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    w2_EFD: torch.Tensor,
    ids_TK: torch.Tensor,
    scores_TK: torch.Tensor,
    *,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    activation: str = "swiglu",
    order: str = "up_gate",
    scores_on_input: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A mixture of experts through torch's own autograd, in any floating dtype.

    ``out[t] = sum_k scores[t, k] * ((up * silu(gate)) @ w2[e] + bias2[e])`` with
    ``[up, gate] = x[t] @ w1[e] + bias1[e]`` and ``e = ids[t, k]``; a slot whose id is outside
    ``[0, E)`` adds nothing. Arguments as of :func:`momoe_titan.kernels.momoe_mlp`,
    whose results it checks; everything autograd wants is kept for the backward.

    Returns:
        out_TD in the dtype of x, and the tokens per expert, int64 (E).
    """
    if isinstance(w1_EDZ, tuple):
        w1_EDZ = torch.cat(w1_EDZ, dim=2)
    experts = Experts(w1_EDZ, w2_EFD, None, bias1, bias2, activation, order, scores_on_input)
    out_TD = torch.zeros(x_TD.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32), device=x_TD.device)
    counts = []
    for e in range(w2_EFD.shape[0]):
        token, slot = torch.nonzero(ids_TK == e, as_tuple=True)
        score = scores_TK[token, slot].to(out_TD.dtype)[:, None]
        x = x_TD[token]
        if scores_on_input:
            x, score = (x * score).to(x.dtype), torch.ones_like(score)
        z = x @ w1_EDZ[e]
        z = z if bias1 is None else z + bias1[e]
        act = activate(activation, *experts.split(z)) if is_gated(activation) else activate(activation, z, None)
        y = act @ w2_EFD[e]
        y = y if bias2 is None else y + bias2[e]
        out_TD = out_TD.index_add(0, token, y.to(out_TD.dtype) * score)
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


def _product(x: torch.Tensor, experts: Experts, e: int) -> torch.Tensor:
    """x @ w1 of expert e, (rows, Z)."""
    if experts.gate is None:
        return x @ experts.w1[e]
    return torch.cat([x @ experts.w1[e], x @ experts.gate[e]], dim=1)


def _pre_activations(z: torch.Tensor, experts: Experts, e: int, score: torch.Tensor):
    """up and gate (None for an activation without one) in float32, with scores and biases where they belong."""
    z = z.float() * score if experts.scores_on_input else z.float()
    if experts.bias1 is not None:
        z = z + experts.bias1[e].float()
    return experts.split(z) if is_gated(experts.activation) else (z, None)


def torch_forward(
    x_TD: torch.Tensor,
    experts: Experts,
    scores_TK: torch.Tensor,
    routing: RoutingMetadata,
    num_saved: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward of the op: out_TD and z_SZ, the first ``num_saved`` rows of z, here x @ w1 without scores and biases."""
    num_rows = routing.token_R.numel()
    z_SZ = x_TD.new_zeros(num_saved, experts.width)
    y_RD = x_TD.new_zeros(num_rows, x_TD.shape[1])
    token = routing.token_R.long()
    for e, a, b in _spans(routing):
        z = _product(x_TD[token[a:b]], experts, e)
        z_SZ[a:b] = z[: max(0, num_saved - a)]
        up, gate = _pre_activations(z, experts, e, routing.score_R[a:b, None])
        torch.mm(activate(experts.activation, up, gate).to(z.dtype), experts.w2[e], out=y_RD[a:b])
        if experts.bias2 is not None:
            y_RD[a:b] += experts.bias2[e]
    return combine(y_RD, routing, None if experts.scores_on_input else scores_TK), z_SZ


def torch_backward(
    dout_TD: torch.Tensor,
    x_TD: torch.Tensor,
    experts: Experts,
    scores_TK: torch.Tensor,
    z_SZ: torch.Tensor,
    routing: RoutingMetadata,
) -> dict[str, torch.Tensor]:
    """Backward of the op: gradients of x, the scores and all that `experts` has (README.md has the derivation)."""
    num_saved, ffn = z_SZ.shape[0], experts.ffn
    token, score_R = routing.token_R.long(), routing.score_R
    dx_RD = x_TD.new_zeros(token.numel(), x_TD.shape[1])
    dscore_R = torch.zeros(token.numel(), dtype=torch.float32, device=x_TD.device)
    parts = {name: getattr(experts, name) for name in ("w1", "w2", "gate", "bias1", "bias2")}
    grads = {name: torch.zeros_like(t) for name, t in parts.items() if t is not None}
    for e, a, b in _spans(routing):
        x, dout, score = x_TD[token[a:b]], dout_TD[token[a:b]], score_R[a:b, None]
        # Multiply all of the expert's rows, as in the forward: a product of fewer rows may differ in its last bits.
        z = _product(x, experts, e) if num_saved < b else z_SZ[a:b]
        up, gate = _pre_activations(z, experts, e, score)
        dact = (dout @ experts.w2[e].T).float()
        weight = 1.0 if experts.scores_on_input else score
        act, *dhalves = activate_backward(experts.activation, up, gate, dact * weight)
        dz = torch.empty(z.shape, device=z.device)
        for half, values in zip(experts.split(dz) if gate is not None else (dz,), dhalves, strict=False):
            if values is not None:
                half.copy_(values)
        if experts.bias1 is not None:
            grads["bias1"][e] = dz.sum(0)
        if experts.bias2 is not None:
            grads["bias2"][e] = (dout * weight).sum(0)
        if experts.scores_on_input:
            dscore_R[a:b] = (dz * z.float()).sum(-1)
            dz = dz * score
        else:
            dscore_R[a:b] = (dact * act).sum(-1)
            if experts.bias2 is not None:
                dscore_R[a:b] += dout.float() @ experts.bias2[e].float()
        dz = dz.to(z.dtype)
        grads["w2"][e] = (act * weight).to(z.dtype).T @ dout
        if experts.gate is None:
            torch.mm(dz, experts.w1[e].T, out=dx_RD[a:b])
            grads["w1"][e] = x.T @ dz
        else:
            torch.mm(dz, torch.cat([experts.w1[e], experts.gate[e]], dim=1).T, out=dx_RD[a:b])
            grads["w1"][e], grads["gate"][e] = x.T @ dz[:, :ffn], x.T @ dz[:, ffn:]
    dscores = torch.zeros_like(scores_TK)
    if len(dscore_R):
        dscores.copy_(dscore_R[routing.row_TK.clamp(min=0).long()].where(routing.row_TK >= 0, 0.0))
    return grads | {"x": combine(dx_RD, routing, None), "scores": dscores}
