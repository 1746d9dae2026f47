"""Narrow copies of the weights to compute with, as FSDP's mixed precision has them, for weights that FSDP leaves out.

These are all weights of a job without FSDP, and under expert parallelism experts that `fsdp.leaves_experts` names.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from momoe_titan.components.adamw import local


class ComputeWeights(contextlib.AbstractContextManager):
    """While entered, modules compute with narrow copies of their parameters, and the parameters get the gradients.

    The modules' own parameters, which the optimizer moves and checkpoints hold, stay in their dtype. So do buffers.
    Activations get the dtype of the copies, as under FSDP's mixed precision. On entering, all parameters are copied.
    Where the optimizer has written the copies (`written`), only those parameters are copied that an operation of torch
    has changed since the last time. Entered again inside itself, the context does nothing.

    Args:
        modules: on their device, with values; those inside of them too.
        dtype: of the copies. Parameters that have this dtype already get no copy.
        sums_in_parameters_dtype: add up gradients in the dtype of the parameters, for steps of several backwards: each
            gradient is added as soon as the backward has computed it. Otherwise the parameters get the copies' narrow
            gradients on leaving, as they are.

    Attributes:
        copies: the copy of each parameter that has one.
        written: whether the optimizer has written the copies in its last step. The trainer sets it after each step,
            because torch's fused optimizers do not raise the version of the parameters that they change.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype, sums_in_parameters_dtype: bool = True):
        self.sums_in_parameters_dtype = sums_in_parameters_dtype
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        self.written = False
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._depth = 0
        for module in itertools.chain.from_iterable(outer.modules() for outer in modules):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_floating_point() and parameter.dtype != dtype:
                    self._places.append((module, name, parameter))
                    if parameter not in self.copies:
                        self.copies[parameter] = self._copy(parameter, dtype)
        self._versions = {p: -1 for p in self.copies}

    def _copy(self, parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        copy = nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=parameter.requires_grad)
        if self.sums_in_parameters_dtype:
            if parameter.requires_grad:
                copy.register_post_accumulate_grad_hook(lambda copy: _add_gradient(parameter, copy))
        else:
            parameter.grad_dtype = None  # any dtype
        return copy

    def __enter__(self) -> "ComputeWeights":
        if self._depth == 0:
            self.refresh()
            self._put(self.copies.__getitem__)
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._put(lambda parameter: parameter)
            for parameter, copy in self.copies.items():
                if copy.grad is None:
                    continue
                if self.sums_in_parameters_dtype:
                    _add_gradient(parameter, copy)  # some pipeline schedules set gradients without any hook
                else:
                    parameter.grad, copy.grad = copy.grad, None

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the parameters that may have changed since they were last copied, in one launch."""
        versions = {parameter: _version(parameter) for parameter in self.copies}
        stale = [
            parameter
            for parameter, version in versions.items()
            if not self.written or version != self._versions[parameter]
        ]
        if stale:
            # no public name
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage] - as above
                [local(self.copies[parameter]) for parameter in stale], [local(parameter) for parameter in stale]
            )
            self._versions = versions

    def _put(self, which: Callable[[nn.Parameter], nn.Parameter]) -> None:
        for module, name, parameter in self._places:
            module._parameters[name] = which(parameter)  # as FSDP does: __setattr__ would take a hundred times as long


@torch.no_grad()
def _add_gradient(parameter: Tensor, copy: Tensor) -> None:
    """Add the copy's gradient to the parameter's, in the parameter's dtype, and free it."""
    gradient, copy.grad = copy.grad, None
    if gradient is None:
        return
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def _version(parameter: nn.Parameter) -> int:
    """A number that grows whenever an operation of torch changes the values, for a DTensor those of its shard too."""
    return parameter._version + (parameter.to_local()._version if isinstance(parameter, DTensor) else 0)
