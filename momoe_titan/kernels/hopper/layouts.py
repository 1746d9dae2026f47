"""Sizes, shared-memory layouts and ragged descriptors that all Hopper kernels use.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from momoe_titan.kernels.versions import reinterpret

HALF = gl.constexpr(64)  # output rows of one consumer
BM = gl.constexpr(128)  # output rows of a tile
BN = gl.constexpr(256)  # output columns of a tile; SwiGLU: 128 of up beside the same 128 of gate
BK = gl.constexpr(64)  # contraction of one stage
CHUNK = gl.constexpr(64)  # columns of one TMA store
STAGES = gl.constexpr(4)
Z_STEPS = gl.constexpr(4)  # stages that bring the z of a tile of down_proj_backward

# A thread of each of the three warpgroups shares 504 registers: the second consumer and the producer
# ask for these numbers, and the first consumer is left with as many as the second.
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)

SYNC_STEPS = gl.constexpr(8)  # `ProgramSync` publishes a tile this many steps before its end
SYNC_SLOTS = gl.constexpr(256)  # no Hopper GPU runs more programs at a time
WEIGHT_ROWS_AT_A_TIME = gl.constexpr(16)  # row tiles of a weight gradient that go through all columns together

# A descriptor for ragged rows has two extra dimensions whose strides cancel modulo 2^64, so that
# the bounds check on the row dimension can be placed at any row (see triton.tools.ragged_tma).
RAGGED_ROWS = gl.constexpr(1 << 30)

TILE_SMEM = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
RAGGED_SMEM = gl.constexpr(gl.NVMMASharedLayout(128, 16, 4))
# up and gate of 64 columns of z: (2, 128, 64), which fills the rhs of one stage
Z_SMEM = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))
BARRIER_SMEM = gl.constexpr(mbarrier.MBarrierLayout())
# A cp.async moves 16 bytes a thread; eight neighbours copy 128 bytes of one row.
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
HALF_ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
PAIRS_ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SLICE_ACCUMULATOR = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))


@gluon.jit
def ragged_coordinates(row, row_end, col):
    """Coordinates of a ragged descriptor: a block from (row, col) whose rows end at row_end."""
    return RAGGED_ROWS, row_end, RAGGED_ROWS - (row_end - row), col


@gluon.jit
def as_ragged(buffer, desc):
    """The two-dimensional buffer in the four-dimensional form that a ragged descriptor copies."""
    return reinterpret(buffer, desc.dtype, [1, 1, buffer.shape[0], buffer.shape[1]], desc.layout)
