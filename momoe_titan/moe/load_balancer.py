"""Updates the load-balancing biases once per optimizer step, with the same result on all ranks.

Knows layers and routers by what they have (`BalancedLayer`), so that it serves the models of every package.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from momoe_titan.kernels.balance import BalanceStep
from momoe_titan.moe.balancing import QUANTILE, bias_delta


class BalancedRouter(Protocol):
    """The router of a balanced layer.

    Attributes:
        gate: a linear layer.
        margins_EB, input_sum_C: see `expert_stats.accumulate_margins`; None where the rule is not "quantile".
        last_shares_E: see `moe.router_losses`, or None.
    """

    top_k: int
    score_func: str
    gate: Any
    margins_EB: torch.Tensor | None
    input_sum_C: torch.Tensor | None
    last_shares_E: torch.Tensor | None


class BalancedLayer(Protocol):
    """An MoE layer with a bias for each expert; read-only but for its tensors, which change in place."""

    @property
    def num_experts(self) -> int: ...
    @property
    def load_balance_rate(self) -> float: ...
    @property
    def load_balance_rule(self) -> str: ...
    @property
    def load_balance_average(self) -> float: ...
    @property
    def tokens_per_expert(self) -> torch.Tensor: ...
    @property
    def expert_bias(self) -> torch.Tensor: ...
    @property
    def router(self) -> Any: ...  # a `BalancedRouter`


class LoadBalancer:
    """Optimizer step pre-hook that moves the biases of all MoE layers by what their tokens chose.

    The layers count over all microbatches of a step. The hook sums these counts over the ranks that
    route different tokens, so that every rank moves its biases alike, and starts the counts again
    at 0. It never waits for the device. A layer with balancing off keeps its bias; its tokens are
    counted all the same.

    Where the optimizer is told to skip a step (its `found_inf` is 1, see `non_finite`), no bias
    moves, because NaN activations choose any experts. A loop that does not call the optimizer at
    all carries the counts over into the next step.

    With the rule "quantile", `follow_gates` is to run after the optimizer's step.

    Args:
        layers: of this rank, in the same order on all ranks that have them.
        groups: over which counts add up, one after another.
        router_group: ranks that count the same tokens while each router sees tokens of its own, or None.

    Attributes:
        counts_LE: (MoE layers, E) int64 on the device, tokens per expert of the last step over all
            ranks; None before the first step or without MoE layers.
        average_factor: by which the layers' `load_balance_average` is multiplied in the step to come;
            to set (see `lr_schedule`). 1 until then.

    Raises:
        ValueError: layers that differ in number of experts or rule, or, where on, in rate or average.
    """

    def __init__(
        self,
        layers: Sequence[BalancedLayer],
        groups: Sequence[ProcessGroup] = (),
        router_group: ProcessGroup | None = None,
    ):
        self.layers = list(layers)
        self.groups = groups
        self.router_group = router_group
        self.counts_LE: torch.Tensor | None = None
        self.average_factor: Callable[[], float] = lambda: 1.0
        self.balanced = [i for i, layer in enumerate(self.layers) if layer.load_balance_rate]
        on = [self.layers[i] for i in self.balanced]
        alike = {
            "num_experts": {layer.num_experts for layer in self.layers},
            "load_balance_rate": {layer.load_balance_rate for layer in on},
            "load_balance_rule": {layer.load_balance_rule for layer in on},
            "load_balance_average": {layer.load_balance_average for layer in on},
        }
        for name, values in alike.items():
            if len(values) > 1:
                raise ValueError(f"{name} must be the same in all MoE layers, got {sorted(values)}")
        self.rate = on[0].load_balance_rate if on else 0.0
        self.rule = on[0].load_balance_rule if on else "sign"
        # Where every token chooses all experts, the routers count no margins.
        self.solved = [layer for layer in on if layer.router.margins_EB is not None]
        self._step = BalanceStep()
        self._gates = _GateFollower(self.solved, self._step)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer | None = None, *hook_args) -> None:
        """The hook. Of its arguments it reads `optimizer.found_inf` alone, if there is one."""
        if not self.layers:
            return
        found_inf = self._found_inf(optimizer)
        counts = [layer.tokens_per_expert for layer in self.layers]
        if self.solved:
            counts_LE, histogram_LEB, input_sum_LC = self._sum_with_margins(counts)
            first, biases = self.solved[0], [layer.expert_bias for layer in self.solved]
            average = first.load_balance_average * self.average_factor()
            self._step.solve(biases, histogram_LEB, first.router.top_k, average, found_inf)
            self._gates.before_step(input_sum_LC)
        else:
            counts_LE = torch.stack(counts)
            for group in self.groups:
                torch.distributed.all_reduce(counts_LE, group=group)
            if self.balanced and self.rule != QUANTILE:
                balanced_LE = torch.stack(
                    [counts_LE[i] for i in self.balanced]
                )  # an index list would wait for the device
                delta_LE = bias_delta(balanced_LE, self.rate, self.rule)
                _move_biases([self.layers[i] for i in self.balanced], delta_LE, found_inf)
            torch._foreach_zero_(counts)  # pyright: ignore[reportPrivateImportUsage] - torch has no public name for it
        self.counts_LE = counts_LE
        if any(layer.router.last_shares_E is not None for layer in self.layers):
            shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
            for layer, shares_E in zip(self.layers, shares_LE, strict=True):
                if layer.router.last_shares_E is not None:
                    layer.router.last_shares_E.copy_(shares_E)

    @torch.no_grad()
    def follow_gates(self, optimizer: torch.optim.Optimizer | None = None, *hook_args) -> None:
        """Optimizer step post-hook: makes up for what the step has done to the gates.

        A step moves the rows of a gate along the direction that all tokens of a layer have in
        common, early in training by more than the tokens differ among each other. The scores of all
        tokens then move alike, and a bias solved for the tokens before the step is wrong for those
        after. Hence the bias takes back what the score of the mean token has gained.
        """
        if self.solved:
            biases = [layer.expert_bias for layer in self.solved]
            before_LE, after_LE = self._gates.logits_of_step()
            score_func = self.solved[0].router.score_func
            self._step.follow(biases, before_LE, after_LE, score_func, self._found_inf(optimizer))

    def _found_inf(self, optimizer: torch.optim.Optimizer | None) -> torch.Tensor | None:
        """The optimizer's, where the biases are: with weights offloaded to the CPU it is there."""
        found_inf = getattr(optimizer, "found_inf", None)
        return None if found_inf is None else found_inf.to(self.layers[0].expert_bias.device, non_blocking=True)

    def _sum_with_margins(self, counts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Counts, margins and sums of inputs over all ranks, by one all-reduce; those of this rank are zeroed."""
        routers = [layer.router for layer in self.solved]
        margins = [margins_EB for router in routers if (margins_EB := router.margins_EB) is not None]
        sums = [input_sum_C for router in routers if (input_sum_C := router.input_sum_C) is not None]
        flat, (counts_LE, histogram_LEB, input_sum_LC) = self._step.collect([counts, margins, sums])
        for group in self.groups:
            torch.distributed.all_reduce(flat, group=group)
        if self.router_group is not None:
            torch.distributed.all_reduce(flat[counts_LE.numel() :], group=self.router_group)
        return counts_LE.long(), histogram_LEB, input_sum_LC


class _GateFollower:
    """Logits that gates give to the mean token of a step, before and after the optimizer's step."""

    def __init__(self, layers: Sequence[BalancedLayer], step: BalanceStep):
        self.routers = [layer.router for layer in layers]
        self.step = step
        self.input_sum_LC: torch.Tensor | None = None
        self.rows: torch.Tensor | None = None  # which experts' rows of the gates this rank holds

    def before_step(self, input_sum_LC: torch.Tensor) -> None:
        self.input_sum_LC = input_sum_LC
        self.before_Le = self._local_logits(input_sum_LC)

    def logits_of_step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(L, E) float32 each, of all experts: before the optimizer's step, and after it."""
        assert self.input_sum_LC is not None, "before_step first"
        before_Le, after_Le = self.before_Le, self._local_logits(self.input_sum_LC)
        gate, device = self.routers[0].gate.weight, self.input_sum_LC.device
        self.input_sum_LC = None
        if not isinstance(gate, DTensor):
            return before_Le.to(device), after_Le.to(device)
        logits_2LE = before_Le.new_zeros(2, len(self.routers), self.routers[0].num_experts)
        logits_2LE[..., self._rows(gate)] = torch.stack([before_Le, after_Le])
        for dim, placement in enumerate(gate.placements):
            if isinstance(placement, Shard):
                torch.distributed.all_reduce(logits_2LE, group=gate.device_mesh.get_group(dim))
        before_LE, after_LE = logits_2LE.to(device)
        return before_LE, after_LE

    def _rows(self, gate: DTensor) -> torch.Tensor:
        if self.rows is None:
            ids = torch.arange(gate.shape[0], device=gate.to_local().device)
            rows = distribute_tensor(ids, gate.device_mesh, gate.placements, src_data_rank=None).to_local()
            self.rows = rows.to(ids.device)  # from the mesh's, which is another where weights are offloaded to the CPU
        return self.rows

    def _local_logits(self, input_sum_LC: torch.Tensor) -> torch.Tensor:
        """(L, rows) of the rows of the gates that this rank holds."""
        weights = [_local(router.gate.weight) for router in self.routers]
        biases = [_local(bias) for router in self.routers if (bias := router.gate.bias) is not None]
        return self.step.mean_logits(weights, biases, input_sum_LC)


def _local(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _move_biases(layers: Sequence[BalancedLayer], delta_LE: torch.Tensor, found_inf: torch.Tensor | None) -> None:
    """Add the rows of delta_LE to the layers' biases, unless found_inf is 1."""
    if found_inf is not None:
        delta_LE = delta_LE * (1 - found_inf)
    # In place, because checkpoints keep a reference.
    biases = [layer.expert_bias for layer in layers]
    torch._foreach_add_(  # pyright: ignore[reportPrivateImportUsage] - torch has no public name for it
        biases, list(delta_LE)
    )
