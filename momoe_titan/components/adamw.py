"""AdamW, each rank on its own shards: by one kernel of ours on a GPU, by torch's elsewhere, with the same state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from momoe_titan.kernels.adamw import Adamw, Rates, Updated
from momoe_titan.kernels.multi_tensor import runs_here

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: of a DTensor its shard, of any other itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor:
    """This rank's part of the gradient, divided among ranks as the parameter is.

    Under tensor parallelism without FSDP, autograd leaves the gradients of norms and gates unsummed: each rank has its
    part of the sum.
    """
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return local(gradient)


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose step on a GPU reads every gradient once and writes none.

    The state is torch's, under the same names. If the parameters are not all contiguous, on one GPU and of a dtype that
    the kernel takes, torch's own fused kernel updates them, after the gradients were scaled and laid out as it needs
    them. It gets plain tensors: DTensor would work out a sharding for each list of parameters, which on a CPU takes
    longer than the update of a small model.

    Attributes:
        clip_coefficient: float32 of no dimension, by which the next step multiplies the gradients; None for 1.
        found_inf: float32 of no dimension. Unless it is 0, the step leaves parameters and state as they are.
        copies: for some or all parameters a copy in a narrower dtype, which a step on a GPU writes too.
        wrote_copies: whether the last step wrote the copies.

    Raises:
        ValueError: an option that the kernel does not have, or a tensor as learning rate.
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Any, **options: Any):
        for name in ("amsgrad", "maximize", "capturable", "differentiable"):
            if options.get(name):
                raise ValueError(f"{name} is {options[name]!r}, must be False: AdamW's kernel does not have it")
        if isinstance(options.get("lr"), Tensor):
            raise ValueError("lr is a tensor, must be a number")
        super().__init__(params, **{**options, "fused": True, "foreach": False})
        self.clip_coefficient: Tensor | None = None
        self.copies: Mapping[Any, Tensor] = {}
        self.wrote_copies = False
        self._kernels: list[Adamw] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - torch has overloads
        """Take one step; the result is the closure's, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, self.clip_coefficient = self.clip_coefficient, None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return loss
        self.wrote_copies = self._kernel_takes([local(p) for p in parameters])
        if not self.wrote_copies:
            self._prepare_for_torch(parameters, scale)
            for group in self.param_groups:
                self._step_of_torch(group)
            return loss
        device = local(parameters[0]).device
        scale = torch.ones((), device=device) if scale is None else scale
        skip = torch.zeros((), device=device) if self.found_inf is None else self.found_inf
        self._kernels += [Adamw() for _ in self.param_groups[len(self._kernels) :]]
        for kernel, group in zip(self._kernels, self.param_groups, strict=True):
            updated = [self._updated(p) for p in group["params"] if p.grad is not None]
            if updated:
                rates = Rates(group["lr"], group["betas"], group["eps"], group["weight_decay"])
                kernel.step(updated, rates, scale, skip)
                # as torch does for its own operations: a graph that has saved one of them can be used no more
                torch.autograd.graph.increment_version([u.parameter if u.copy is None else u.copy for u in updated])
        return loss

    def _kernel_takes(self, parameters: list[Tensor]) -> bool:
        device = parameters[0].device
        return runs_here(parameters[0]) and all(
            p.device == device and p.dtype in _DTYPES and p.is_contiguous() for p in parameters
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """A parameter's state, which is made in its first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter)
        if state["step"].device != parameter.device:  # of a state that an unfused optimizer has saved
            state["step"] = state["step"].to(parameter.device)
        return state

    def _updated(self, parameter: Tensor) -> Updated:
        """What the kernel needs of a parameter."""
        state = self._state_of(parameter)
        for name in ("exp_avg", "exp_avg_sq"):
            if not local(state[name]).is_contiguous():
                state[name] = state[name].contiguous()
        copy = self.copies.get(parameter)
        return Updated(
            parameter=local(parameter),
            gradient=local_gradient(parameter).contiguous(),
            exp_avg=local(state["exp_avg"]),
            exp_avg_sq=local(state["exp_avg_sq"]),
            step=state["step"],
            copy=None if copy is None else local(copy),
        )

    def _step_of_torch(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        states = [self._state_of(p) for p in parameters]
        adamw(
            [local(p) for p in parameters],
            [local_gradient(p) for p in parameters],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _prepare_for_torch(self, parameters: Sequence[Tensor], scale: Tensor | None) -> None:
        for p in parameters:
            gradient = p.grad
            # torch's fused step takes other layouts for the parameter's
            if gradient is not None and (gradient.dtype != p.dtype or gradient.stride() != p.stride()):
                p.grad = torch.empty_like(p).copy_(gradient)
        if scale is not None:
            scale_gradients(parameters, scale)


def scale_gradients(parameters: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply all gradients, in place, by a number on a device."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    if gradients:
        # no public name
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))  # pyright: ignore[reportPrivateImportUsage] - as above
