"""Checks the arguments of the layers, and makes their weights or takes over given ones."""

import torch
from torch import nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue] - its stubs leave it out

WEIGHT_DTYPES = (torch.bfloat16, torch.float32)
ACTIVATION_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def int_at_least(name: str, value: int, minimum: int) -> int:
    """The value, if it is an integer of at least `minimum`; else ValueError with the argument's name."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}, must be an integer")
    if value < minimum:
        raise ValueError(f"{name} is {value}, must be at least {minimum}")
    return value


def refuse_torch_func(*tensors: torch.Tensor) -> None:
    """RuntimeError if one of these comes from torch.func, whose transforms the kernels' derivatives do not know."""
    if torch.compiler.is_compiling():
        return
    if any(_functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors):
        raise RuntimeError(
            "momoe_titan's layers do not work under torch.func (grad, vmap, jvp, jacrev and others): take first "
            "derivatives by loss.backward() or torch.autograd.grad, and batches as a dimension of the tokens"
        )


def check_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """ValueError with the argument's name, if the tensor is not on the weights' device."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the weights are on {device}")


def narrower_dtype(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: the narrower of the two, so that no weights are silently widened."""
    if weight_dtype == torch.float32 or x_dtype == weight_dtype:
        return x_dtype
    if x_dtype == torch.float32:
        return weight_dtype
    raise ValueError(f"x_BSD has dtype {x_dtype}, the weights have dtype {weight_dtype}")


def weight_device_dtype(
    given: dict[str, torch.Tensor | None],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of new weights, with which the given weights have to agree."""
    placed = {name: weight for name, weight in given.items() if weight is not None}
    for name, weight in placed.items():
        if not isinstance(weight, torch.Tensor):
            raise ValueError(f"{name} is a {type(weight).__name__}, must be a tensor")
        if weight.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{name} has dtype {weight.dtype}, must be one of {WEIGHT_DTYPES}")
    first = next(iter(placed.values()), None)
    if device is None:
        device = first.device if first is not None else "cuda" if torch.cuda.is_available() else "cpu"
    # "cuda" means the current CUDA device, and a tensor's device always has an index.
    device = torch.empty(0, device=device).device
    if dtype is None:
        new_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = new_dtype if first is None else first.dtype
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype is {dtype}, must be one of {WEIGHT_DTYPES}")
    for name, weight in placed.items():
        if weight.device != device:
            raise ValueError(f"{name} is on {weight.device}, expected {device}")
        if weight.dtype != dtype:
            raise ValueError(f"{name} has dtype {weight.dtype}, expected {dtype}")
    return device, dtype


def new_or_given_weight(
    name: str,
    given: torch.Tensor | None,
    shape: tuple[int, ...],
    *,
    std: float,
    device: torch.device,
    dtype: torch.dtype,
) -> nn.Parameter:
    """The given tensor as a parameter, in place, or new normal values of this std.

    Raises:
        ValueError: the given tensor has another shape, or is not contiguous.
    """
    if given is None:
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype).normal_(std=std))
    if tuple(given.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, must be {shape}")
    if not given.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {given.stride()})")
    return given if isinstance(given, nn.Parameter) else nn.Parameter(given.detach())
