"""Our experts for the MoE models of Hugging Face transformers.

Importing this module registers "momoe" with transformers' experts interface::

    import momoe_titan.adapters.transformers
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, experts_implementation="momoe")

A model that exists already takes `model.set_experts_implementation("momoe")`. Parameters keep their names, shapes and
layout, so that checkpoints, FSDP, Trainer and PEFT go on as they are. Models whose experts have an activation that the
kernels do not know are refused by name.

How much the experts save for the backward is `save_percent`: of the innermost `with save_percent(...)`, else of
`set_save_percent(model, ...)`, else of the environment variable MOMOE_SAVE_PERCENT, else 0.
"""

import contextlib
import os
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

# `import transformers` would have a type checker read all of its models
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from momoe_titan.adapters.activation import UnknownActivationError, activation_of
from momoe_titan.kernels import momoe_mlp
from momoe_titan.moe.expert_stats import inside_backward
from momoe_titan.save_percent import validate_save_percent

NAME = "momoe"
ENVIRONMENT = "MOMOE_SAVE_PERCENT"
OLDEST = (5, 8)  # releases before it refuse every implementation that is not their own

_within: list[float] = []  # of the `save_percent` blocks that are open, the innermost last


@contextlib.contextmanager
def save_percent(percent: float) -> Iterator[None]:
    """Within the block every forward of these experts saves this share of its pre-activations, 0 to 100.

    The process's backward threads see it too. A forward that gradient checkpointing repeats saves what the first one
    did, whether the block is still open or not.

    Raises:
        ValueError: not a number from 0 to 100.
    """
    _within.append(validate_save_percent(percent))
    try:
        yield
    finally:
        _within.pop()


def set_save_percent(model: nn.Module, percent: float | None) -> int:
    """Let all experts of `model`, or of one of its layers, save this share of their pre-activations.

    Args:
        model: any module that holds experts; it is searched through.
        percent: 0 to 100; None leaves it to the environment again.

    Returns:
        How many layers of experts it has.

    Raises:
        ValueError: not a number from 0 to 100, no experts that transformers' interface runs, or some that the
            kernels do not know.
    """
    value = None if percent is None else validate_save_percent(percent, "percent")
    experts: list[Any] = [module for module in model.modules() if _is_experts(module)]
    if not experts:
        raise ValueError(f"model must hold experts of transformers' interface, got a {type(model).__name__} without")
    for module in experts:
        module.momoe_save_percent = value
        _form(module)
    return len(experts)


def momoe_experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls as the forward of an experts module.

    Args:
        self: a module of a class with `@use_experts_implementation`.
        hidden_states: (tokens, width).
        top_k_index: (tokens, chosen experts). An id that is no expert's, as transformers' expert parallelism writes
            for the experts of other ranks, adds nothing.
        top_k_weights: like `top_k_index`, any floating dtype.

    Returns:
        (tokens, width) in the dtype of `hidden_states`.

    Raises:
        ValueError: names the class of the experts, and what of them the kernels do not know.
    """
    activation, order = _form(self)
    is_gated = getattr(self, "has_gate", True)
    w1, w2 = (self.gate_up_proj if is_gated else self.up_proj), self.down_proj
    bias1 = bias2 = None
    if self.has_bias:
        bias1, bias2 = (self.gate_up_proj_bias if is_gated else self.up_proj_bias), self.down_proj_bias
    if not self.is_transposed:  # stored as (experts, out, in)
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    out, _ = momoe_mlp(
        hidden_states if torch.is_autocast_enabled(hidden_states.device.type) else hidden_states.to(w1.dtype),
        w1,
        w2,
        top_k_index,
        top_k_weights,
        _save_percent(self),
        bias1=bias1,
        bias2=bias2,
        activation=activation,
        order=order,
    )
    return out.to(hidden_states.dtype)


def register(version: str = metadata.version("transformers")) -> None:
    """Add "momoe" to transformers' experts interface, which importing this module does.

    Raises:
        ImportError: this version of transformers cannot take it.
        ValueError: MOMOE_SAVE_PERCENT is no number from 0 to 100.
    """
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(
            f"momoe_titan.adapters.transformers needs transformers {oldest} or later, found {version}: "
            "earlier releases run no experts but their own"
        )
    _environment()
    ALL_EXPERTS_FUNCTIONS.register(NAME, momoe_experts_forward)


def _is_experts(module: Any) -> bool:
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_bias")


def _form(module: Any) -> tuple[str, str]:
    """The names of the activation and of the order of gate and up; found once for each experts module.

    Dynamo finds them anew for each graph, and in PyTorch 2.11 cannot: there `set_save_percent` or a forward that is not
    compiled has to come first.
    """
    form = getattr(module, "_momoe_form", None)
    if form is None:
        form = _found_form(module)
        if not torch.compiler.is_compiling():  # or the module would not be the one that the graph was made for
            module.__dict__["_momoe_form"] = form
    return form


@torch.compiler.assume_constant_result
def _found_form(module: Any) -> tuple[str, str]:
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"experts_implementation {NAME!r} has no norm after the experts, which {name} has")
    try:
        if getattr(module, "has_gate", True):
            return activation_of(module._apply_gate)
        return activation_of(module.act_fn, has_gate=False)
    except UnknownActivationError as e:
        of = type(getattr(module, "act_fn", module)).__name__
        raise ValueError(f"experts_implementation {NAME!r} does not know the activation of {name} ({of}): {e}") from e


def _save_percent(module: Any) -> float:
    if torch.compiler.is_compiling():
        return _asked_for(module)
    # A repeated forward has to save tensors of the same shapes as the first.
    if inside_backward() and (first := module.__dict__.get("_momoe_saved")) is not None:
        return first
    module.__dict__["_momoe_saved"] = percent = _asked_for(module)
    return percent


def _asked_for(module: Any) -> float:
    if _within:
        return _within[-1]
    if (percent := getattr(module, "momoe_save_percent", None)) is not None:
        return percent
    return _environment()


@torch.compiler.assume_constant_result
def _environment() -> float:
    text = os.environ.get(ENVIRONMENT, "").strip()
    try:
        return validate_save_percent(float(text or 0), ENVIRONMENT)
    except ValueError:
        raise ValueError(f"{ENVIRONMENT} must be a number from 0 to 100, got {text!r}") from None


register()
