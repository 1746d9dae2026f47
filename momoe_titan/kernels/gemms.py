"""Chooses between the two families of grouped GEMMs: portable Triton, or Gluon for Hopper."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from momoe_titan.kernels import biases, gpu, versions
from momoe_titan.kernels.experts import Experts
from momoe_titan.kernels.hopper import launch as hopper
from momoe_titan.kernels.memory_schedule import KernelTraits
from momoe_titan.kernels.portable import (
    configs,
    down_proj,
    rows_gemm,
    up_proj,
    weight_grad,
)
from momoe_titan.kernels.routing import RoutingMetadata

logger = logging.getLogger(__name__)

# z or dz as `z_and_dz` of the same path returns it: a tensor, on the Hopper path one or SplitRows.
ZRows = Any


class PortableGemms:
    """Plain Triton: any GPU, dtype, width, layout and activation, and the interpreter."""

    traits = KernelTraits(tile_cols=None, dz_over_z=False)

    def __init__(self, tiles: dict[str, configs.TileConfig]):
        self.tiles = tiles
        self.tile_rows = tiles["up_proj"].block_m

    def up_proj(
        self, x_TD: Tensor, experts: Experts, routing: RoutingMetadata, act_RF: Tensor, z_SZ: Tensor, saves_z: bool
    ) -> None:
        """act of all rows, and z of the first z_SZ.shape[0].

        Args:
            saves_z: whether save_percent is above 0; not told from the rows, whose number must not compile anything.
        """
        up_proj.up_proj(self.tiles["up_proj"], x_TD, experts, routing, act_RF, z_SZ)

    def z_and_dz(self, z_SZ: Tensor, num_rows: int, over_z: bool, some: bool) -> tuple[ZRows, ZRows]:
        """z and dz of the backward in the form that the other methods take, with new buffers where they need any.

        Args:
            z_SZ: the saved rows.
            over_z: whether dz may be written over them, where the traits allow it.
            some: whether save_percent is neither 0 nor 100.
        """
        return z_SZ, z_SZ.new_empty(num_rows, z_SZ.shape[1])

    def recompute_z(self, x_TD: Tensor, experts: Experts, routing: RoutingMetadata, z: ZRows, dz: ZRows) -> None:
        """The rows that were not saved; here they wait in dz."""
        up_proj.recompute_z(self.tiles["up_proj"], x_TD, experts, routing, z.shape[0], dz)

    def down_proj(
        self, act_RF: Tensor, experts: Experts, routing: RoutingMetadata, y_RD: Tensor, first_col: int = 0
    ) -> None:
        rows_gemm.rows_gemm(self.tiles["down_proj"], act_RF, experts.w2, routing, y_RD)

    def down_proj_backward(
        self,
        dout_TD: Tensor,
        experts: Experts,
        routing: RoutingMetadata,
        z: ZRows,
        dz: ZRows,
        act_RF: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """See down_proj.down_proj_backward; returns the partial sums of the gradients of scores, and of bias1."""
        config = self.tiles["down_proj_backward"]
        return down_proj.down_proj_backward(config, dout_TD, experts, routing, z, dz, act_RF)

    def up_proj_backward(
        self, dz_RZ: ZRows, experts: Experts, routing: RoutingMetadata, dx_RD: Tensor, first_col: int = 0
    ) -> None:
        weights = [w.transpose(1, 2) for w in (experts.w1, experts.gate) if w is not None]
        rows_gemm.rows_gemm(self.tiles["up_proj_backward"], dz_RZ, weights[0], routing, dx_RD, *weights[1:])

    def up_weight_grad(self, x_TD: Tensor, dz: ZRows, routing: RoutingMetadata, dw1s: list[Tensor | None]) -> None:
        """The gradients of w1; or of up and gate, where they are two tensors (one may be None)."""
        width = dz.shape[1] // len(dw1s)
        for i, dw1 in enumerate(dw1s):
            if dw1 is not None:
                part = dz if len(dw1s) == 1 else dz[:, i * width : (i + 1) * width]
                self._weight_grad(x_TD, part, routing, dw1, gather_a=True)

    def down_weight_grad(self, act_RF: Tensor, dout_TD: Tensor, routing: RoutingMetadata, dw2: Tensor) -> None:
        """The gradient of w2 from what `down_proj_backward` wrote to act_RF."""
        self._weight_grad(act_RF, dout_TD, routing, dw2, gather_b=True)

    def _weight_grad(self, a: Tensor, b: Tensor, routing: RoutingMetadata, dw_EMN: Tensor, **gathered: bool) -> None:
        weight_grad.weight_grad(self.tiles["weight_grad"], a, b, routing, dw_EMN, **gathered)


class HopperGemms:
    """Gluon, warp-specialised: compute capability 9.0, bfloat16 and float16, widths that are multiples of 64."""

    tile_rows = hopper.BM.value
    traits = KernelTraits(tile_cols=hopper.BN.value, dz_over_z=True)

    def up_proj(
        self, x_TD: Tensor, experts: Experts, routing: RoutingMetadata, act_RF: Tensor, z_SZ: Tensor, saves_z: bool
    ) -> None:
        hopper.up_proj(x_TD, experts, routing, z_SZ if saves_z else None, z_SZ.shape[0], act_RF)

    def z_and_dz(self, z_SZ: Tensor, num_rows: int, over_z: bool, some: bool) -> tuple[ZRows, ZRows]:
        if over_z:
            z = hopper.SplitRows.beside(z_SZ, num_rows, two_buffers=some)
            return z, z
        dz_RZ = z_SZ.new_empty(num_rows, z_SZ.shape[1])
        num_saved = z_SZ.shape[0]
        return hopper.SplitRows(z_SZ if num_saved else dz_RZ, dz_RZ, num_saved), dz_RZ

    def recompute_z(self, x_TD: Tensor, experts: Experts, routing: RoutingMetadata, z: ZRows, dz: ZRows) -> None:
        hopper.recompute_z(x_TD, experts, routing, z)

    def down_proj(
        self, act_RF: Tensor, experts: Experts, routing: RoutingMetadata, y_RD: Tensor, first_col: int = 0
    ) -> None:
        hopper.down_proj(act_RF, experts.w2, routing, y_RD, first_col)

    def down_proj_backward(
        self, dout_TD: Tensor, experts: Experts, routing: RoutingMetadata, z: ZRows, dz: ZRows, act_RF: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dscore = dout_TD.new_empty(z.shape[0], hopper.dscore_parts(experts.ffn), dtype=torch.float32)
        hopper.down_proj_backward(dout_TD, experts, routing, z, dz, act_RF, dscore)
        if experts.bias1 is None:
            return dscore, None
        rows = hopper.SplitRows.of(dz)
        return dscore, biases.row_sums(rows.saved, rows.rest, rows.num_saved, rows.first, routing)

    def up_proj_backward(
        self, dz_RZ: ZRows, experts: Experts, routing: RoutingMetadata, dx_RD: Tensor, first_col: int = 0
    ) -> None:
        hopper.up_proj_backward(dz_RZ, experts, routing, dx_RD, first_col)

    def up_weight_grad(self, x_TD: Tensor, dz: ZRows, routing: RoutingMetadata, dw1s: list[Tensor | None]) -> None:
        hopper.up_weight_grad(x_TD, dz, routing, dw1s)

    def down_weight_grad(self, act_RF: Tensor, dout_TD: Tensor, routing: RoutingMetadata, dw2: Tensor) -> None:
        hopper.weight_grad(dout_TD, act_RF, routing, dw2.transpose(1, 2))


@functools.cache
def _say_portable(device: torch.device, dtype: torch.dtype, d_model: int, ffn: int) -> None:
    _, device_name = gpu.device_properties(device)
    logger.info(
        "momoe_titan: portable Triton kernels on %s for %s, D = %d, F = %d "
        "(the Hopper kernels need capability 9.0, bfloat16 or float16, and multiples of 64)",
        device_name,
        dtype,
        d_model,
        ffn,
    )


@functools.cache
def _warn_portable(why: str) -> None:
    logger.warning("momoe_titan: portable Triton kernels, which are slower: the Hopper kernels do not take %s", why)


def select_gemms(x: Tensor, experts: Experts) -> PortableGemms | HopperGemms:
    """The fastest path for activations like ``x`` (.., D) and these experts.

    Depends on the device, the dtype, the experts' sizes, layout and kind, never on a token count.
    """
    ffn = experts.ffn
    if not gpu.interpreting():
        capability, _ = gpu.device_properties(x.device)
        if hopper.supported(x.dtype, x.shape[-1], ffn, capability):
            why = hopper.refusal(experts)
            if why is None:
                return HopperGemms()
            if isinstance(x.shape[-1], int) and x.is_cuda:
                _warn_portable(why)
        elif isinstance(x.shape[-1], int) and x.is_cuda:  # not while a graph is traced
            if hopper.fits(x.dtype, x.shape[-1], ffn, capability) and not versions.takes_hopper_kernels():
                versions.warn_of_release()
            else:
                _say_portable(x.device, x.dtype, x.shape[-1], ffn)
    return PortableGemms(configs.tile_configs(x, ffn))
