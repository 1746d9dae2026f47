"""Auxiliary losses of the router, added to its gradient without changing any output.

The auxiliary load-balancing loss of a forward is E * sum over experts of share_e * mean_e: the share
of the choices that fell on expert e, times the mean of the tokens' scores for e, which each token's
scores are first divided by their sum for (Switch Transformer, arXiv 2101.03961). It is 1 where all
experts are chosen alike. The z-loss is the mean square of the logits' logsumexp (ST-MoE, arXiv
2202.08906).
"""

import torch
from torch import Tensor

from momoe_titan.moe.expert_stats import count_experts, recording_entropy
from momoe_titan.moe.router import expert_scores


def expert_shares(ids_TK: Tensor, num_experts: int, num_sequences: int = 1) -> Tensor:
    """The share of each sequence's choices that fell on each expert, (sequences, E) float32.

    The tokens of a sequence follow each other, and all sequences have the same length.
    """
    offsets = torch.arange(num_sequences, device=ids_TK.device)[:, None] * num_experts
    counts = count_experts(ids_TK.view(num_sequences, -1) + offsets, num_sequences * num_experts)
    return counts.view(num_sequences, num_experts).float() * (num_sequences / max(1, ids_TK.numel()))


class _AddGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores_TK, logits_TE, shares_SE, score_func, aux_weight, z_weight):
        ctx.save_for_backward(logits_TE, shares_SE)
        ctx.how = score_func, aux_weight, z_weight
        return scores_TK.view_as(scores_TK)

    @staticmethod
    def backward(ctx, dscores_TK):
        logits_TE, shares_SE = ctx.saved_tensors
        return dscores_TK, router_loss_gradient(logits_TE, shares_SE, *ctx.how), None, None, None, None


def add_router_losses(
    scores_TK: Tensor, logits_TE: Tensor, shares_SE: Tensor | None, score_func: str, aux_weight: float, z_weight: float
) -> Tensor:
    """scores_TK, whose backward adds the gradient of the losses to that of logits_TE.

    Args:
        scores_TK: the scores of the chosen experts, as the layer goes on with them.
        logits_TE: float32, of the same tokens.
        shares_SE: see `expert_shares`; one row per sequence, or one for all tokens. None where aux_weight is 0.
        score_func: "sigmoid" or "softmax".
        aux_weight, z_weight: of the sums over tokens: divide by the tokens of an optimizer step.
    """
    return _AddGradient.apply(scores_TK, logits_TE, shares_SE, score_func, aux_weight, z_weight)


def router_loss_gradient(
    logits_TE: Tensor, shares_SE: Tensor | None, score_func: str, aux_weight: float, z_weight: float
) -> Tensor:
    """Gradient of the losses with respect to the logits, (T, E); see `add_router_losses`."""
    num_tokens, num_experts = logits_TE.shape
    grad_TE = torch.zeros_like(logits_TE)
    if aux_weight and shares_SE is not None:
        scores_TE = expert_scores(logits_TE, score_func)
        sum_T1 = scores_TE.sum(dim=1, keepdim=True)
        p_TE = scores_TE / sum_T1
        price_TE = (aux_weight * num_experts * shares_SE).repeat_interleave(num_tokens // len(shares_SE), dim=0)
        above_mean_TE = price_TE - (price_TE * p_TE).sum(dim=1, keepdim=True)
        grad_TE += p_TE * above_mean_TE * ((1 - scores_TE) if score_func == "sigmoid" else 1)
    if z_weight:
        lse_T1 = logits_TE.logsumexp(dim=1, keepdim=True)
        grad_TE += 2 * z_weight * lse_T1 * logits_TE.softmax(dim=1)
    return grad_TE


@torch.library.custom_op("momoe_titan::accumulate_router_losses", mutates_args=("sums_2",))
def accumulate_router_losses(sums_2: Tensor, logits_TE: Tensor, shares_SE: Tensor | None, score_func: str) -> None:
    """Add both losses, unweighted and times the number of tokens, to sums_2 (auxiliary, z), in place.

    Does nothing where the entropy is not recorded (see `expert_stats.accumulate_entropy`). Without shares_SE the
    auxiliary loss is left out.
    """
    wanted = recording_entropy(sums_2.device)
    if wanted is None:
        return
    if shares_SE is not None:
        scores_TE = expert_scores(logits_TE, score_func)
        p_TE = scores_TE / scores_TE.sum(dim=1, keepdim=True)
        p_SE = p_TE.view(shares_SE.shape[0], -1, p_TE.shape[1]).sum(dim=1)
        sums_2[0] += (logits_TE.shape[1] * (shares_SE * p_SE).sum()).masked_fill(wanted == 0, 0.0)
    sums_2[1] += logits_TE.logsumexp(dim=1).square().sum().masked_fill(wanted == 0, 0.0)


@accumulate_router_losses.register_fake
def _(sums_2, logits_TE, shares_SE, score_func) -> None:
    return None
