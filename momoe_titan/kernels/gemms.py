"""Chooses between the two families of grouped GEMMs: portable Triton, or Gluon for Hopper."""

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from momoe_titan.kernels import gpu
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
    """Plain Triton: any GPU, any dtype and width, and the interpreter."""

    traits = KernelTraits(tile_cols=None, dz_over_z=False)

    def __init__(self, tiles: dict[str, configs.TileConfig]):
        self.tiles = tiles
        self.tile_rows = tiles["up_proj"].block_m

    def up_proj(
        self, x_TD: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, act_RF: Tensor, z_S2F: Tensor, saves_z: bool
    ) -> None:
        """act of all rows, and z of the first z_S2F.shape[0].

        Args:
            saves_z: whether save_percent is above 0; not told from the rows, whose number must not compile anything.
        """
        up_proj.up_proj(self.tiles["up_proj"], x_TD, w1_ED2F, routing, act_RF, z_S2F)

    def z_and_dz(self, z_S2F: Tensor, num_rows: int, over_z: bool, some: bool) -> tuple[ZRows, ZRows]:
        """z and dz of the backward in the form that the other methods take, with new buffers where they need any.

        Args:
            z_S2F: the saved rows.
            over_z: whether dz may be written over them, where the traits allow it.
            some: whether save_percent is neither 0 nor 100.
        """
        return z_S2F, z_S2F.new_empty(num_rows, z_S2F.shape[1])

    def recompute_z(self, x_TD: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, z: ZRows, dz: ZRows) -> None:
        """The rows that were not saved; here they wait in dz."""
        up_proj.recompute_z(self.tiles["up_proj"], x_TD, w1_ED2F, routing, z.shape[0], dz)

    def down_proj(
        self, act_RF: Tensor, w2_EFD: Tensor, routing: RoutingMetadata, y_RD: Tensor, first_col: int = 0
    ) -> None:
        rows_gemm.rows_gemm(self.tiles["down_proj"], act_RF, w2_EFD, routing, y_RD, w_is_nk=False)

    def down_proj_backward(
        self,
        dout_TD: Tensor,
        w2_EFD: Tensor,
        routing: RoutingMetadata,
        z: ZRows,
        dz: ZRows,
        act_RF: Tensor,
    ) -> Tensor:
        """See down_proj.down_proj_backward; returns the partial sums of the scores' gradients."""
        return down_proj.down_proj_backward(self.tiles["down_proj_backward"], dout_TD, w2_EFD, routing, z, dz, act_RF)

    def up_proj_backward(
        self, dz_R2F: ZRows, w1_ED2F: Tensor, routing: RoutingMetadata, dx_RD: Tensor, first_col: int = 0
    ) -> None:
        rows_gemm.rows_gemm(self.tiles["up_proj_backward"], dz_R2F, w1_ED2F, routing, dx_RD, w_is_nk=True)

    def weight_grad(
        self,
        a: Tensor,
        b: ZRows,
        routing: RoutingMetadata,
        dw_EMN: Tensor,
        *,
        gather_a: bool = False,
        gather_b: bool = False,
    ) -> None:
        config = self.tiles["weight_grad"]
        weight_grad.weight_grad(config, a, b, routing, dw_EMN, gather_a=gather_a, gather_b=gather_b)


class HopperGemms:
    """Gluon, warp-specialised: compute capability 9.0, bfloat16 and float16, widths that are multiples of 64."""

    tile_rows = hopper.BM.value
    traits = KernelTraits(tile_cols=hopper.BN.value, dz_over_z=True)

    def up_proj(
        self, x_TD: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, act_RF: Tensor, z_S2F: Tensor, saves_z: bool
    ) -> None:
        hopper.up_proj(x_TD, w1_ED2F, routing, z_S2F if saves_z else None, z_S2F.shape[0], act_RF)

    def z_and_dz(self, z_S2F: Tensor, num_rows: int, over_z: bool, some: bool) -> tuple[ZRows, ZRows]:
        if over_z:
            z = hopper.SplitRows.beside(z_S2F, num_rows, two_buffers=some)
            return z, z
        dz_R2F = z_S2F.new_empty(num_rows, z_S2F.shape[1])
        num_saved = z_S2F.shape[0]
        return hopper.SplitRows(z_S2F if num_saved else dz_R2F, dz_R2F, num_saved), dz_R2F

    def recompute_z(self, x_TD: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, z: ZRows, dz: ZRows) -> None:
        hopper.recompute_z(x_TD, w1_ED2F, routing, z)

    def down_proj(
        self, act_RF: Tensor, w2_EFD: Tensor, routing: RoutingMetadata, y_RD: Tensor, first_col: int = 0
    ) -> None:
        hopper.down_proj(act_RF, w2_EFD, routing, y_RD, first_col)

    def down_proj_backward(
        self, dout_TD: Tensor, w2_EFD: Tensor, routing: RoutingMetadata, z: ZRows, dz: ZRows, act_RF: Tensor
    ) -> Tensor:
        num_rows, ffn = act_RF.shape
        dscore = act_RF.new_empty(num_rows, hopper.dscore_parts(ffn), dtype=torch.float32)
        hopper.down_proj_backward(dout_TD, w2_EFD, routing, routing.score_R, z, dz, act_RF, dscore)
        return dscore

    def up_proj_backward(
        self, dz_R2F: ZRows, w1_ED2F: Tensor, routing: RoutingMetadata, dx_RD: Tensor, first_col: int = 0
    ) -> None:
        hopper.up_proj_backward(dz_R2F, w1_ED2F, routing, dx_RD, first_col)

    def weight_grad(
        self,
        a: Tensor,
        b: ZRows,
        routing: RoutingMetadata,
        dw_EMN: Tensor,
        *,
        gather_a: bool = False,
        gather_b: bool = False,
    ) -> None:
        assert gather_a != gather_b, "one side is read through the tokens, the other in place"
        if gather_a:
            hopper.weight_grad(a, b, routing, dw_EMN)
        else:
            hopper.weight_grad(b, a, routing, dw_EMN, transposed=True)


@functools.cache
def _say_portable(device: torch.device, dtype: torch.dtype, d_model: int, ffn: int) -> None:
    _, device_name = gpu.device_properties(device)
    logger.info(
        "momoe_titan: portable Triton kernels on %s for %s, D = %d, F = %d "
        "(the Hopper kernels need capability 9.0, bfloat16 or float16, multiples of 64, and Triton 3.6 or 3.7)",
        device_name,
        dtype,
        d_model,
        ffn,
    )


def select_gemms(x: Tensor, ffn: int) -> PortableGemms | HopperGemms:
    """The fastest path for activations like ``x`` (.., D) and experts of hidden width ``ffn``.

    Depends on the device, the dtype, D and F, never on a token count.
    """
    if not gpu.interpreting():
        capability, _ = gpu.device_properties(x.device)
        if hopper.supported(x.dtype, x.shape[-1], ffn, capability):
            return HopperGemms()
        if isinstance(x.shape[-1], int) and x.is_cuda:  # not while a graph is traced
            _say_portable(x.device, x.dtype, x.shape[-1], ffn)
    return PortableGemms(configs.tile_configs(x, ffn))
