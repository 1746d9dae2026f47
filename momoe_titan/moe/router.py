"""Chooses the experts of each token, for `TopKRouter` and for TorchTitan's `MomoeRouter`.

On a GPU one Triton kernel does it (kernels/router.py). Elsewhere plain torch gives the same choice.
"""

import torch
from torch import Tensor

from momoe_titan.kernels.router import route, runs_here


# An op of its own, so that activation checkpointing can keep the chosen ids and drop the sort's
# output, which is E/K times as large.
@torch.library.custom_op("momoe_titan::choose_experts", mutates_args=())
def choose_experts(choice_TE: Tensor, top_k: int) -> Tensor:
    """The ids of the largest values, (T, K) int64, in falling order; of equal values the lowest id."""
    # A stable sort, because torch.topk leaves the order of equal values open.
    order_TE = choice_TE.sort(dim=1, descending=True, stable=True).indices
    # A copy: a view would keep all of order_TE alive, and TorchTitan's reorderer flattens it.
    return order_TE[:, :top_k].contiguous()


@choose_experts.register_fake
def _(choice_TE: Tensor, top_k: int) -> Tensor:
    return choice_TE.new_empty(choice_TE.shape[0], top_k, dtype=torch.int64)


def expert_scores(logits_TE: Tensor, score_func: str) -> Tensor:
    """The score of every expert: "softmax" or "sigmoid" of the logits.

    Infinite logits count as the largest finite numbers, because inf - inf would make a NaN of a
    softmax with a clear winner. NaN stays NaN.
    """
    logits_TE = clamp_infinities(logits_TE)
    return logits_TE.sigmoid() if score_func == "sigmoid" else logits_TE.softmax(dim=1)


def clamp_infinities(logits_TE: Tensor) -> Tensor:
    """The logits with infinities replaced by the largest finite numbers. NaN stays NaN."""
    largest = torch.finfo(torch.float32).max
    return logits_TE.clamp(-largest, largest)


def scale_scores(scores_TK: Tensor, normalize: bool, scale: float) -> Tensor:
    """The scores times `scale`, first divided by each token's sum if `normalize` says so."""
    if normalize:
        scores_TK = scores_TK / (scores_TK.sum(dim=1, keepdim=True) + 1e-20)
    return scores_TK * scale


def route_tokens(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    score_func: str,
    normalize: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose K experts per token; differentiable in the logits.

    The experts with the largest score plus bias are chosen. Of equal experts the lowest id wins.
    Infinite logits count as the largest finite numbers. A NaN makes the scores of its own token
    NaN, and that token still chooses K different experts.

    Args:
        logits_TE: float32.
        bias_E: float32, or None. Takes part in the choice alone, not in the scores
            (arXiv 2408.15664, equation 3).
        top_k: K, 0 to E.
        score_func: "softmax" or "sigmoid": of the logits; the chosen are in falling order of score
            plus bias, NaN first. "softmax_of_chosen": the choice goes by the softmax over all
            experts, NaN last; the scores are the softmax over the chosen ones, in rising order of
            the ids.
        normalize: divide by each token's sum of chosen scores (plus 1e-20).
        scale: factor on the scores, after all else.

    Returns:
        scores_TK float32 and ids_TK int64.
    """
    if top_k and runs_here(logits_TE):
        return route(logits_TE, bias_E, top_k, score_func, normalize, scale)
    if score_func == "softmax_of_chosen":
        choice_TE = _add_bias(expert_scores(logits_TE.detach(), "softmax"), bias_E)
        # NaN would sort before everything. As -inf it loses, and an all-NaN token takes the lowest ids.
        choice_TE = choice_TE.masked_fill(choice_TE.isnan(), float("-inf"))
        ids_TK = choose_experts(choice_TE, top_k).sort(dim=1).values
        # Equals the softmax over all divided by the chosen ones' sum, but divides by no sum that
        # may have underflowed to zero.
        scores_TK = expert_scores(logits_TE.gather(1, ids_TK), "softmax")
    else:
        scores_TE = expert_scores(logits_TE, score_func)
        ids_TK = choose_experts(_add_bias(scores_TE.detach(), bias_E), top_k)
        scores_TK = scores_TE.gather(1, ids_TK)
    return scale_scores(scores_TK, normalize, scale), ids_TK


def _add_bias(choice_TE: Tensor, bias_E: Tensor | None) -> Tensor:
    return choice_TE if bias_E is None else choice_TE + bias_E


def route_in_groups(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    score_func: str,
    normalize: bool,
    scale: float,
    num_groups: int,
    num_limited_groups: int,
) -> tuple[Tensor, Tensor]:
    """As `route_tokens`, with the experts of a token from few groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    A group is E / num_groups experts that follow each other. The groups with the largest sum of their two largest
    scores plus bias are taken; of equal groups the first wins.

    Args:
        score_func: "softmax" or "sigmoid".
        num_groups: a divisor of E, with at least two experts in a group.
        num_limited_groups: how many groups are taken; together they have at least top_k experts.
        the others: of `route_tokens`.
    """
    scores_TE = expert_scores(logits_TE, score_func)
    choice_TGe = _add_bias(scores_TE.detach(), bias_E).unflatten(1, (num_groups, -1))
    groups_TG = choice_TGe.topk(2, dim=2).values.sum(dim=2)
    taken_TG = torch.zeros_like(groups_TG, dtype=torch.bool)
    taken_TG = taken_TG.scatter(1, choose_experts(groups_TG, num_limited_groups), True)
    choice_TE = choice_TGe.masked_fill(~taken_TG[:, :, None], float("-inf")).flatten(1)
    ids_TK = choose_experts(choice_TE, top_k)
    return scale_scores(scores_TE.gather(1, ids_TK), normalize, scale), ids_TK
