"""Compiles the kernels of a training step in processes of their own, before they first run.

The processes use no GPU: they run the launchers on tensors without memory and fill Triton's cache on disk, where the
first launch then finds the kernels. It also finds what Triton has a C compiler make, which takes as long as a small
kernel: the functions by which Python launches kernels, and Triton's own access to the driver.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from momoe_titan.kernels import cross_entropy, entropy, gpu, launch, launch_check, op, quantile, router, versions
from momoe_titan.kernels.adamw import Adamw, Rates, Updated
from momoe_titan.kernels.balance import BalanceStep
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.gemms import select_gemms
from momoe_titan.kernels.hopper.kernels import (
    down_proj_backward_kernel,
    rows_kernel,
    up_proj_kernel,
    weight_grad_kernel,
)
from momoe_titan.kernels.multi_tensor import SquareSum
from momoe_titan.kernels.routing import build_routing, packed_size, unpack_routing
from momoe_titan.save_percent import num_saved_rows

TIMEOUT = 120.0  # seconds that a launch waits for kernels being compiled


@dataclass(frozen=True)
class LayerKernels:
    """What the kernels of a layer depend on. Letters as in `momoe_mlp`; the logits are those of the router.

    Attributes:
        num_tokens: T of a forward; another T compiles nothing, so that about right will do.
        compiled: whether torch.compile has the layer.
        route: the function's score_func, normalize and scale, and whether there is a bias.
        counts_margins: whether quantile balancing does.
        num_classes: of the loss that is computed by chunks of logits; 0 where the loss has all logits.
    """

    num_tokens: int
    d_model: int
    ffn: int
    num_experts: int
    top_k: int
    dtype: torch.dtype
    save_percent: float
    compiled: bool
    route: tuple[str, bool, float, bool]
    counts_margins: bool
    num_classes: int = 0

    def new(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(size, dtype=dtype or self.dtype, device="meta")

    @property
    def num_rows(self) -> int:
        return self.num_tokens * self.top_k

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        sizes = self.num_experts, self.d_model, self.ffn
        return self.new(sizes[0], sizes[1], 2 * sizes[2]), self.new(sizes[0], sizes[2], sizes[1])

    @property
    def experts(self) -> Experts:
        return Experts(*self.weights)

    @property
    def choice(self) -> tuple[Tensor, Tensor]:
        """ids and scores."""
        shape = self.num_tokens, self.top_k
        return self.new(*shape, dtype=torch.int64), self.new(*shape, dtype=torch.float32)

    def forward(self) -> None:
        x = self.new(self.num_tokens, self.d_model)
        run = op.IMPLEMENTATIONS[torch.ops.momoe_titan.moe_forward.default]
        run(x, *self.weights, *self.choice, self.num_rows, self.save_percent, False, "triton")

    def backward(self) -> None:
        """The first part: up to the gradients of the pre-activations and of the scores."""

        def first_part(gemms, x, z, dz, routing):
            if num_saved_rows(self.num_rows, self.save_percent) < self.num_rows:
                gemms.recompute_z(x, self.experts, routing, z, dz)
            act = self.new(self.num_rows, self.ffn)
            dscore, _ = gemms.down_proj_backward(x, self.experts, routing, z, dz, act)
            op._score_grad(dscore, routing, self.choice[1], needed=True)

        self._with_gradient(first_part)

    def weight_gradients(self) -> None:
        def weight_gradients(gemms, x, z, dz, routing):
            gemms.up_weight_grad(x, dz, routing, [self.weights[0]])
            gemms.down_weight_grad(self.new(self.num_rows, self.ffn), x, routing, self.weights[1])

        self._with_gradient(weight_gradients)

    def input_gradient(self) -> None:
        """The last part of the backward."""

        def input_gradient(gemms, x, z, dz, routing):
            ranges = op._schedule(gemms, x, self.experts, self.num_rows, inference=False).dx_ranges
            op._combined(gemms.up_proj_backward, dz, self.experts, routing, None, torch.empty_like(x), ranges)

        self._with_gradient(input_gradient)

    def other_sort(self) -> None:
        """The sort of few tokens where the layer has many, and of many where it has few; its first call runs both."""
        num_tokens = 64 if self.num_tokens * self.top_k > 8192 else 8192
        ids, scores = (self.new(num_tokens, self.top_k, dtype=dtype) for dtype in (torch.int64, torch.float32))
        tile_rows = select_gemms(self.new(num_tokens, self.d_model), self.experts).tile_rows
        build_routing(ids, scores, self.num_experts, tile_rows)

    def router(self) -> None:
        """The choice of experts, its gradient, and what is counted of it."""
        logits = self.new(self.num_tokens, self.num_experts, dtype=torch.float32)
        bias = self.new(self.num_experts, dtype=torch.float32)
        func, normalize, scale, biased = self.route
        ids, scores = self.choice
        router._route(logits, bias if biased else None, self.top_k, func, normalize, scale)
        router._route_backward(scores, logits, ids, func, normalize, scale)
        if self.dtype == torch.bfloat16:
            router._bfloat16_parts(logits, False)
            router._bfloat16_parts(self.new(self.num_experts, self.d_model, dtype=torch.float32), True)
        if self.counts_margins:
            histogram = self.new(self.num_experts, quantile.NUM_BINS, dtype=torch.int32)
            quantile._count_margins(logits, bias, ids, histogram, func)
            quantile._add_tokens(self.new(1, self.d_model), self.new(self.d_model + 1, dtype=torch.float32))
        entropy._add_entropy(self.new(2, dtype=torch.float32), logits, self.new(dtype=torch.float32))

    def loss(self) -> None:
        """Of a training step, with the gradient."""
        if self.num_classes:
            logits, stats = self.new(1, self.num_classes), self.new(2, 1, dtype=torch.float32)
            cross_entropy._run_kernel(logits, self.new(1, dtype=torch.int64), stats, None, True, True)

    def _sizes(self, tile_rows: int) -> tuple[int, int, int, int, int]:
        return self.num_tokens, self.top_k, self.num_experts, tile_rows, self.num_rows

    def _packed(self, tile_rows: int) -> Tensor:
        return self.new(packed_size(*self._sizes(tile_rows)), dtype=torch.int32)

    def _with_gradient(self, call: Callable) -> None:
        """Call with kernels, x, the pre-activations, their gradient, and the routing."""
        x = self.new(self.num_tokens, self.d_model)
        gemms: Any = select_gemms(x, self.experts)
        routing = unpack_routing(self._packed(gemms.tile_rows), *self._sizes(gemms.tile_rows))
        z = self.new(num_saved_rows(self.num_rows, self.save_percent), 2 * self.ffn)
        z, dz = gemms.z_and_dz(z, self.num_rows, not self.compiled, some=0 < self.save_percent < 100)
        call(gemms, x, z, dz, routing)


@dataclass(frozen=True)
class StepKernels:
    """What the kernels between two backwards depend on.

    Attributes:
        layer: an MoE layer; its `counts_margins` says whether quantile balancing has a step.
        num_layers, num_balanced: the MoE layers, and those of them whose biases move.
        parameter, gradient, copy: dtypes that the optimizer gets; copy is None where it writes none.
        betas: of AdamW; None for another optimizer.
    """

    layer: LayerKernels
    num_layers: int
    num_balanced: int
    parameter: torch.dtype
    gradient: torch.dtype
    copy: torch.dtype | None
    betas: tuple[float, float] | None

    def update(self) -> None:
        """The gradient's norm, and AdamW."""
        new, one = self.layer.new, self.layer.new(dtype=torch.float32)
        gradient = new(1, dtype=self.gradient)
        SquareSum()([gradient])
        if self.betas is not None:
            parameter = new(1, dtype=self.parameter)
            copy = None if self.copy is None else new(1, dtype=self.copy)
            updated = Updated(parameter, gradient, parameter, parameter, one, copy)
            Adamw().step([updated], Rates(1e-3, self.betas, 1e-8, 0.1), one, one)

    def balance(self) -> None:
        """Quantile balancing, in the order of a step."""
        layer, new = self.layer, self.layer.new
        if not layer.counts_margins:
            return
        balanced = range(self.num_balanced)
        counts = [new(layer.num_experts, dtype=torch.int64) for _ in range(self.num_layers)]
        margins = [new(layer.num_experts, quantile.NUM_BINS, dtype=torch.int32) for _ in balanced]
        sums = [new(layer.d_model + 1, dtype=torch.float32) for _ in balanced]
        biases = [new(layer.num_experts, dtype=torch.float32) for _ in balanced]
        gates = [new(layer.num_experts, layer.d_model, dtype=self.parameter) for _ in balanced]
        step, found_inf = BalanceStep(), new(dtype=torch.float32)
        _, (_, histogram, sums_LC) = step.collect([counts, margins, sums])
        step.solve(biases, histogram, layer.top_k, 1.0, found_inf)
        logits = step.mean_logits(gates, [], sums_LC)
        step.follow(biases, logits, logits, layer.route[0], found_inf)


