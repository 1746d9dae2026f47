"""Load balancing without an auxiliary loss (arXiv 2408.15664): how the biases of the experts move."""

import torch

from momoe_titan.config.section import BALANCE_RULES
from momoe_titan.kernels.balance import centred_move, quantiles_ref

__all__ = ["AVERAGE", "BALANCE_RULES", "QUANTILE", "bias_delta", "quantile_delta"]

QUANTILE = "quantile"
AVERAGE = 0.5  # of the rule "quantile" where no schedule of the learning rate is known


def bias_delta(counts_LE: torch.Tensor, rate: float | torch.Tensor, rule: str = "sign") -> torch.Tensor:
    """The change of each expert's bias by the rules "sign" and "proportional", from how many tokens chose it.

    "sign" (algorithm 1 of the paper): rate * sign(mean - count). Biases are not centred afterwards,
    as in the paper: a common shift changes no choice.
    "proportional" (the variant without sign, section 4.3): rate * (mean - count) / mean. The error
    is taken relative to the mean, so that one rate serves every batch size. Sums to 0.

    Args:
        counts_LE: integers, one row per layer; any leading shape.
        rate: u, a number or a tensor that broadcasts over counts_LE.
        rule: "sign" or "proportional".

    Returns:
        float32 of the shape of counts_LE. All zero for a layer that saw no token.

    Raises:
        ValueError: another rule.
    """
    if rule not in ("sign", "proportional"):
        raise ValueError(f"rule is {rule!r}, must be 'sign' or 'proportional'")
    # E * (mean - count) in integers: exact for any count, where float32 would round above 2^24.
    total_L1 = counts_LE.sum(dim=-1, keepdim=True)
    missing_LE = total_L1 - counts_LE.shape[-1] * counts_LE
    if rule == "sign":
        return rate * missing_LE.sign().float()
    return rate * (missing_LE / total_L1.clamp(min=1)).float()


def quantile_delta(
    histogram_LEB: torch.Tensor, bias_LE: torch.Tensor, top_k: int, average: float = 1.0
) -> torch.Tensor:
    """The change of each expert's bias by the rule "quantile", which solves for the bias that balances the experts.

    A token chooses an expert whose bias rises by more than the token's margin from it. The K/E
    quantile of the margins of a step's tokens is therefore the change that gives the expert its
    fair share of these tokens, if the other experts kept their bias. They move at the same time.
    Cutoffs that lie halfway between a token's last chosen expert and its first other one make this
    a step of coordinate descent on the dual of the balanced assignment (arXiv 2502.15451), which
    does not overshoot where two experts compete for the same tokens.

    The new biases have the mean 0: a common shift changes no choice, and adds up over steps.

    Args:
        histogram_LEB: counts of margins per layer and expert, see `kernels.quantile`; integers.
        bias_LE: the biases that the margins were counted with.
        top_k: K.
        average: the share of the solved change that is taken; below 1 an average over steps.

    Returns:
        float32 (L, E). All zero for a layer that saw no token.
    """
    change_LE = average * quantiles_ref(histogram_LEB, top_k)
    return centred_move(bias_LE, change_LE) - bias_LE
