"""The six grouped GEMMs behind the op, on one of two paths: portable Triton, or Gluon for Hopper."""

import functools
import logging

import torch
from torch import Tensor

from momoe_titan.kernels import gpu
from momoe_titan.kernels.hopper import launch as hopper
from momoe_titan.kernels.launch import cdiv
from momoe_titan.kernels.portable import (
    configs,
    down_proj,
    rows_gemm,
    up_proj,
    weight_grad,
)
from momoe_titan.kernels.routing import RoutingMetadata

logger = logging.getLogger(__name__)

_MAX_RANGES = 4
_SMALL_BYTES = 64 << 20  # not worth more launches
Y_RANGE_FLOPS = 0.75e11  # of a range of y at least: 0.16 ms at 7B-n256, where another range costs 0.05 ms
KEPT_Y_RANGE_FLOPS = 3e11  # of one that is there for the sake of kept z alone
DX_RANGE_FLOPS = 1.5e11  # of dx, whose ranges each read rows that are twice as wide
_L2_BYTES = 16 << 20  # of an expert's weights: what is better read in two ranges


class PortableGemms:
    """Plain Triton: any GPU, any dtype and width, and the interpreter."""

    dz_over_z = False  # whether dz can take the place of saved rows of z

    def __init__(self, tiles: dict[str, configs.TileConfig]):
        self.tiles = tiles
        self.tile_rows = tiles["up_proj"].block_m

    def up_proj(
        self, x_TD: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, act_RF: Tensor, z_S2F: Tensor, keeps_z: bool
    ) -> None:
        """act of all rows, and z of the first z_S2F.shape[0].

        Args:
            keeps_z: whether save_percent is above 0; not told from the rows, whose number must not compile anything.
        """
        up_proj.up_proj(self.tiles["up_proj"], x_TD, w1_ED2F, routing, act_RF, z_S2F)

    def z_and_dz(self, z_S2F: Tensor, num_rows: int, over_z: bool, some: bool) -> tuple[Tensor, Tensor]:
        """z and dz of the backward in the form that the other methods take, with new buffers where they need any.

        Args:
            z_S2F: the saved rows.
            over_z: whether dz may be written over them, if dz_over_z.
            some: whether save_percent is neither 0 nor 100.
        """
        return z_S2F, z_S2F.new_empty(num_rows, z_S2F.shape[1])

    def recompute_z(self, x_TD: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, z: Tensor, dz: Tensor) -> None:
        """The rows that were not saved; here they wait in dz."""
        up_proj.recompute_z(self.tiles["up_proj"], x_TD, w1_ED2F, routing, z.shape[0], dz)

    def column_ranges(
        self, num_rows: int, width: int, out_TD: Tensor, max_bytes: int, range_flops: float
    ) -> list[tuple[int, int]]:
        """Columns of out_TD that down_proj and up_proj_backward compute at a time: here all, so that first_col is 0."""
        return [(0, out_TD.shape[1])]

    def down_proj(
        self, act_RF: Tensor, w2_EFD: Tensor, routing: RoutingMetadata, y_RD: Tensor, first_col: int = 0
    ) -> None:
        rows_gemm.rows_gemm(self.tiles["down_proj"], act_RF, w2_EFD, routing, y_RD, w_is_nk=False)

    def down_proj_backward(
        self,
        dout_TD: Tensor,
        w2_EFD: Tensor,
        routing: RoutingMetadata,
        z: Tensor,
        dz: Tensor,
        act_RF: Tensor,
    ) -> Tensor:
        """See down_proj.down_proj_backward; returns the partial sums of the scores' gradients."""
        return down_proj.down_proj_backward(self.tiles["down_proj_backward"], dout_TD, w2_EFD, routing, z, dz, act_RF)

    def up_proj_backward(
        self, dz_R2F: Tensor, w1_ED2F: Tensor, routing: RoutingMetadata, dx_RD: Tensor, first_col: int = 0
    ) -> None:
        rows_gemm.rows_gemm(self.tiles["up_proj_backward"], dz_R2F, w1_ED2F, routing, dx_RD, w_is_nk=True)

    def weight_grad(
        self,
        a: Tensor,
        b: Tensor,
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
    dz_over_z = True

    def up_proj(self, x_TD, w1_ED2F, routing, act_RF, z_S2F, keeps_z):
        hopper.up_proj(x_TD, w1_ED2F, routing, z_S2F if keeps_z else None, z_S2F.shape[0], act_RF)

    def z_and_dz(self, z_S2F, num_rows, over_z, some):
        if over_z:
            z = hopper.SplitRows.beside(z_S2F, num_rows, in_two=some)
            return z, z
        dz_R2F = z_S2F.new_empty(num_rows, z_S2F.shape[1])
        num_saved = z_S2F.shape[0]
        return hopper.SplitRows(z_S2F if num_saved else dz_R2F, dz_R2F, num_saved), dz_R2F

    def recompute_z(self, x_TD, w1_ED2F, routing, z, dz):
        hopper.recompute_z(x_TD, w1_ED2F, routing, z)

    def column_ranges(self, num_rows, width, out_TD, max_bytes, range_flops):
        """Columns of out_TD that down_proj and up_proj_backward compute at a time.

        Whole tiles wide, and as few ranges as let num_rows rows fit into max_bytes, but at most four,
        and each with range_flops to do, so that y or dx costs the layer no more than about 2% of its
        speed. One H100, ms of forward, backward in one, two, three ranges: 7B-n256 1.184, 2.162; 1.231,
        2.216; 1.265, 2.263; 1.4B-n512 0.828, 1.698; 0.871, 1.754; 0.915, 1.831. Two where an expert's
        weights are large, which was faster (30B-n1024 dx on an H200 3.27 -> 2.99, before few column
        tiles at a time) and takes less memory.

        Args:
            width: the contraction, columns of the rows that are multiplied.
            max_bytes: what a range should fit into.
            range_flops: what a range has to do at least, for there to be more than one.
        """
        cols, itemsize = out_TD.shape[1], out_TD.element_size()
        num_bytes = num_rows * cols * itemsize
        num_ranges = cdiv(num_bytes, max(max_bytes, _SMALL_BYTES))
        num_ranges = min(num_ranges, _MAX_RANGES, max(int(2 * num_rows * width * cols / range_flops), 1))
        if width * cols * itemsize >= _L2_BYTES and num_bytes > _SMALL_BYTES:
            num_ranges = max(num_ranges, 2)
        tile = hopper.BN.value
        step = cdiv(cdiv(cols, tile), max(num_ranges, 1)) * tile
        return [(begin, min(begin + step, cols)) for begin in range(0, cols, step)]

    def down_proj(self, act_RF, w2_EFD, routing, y_RD, first_col=0):
        hopper.down_proj(act_RF, w2_EFD, routing, y_RD, first_col)

    def down_proj_backward(self, dout_TD, w2_EFD, routing, z, dz, act_RF):
        num_rows, ffn = act_RF.shape
        dscore = act_RF.new_empty(num_rows, hopper.dscore_parts(ffn), dtype=torch.float32)
        hopper.down_proj_backward(dout_TD, w2_EFD, routing, routing.score_R, z, dz, act_RF, dscore)
        return dscore

    def up_proj_backward(self, dz_R2F, w1_ED2F, routing, dx_RD, first_col=0):
        hopper.up_proj_backward(dz_R2F, w1_ED2F, routing, dx_RD, first_col)

    def weight_grad(self, a, b, routing, dw_EMN, *, gather_a=False, gather_b=False):
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