class _Target:
    """The part of Triton's driver that its compiler asks for, without a GPU."""

    def __init__(self, capability: tuple[int, int]):
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def compile_here(
    part: Callable[[], None], target: gpu.PlannedGpu, then: Callable[[Any], None] = lambda compiled: None
) -> None:
    """Compile what a function launches for this GPU; `then` gets each kernel. The process cannot launch any from then
    on."""
    driver.set_active(_Target(target.capability))  # pyright: ignore[reportArgumentType] - all of it that is used
    with gpu.plan_for(target), launch.compiling_ahead(then), torch.no_grad():
        part()


def build_launcher(compiled: Any) -> None:
    """Have the function built by which Python launches kernels with this one's arguments.

    Nothing where Triton has one function for all signatures.
    """
    if versions.signature_launcher is not None:
        with contextlib.suppress(Exception):  # then the first launch builds it, or says why it cannot
            versions.signature_launcher(compiled.src, compiled.metadata)


def build_driver() -> None:
    """Have Triton's access to the GPU's driver built."""
    nvidia.CudaUtils()


def launch_check_kernel() -> None:
    """The kernel by which the first launch of the process checks how kernels are launched."""
    numbers = torch.empty(64, dtype=torch.int32, device="meta")
    args = launch_check.arguments(0, numbers.new_empty(launch_check.NUM_VALUES, dtype=torch.int64), numbers)
    launch.launch(launch_check.probe_kernel, (1,), *args, CONSTANT=launch_check.CONSTANT)


