"""Which output tiles a persistent program computes, and in which order.

Program p of P computes tiles begin + p, begin + p + P, ... of an order. Tiles that run at the same time
are neighbours in that order, so the order decides which operands they share in L2.

Letters: T tokens, D model width, E experts, F expert width, R routed rows, sorted by expert.
"""

# Gluon's compiler reads this code; its types are not those of Python that runs.
# pyright: reportCallIssue=false, reportOperatorIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from momoe_titan.kernels.hopper.layouts import BK, BM, BN, WEIGHT_ROWS_AT_A_TIME


@aggregate
class Tile:
    """One output tile: rows [row, row_end), at most 128 of them, columns from col, contraction [k_begin, k_end)."""

    expert: gl.tensor
    row: gl.tensor
    row_end: gl.tensor
    col: gl.tensor
    k_begin: gl.tensor
    k_end: gl.tensor

    @gluon.constexpr_function
    def __init__(self, expert, row, row_end, col, k_begin, k_end):
        self.expert = expert
        self.row = row
        self.row_end = row_end
        self.col = col
        self.k_begin = k_begin
        self.k_end = k_end

    @gluon.jit
    def steps(self):
        """Stages of the contraction. At least one: operands of a tile without contraction read as zeros."""
        return gl.maximum(gl.cdiv(self.k_end - self.k_begin, BK), 1)

    @gluon.jit
    def k_stop(self):
        return gl.maximum(self.k_end, self.k_begin + 1)

    @gluon.jit
    def within(self, k_begin, k_end):
        """The same tile over a part of its contraction."""
        return Tile(self.expert, self.row, self.row_end, self.col, k_begin, k_end)


@aggregate
class RowTiles:
    """Tiles over routed rows, columns fastest: tiles computed at the same time share their rows and their expert.

    With COLS_AT_A_TIME, that many column tiles for all rows, then the next ones, so that L2 has to hold only
    their part of an expert's weights.
    """

    tiles_ptr: gl.tensor  # packed row tiles of the routing
    offsets_ptr: gl.tensor  # (E + 1,) first row of each expert
    num_tiles: gl.tensor  # row tiles
    first_tile: gl.tensor  # row tiles before this one are skipped
    num_cols: gl.tensor  # column tiles
    k_end: gl.tensor
    COLS: gl.constexpr  # columns of a tile in each output
    COLS_AT_A_TIME: gl.constexpr  # column tiles; 0 for all

    @gluon.constexpr_function
    def __init__(self, tiles_ptr, offsets_ptr, num_tiles, first_tile, num_cols, k_end, COLS, COLS_AT_A_TIME):
        self.tiles_ptr = tiles_ptr
        self.offsets_ptr = offsets_ptr
        self.num_tiles = num_tiles
        self.first_tile = first_tile
        self.num_cols = num_cols
        self.k_end = k_end
        self.COLS = gl.constexpr(COLS)
        self.COLS_AT_A_TIME = gl.constexpr(COLS_AT_A_TIME)

    @gluon.jit
    def begin(self):
        return self.first_tile * self.num_cols + gl.program_id(0)

    @gluon.jit
    def end(self):
        return self.num_tiles * self.num_cols

    @gluon.jit
    def _place(self, t):
        """Row tile and column tile of tile t."""
        if self.COLS_AT_A_TIME:
            t -= self.first_tile * self.num_cols
            rows = gl.maximum(self.num_tiles - self.first_tile, 1)
            first_col = t // (rows * self.COLS_AT_A_TIME) * self.COLS_AT_A_TIME
            width = gl.minimum(self.num_cols - first_col, self.COLS_AT_A_TIME)
            t -= first_col * rows
            row, col = self.first_tile + t // width, first_col + t % width
        else:
            row, col = t // self.num_cols, t % self.num_cols
        return row, col

    @gluon.jit
    def packed_tile(self, t):
        """(j << 16) | expert of tile t, the j-th row tile of its expert; to be fetched one tile ahead of its use."""
        row, _ = self._place(gl.minimum(t, gl.maximum(self.end() - 1, 0)) if self.COLS_AT_A_TIME else t)
        return gl.load(self.tiles_ptr + gl.maximum(gl.minimum(row, self.num_tiles - 1), 0))

    @gluon.jit
    def tile(self, t, packed_tile):
        expert = packed_tile & 0xFFFF
        row = gl.load(self.offsets_ptr + expert) + (packed_tile >> 16 & 0xFFFF) * BM
        row_end = gl.load(self.offsets_ptr + expert + 1)
        _, col = self._place(t)
        return Tile(expert, row, row_end, col * self.COLS, gl.to_tensor(0), self.k_end)


@gluon.jit
def first_live_tile(tiles_ptr, offsets_ptr, num_tiles, first_row):
    """Index of the first row tile with a row at or past first_row, by bisection (tiles are in row order)."""
    low = gl.to_tensor(0)
    high = num_tiles
    while low < high:
        middle = (low + high) // 2
        packed_tile = gl.load(tiles_ptr + middle)
        expert = packed_tile & 0xFFFF
        row = gl.load(offsets_ptr + expert) + (packed_tile >> 16 & 0xFFFF) * BM
        is_before = gl.minimum(row + BM, gl.load(offsets_ptr + expert + 1)) <= first_row
        low = gl.where(is_before, middle + 1, low)
        high = gl.where(is_before, high, middle)
    return low


@gluon.jit
def _uniform(value):
    """The value, which all threads share, marked as shared: loops that it bounds count in uniform registers.

    All threads of a warp must call it.
    """
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [value], gl.int32, True, 1)


@aggregate
class WeightTiles:
    """Tiles over a weight gradient (E * M, N), expert by expert; rows fastest, a few row tiles at a time."""

    offsets_ptr: gl.tensor  # (E + 1,) first row of each expert
    E: gl.tensor
    M: gl.tensor
    N: gl.tensor
    num_rows: gl.tensor  # row tiles of one expert
    num_cols: gl.tensor  # column tiles

    @gluon.constexpr_function
    def __init__(self, offsets_ptr, E, M, N, num_rows, num_cols):
        self.offsets_ptr = offsets_ptr
        self.E = E
        self.M = M
        self.N = N
        self.num_rows = num_rows
        self.num_cols = num_cols

    @gluon.jit
    def begin(self):
        return gl.program_id(0)

    @gluon.jit
    def end(self):
        return self.E * self.num_rows * self.num_cols

    @gluon.jit
    def packed_tile(self, t):
        """Fetches nothing: `tile` computes everything from t."""
        return 0

    @gluon.jit
    def tile(self, t, packed_tile):
        expert = t // (self.num_rows * self.num_cols)
        q = t % (self.num_rows * self.num_cols)
        first = q // (WEIGHT_ROWS_AT_A_TIME * self.num_cols) * WEIGHT_ROWS_AT_A_TIME
        height = gl.minimum(self.num_rows - first, WEIGHT_ROWS_AT_A_TIME)
        q -= first * self.num_cols
        return Tile(
            expert,
            expert * self.M + (first + q % height) * BM,
            (expert + 1) * self.M,
            q // height * BN,
            _uniform(gl.load(self.offsets_ptr + expert)),
            _uniform(gl.load(self.offsets_ptr + expert + 1)),
        )
