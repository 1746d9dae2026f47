"""Load balancing without an auxiliary loss (arXiv 2408.15664): how the biases of the experts move."""

import torch

from momoe_titan.config.section import BALANCE_RULES

__all__ = ["BALANCE_RULES", "bias_delta"]


def bias_delta(counts_LE: torch.Tensor, rate: float | torch.Tensor, rule: str = "sign") -> torch.Tensor:
    """What to add to the bias of each expert, given how many tokens chose the expert.

    "sign" (algorithm 1 of the paper): rate * sign(mean - count). Biases are not centred afterwards,
    as in the paper: a common shift changes no choice.
    "proportional" (the variant without sign, section 4.3): rate * (mean - count) / mean. The error
    is taken relative to the mean, so that one rate serves every batch size.

    Args:
        counts_LE: integers, one row per layer; any leading shape.
        rate: u, a number or a tensor that broadcasts over counts_LE.
        rule: one of BALANCE_RULES.

    Returns:
        float32 of the shape of counts_LE. All zero for a layer that saw no token.

    Raises:
        ValueError: another rule.
    """
    if rule not in BALANCE_RULES:
        raise ValueError(f"rule is {rule!r}, must be one of {BALANCE_RULES}")
    # E * (mean - count) in integers: exact for any count, where float32 would round above 2^24.
    total_L1 = counts_LE.sum(dim=-1, keepdim=True)
    missing_LE = total_L1 - counts_LE.shape[-1] * counts_LE
    if rule == "sign":
        return rate * missing_LE.sign().float()
    return rate * (missing_LE / total_L1.clamp(min=1)).float()