def _in_child(part: Callable[[], None], target: gpu.PlannedGpu) -> None:
    # What fails here fails again at the first launch, where it is said.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        compile_here(part, target, build_launcher)
    finally:
        os._exit(0)


def hash_kernels() -> None:
    """Have Triton hash the Hopper kernels, by which it finds them on disk, in the order of a training step.

    They share functions that call one another, and Triton's hash of such functions depends on which was hashed first. A
    process that compiles one kernel alone would store it under a name that no other process looks for.
    """
    for kernel in (up_proj_kernel, rows_kernel, down_proj_backward_kernel, weight_grad_kernel):
        if isinstance(kernel, JITFunction):
            _ = kernel.cache_key


def start(layer: LayerKernels, step: StepKernels, target: gpu.PlannedGpu) -> None:
    """Start compiling; the first launch of this process that would compile waits until that has ended.

    Returns at once. Forks this process, whose threads might hold locks: call it before any are started.
    """
    hash_kernels()
    fork = multiprocessing.get_context("fork")
    experts = layer.forward, layer.backward, layer.weight_gradients, layer.input_gradient
    parts = (build_driver, *experts, layer.router, layer.other_sort, layer.loss)
    parts += launch_check_kernel, step.update, step.balance
    children = [fork.Process(target=_in_child, args=(part, target), daemon=True) for part in parts]
    for child in children:
        child.start()

    def wait() -> None:
        for child in children:
            child.join(TIMEOUT)

    launch.before_compiling(wait)
