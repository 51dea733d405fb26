"""How a product is cut into tiles, and what that costs on paper."""

import dataclasses
import itertools

ROWS = 128
"""Rows of the accumulator of one block (CTA): all lanes of its tensor memory."""
DEPTH = 256
"""Neighbours of the contraction that a step loads: rows of 128 bytes of codes."""
SCALES = DEPTH // 16
SCALE_SLOTS = 2
"""Steps whose scales lie in tensor memory: one is read while the other is written."""
TENSOR_COLUMNS = 512
"""Columns of tensor memory of a multiprocessor."""
SHARED_BYTES = 232_448 - 2_048
"""Shared memory of a block, less what barriers and alignment take."""
COLUMNS = (256, 128)
"""Of a cluster's tile."""
RANKS = (16, 32, 64, 128)
"""Ranks of the fused branch; others are padded to the next."""
PIECE_BYTES = 128
"""Columns of a row of the result that are written at once, in bytes: one swizzled row."""

# What a multiprocessor does in a cycle: 2 x 16384 operations are GB200's 10 PFLOP/s of dense FP4
# (152 multiprocessors at 2.06 GHz).
_PRODUCTS = 16_384  # multiply-adds of 4-bit numbers; of 16-bit ones a quarter
_SHARED = 128  # bytes of shared memory, read and written together
_LEAST_STAGES = 3  # two do not hide the way from memory
_HANDOVER = 400  # cycles without products while the next tile waits for shared accumulator columns


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the kernel is made for: padded sizes, and which optional operands there are.

    `m` is a multiple of 8, `n` of 64, `k` of `DEPTH`; `rank` is 0 or one of `RANKS`; `itemsize` is
    that of the result.
    """

    m: int
    n: int
    k: int
    rank: int = 0
    bias: bool = False
    itemsize: int = 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Columns of a cluster's tile, one block or two (`collective`) for it, steps loaded ahead,
    clusters at work, and row tiles that share their columns while these are in the cache."""

    columns: int
    collective: bool
    stages: int
    clusters: int
    band: int = 8

    def __post_init__(self) -> None:
        if self.columns not in COLUMNS or self.stages < 1:
            raise ValueError(
                f"tiles of {self.columns} columns, {self.stages} stages; choose columns from "
                f"{COLUMNS} and at least one stage"
            )

    @property
    def blocks(self) -> int:
        """Blocks of a cluster."""
        return 2 if self.collective else 1

    @property
    def rows(self) -> int:
        """Rows of a cluster's tile."""
        return ROWS * self.blocks

    @property
    def own_columns(self) -> int:
        """Rows of the right operand that one block loads."""
        return self.columns // self.blocks

    @property
    def second(self) -> int:
        """Where the second accumulator begins. Two of 256 columns and the scales do not fit: these
        two share columns, which the epilogue then reads first."""
        scales = SCALE_SLOTS * SCALES // 4 * (ROWS + self.scale_rows) // 32
        return min(self.columns, TENSOR_COLUMNS - scales - self.columns)

    @property
    def scale_rows(self) -> int:
        """Rows of the right operand's scales, in whole tiles of them."""
        return -(-self.columns // ROWS) * ROWS

    @property
    def lag(self) -> int:
        """Tiles after which a tile's accumulator is written again, in part or wholly."""
        return 2 if self.second == self.columns else 1

    def tiles(self, problem: Problem) -> tuple[int, int]:
        """Down and across."""
        return -(-problem.m // self.rows), -(-problem.n // self.columns)


def choose(problem: Problem, *, multiprocessors: int, collective: bool | None = None) -> Tiling:
    """The tiling that costs least by `cycles`; `collective` None leaves that open too."""
    pairs = (True, False) if collective is None else (collective,)
    options = [
        fit(problem, columns, pair, multiprocessors)
        for pair, columns in itertools.product(pairs, COLUMNS)
    ]
    deep = [tiling for tiling in options if tiling.stages >= _LEAST_STAGES]
    return min(deep, key=lambda tiling: cycles(problem, tiling))


def fit(problem: Problem, columns: int, collective: bool, multiprocessors: int) -> Tiling:
    """A tiling with as many stages as shared memory holds and a cluster for every place."""
    bare = Tiling(columns, collective, stages=1, clusters=1)
    stage = shared_bytes(problem, dataclasses.replace(bare, stages=2)) - shared_bytes(problem, bare)
    stages = 1 + (SHARED_BYTES - shared_bytes(problem, bare)) // stage
    down, across = bare.tiles(problem)
    clusters = max(1, min(down * across, multiprocessors // bare.blocks))
    return dataclasses.replace(bare, stages=min(stages, 6), clusters=clusters)


def shared_bytes(problem: Problem, tiling: Tiling) -> int:
    """Shared memory of a block, without barriers."""
    codes = (ROWS + tiling.own_columns) * DEPTH // 2
    scales = (ROWS + tiling.scale_rows) * SCALES
    low_rank = 2 * problem.rank * (ROWS + tiling.own_columns)
    bias = 4 * tiling.columns * problem.bias
    return tiling.stages * (codes + scales) + 2 * ROWS * PIECE_BYTES + low_rank + bias


def cycles(problem: Problem, tiling: Tiling) -> float:
    """Cycles on paper: waves of tiles, each bound by products or by shared memory.

    Every operand is counted twice in shared memory, as it is written and as it is read; memory
    behind that, launch and the first loads are not counted.
    """
    down, across = tiling.tiles(problem)
    waves = -(-down * across // tiling.clusters)
    products = ROWS * tiling.columns * (problem.k + 4 * problem.rank) / _PRODUCTS
    loaded = (ROWS + tiling.own_columns) / 2 + (ROWS + tiling.scale_rows) / 16
    shared = 2 * problem.k * loaded / _SHARED
    handover = _HANDOVER * ((tiling.lag == 1) + (problem.rank > 0))
    return waves * (max(products, shared) + handover)
