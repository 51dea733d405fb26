"""Tiling of the NVFP4 matrix product, and a cost model of a tiling."""

import dataclasses
import itertools
import math

ROWS = 128
"""Accumulator rows of one thread block (CTA): all lanes of its tensor memory."""
DEPTH = 256
"""Length of the contraction axis per step: rows of 128 bytes of codes."""
TILE_DEPTH = 64
"""Contraction length of a scale tile; loads past the end of the operands give zeros."""
STEP_SCALES = DEPTH // 16
SCALE_SLOTS = 2
"""Steps whose scales are in tensor memory: one is read while the other is written."""
TENSOR_COLUMNS = 512
"""Tensor memory columns of a multiprocessor."""
SHARED_BYTES = 232_448 - 2_048
"""Shared memory of a thread block in bytes, less barriers and alignment."""
TILE_WIDTHS = (256, 128)
"""Supported columns of a cluster's tile."""
RANKS = (16, 32, 64, 128)
"""Supported ranks of the fused branch; others are padded to the next."""
PIECE_BYTES = 128
"""Bytes of a result row that are written at once: one swizzled row."""

# Throughput of a multiprocessor per cycle: 2 x 16384 operations correspond to GB200's 10 PFLOP/s of
# dense FP4 (152 multiprocessors at 2.06 GHz).
_PRODUCTS = 16_384  # 4-bit multiply-adds; a quarter as many with 16 bits
_SHARED = 128  # bytes of shared memory, reads and writes together
_LEAST_STAGES = 3  # two do not hide the memory latency
_HANDOVER = 400  # cycles without products while the next tile waits for shared accumulator columns


@dataclasses.dataclass(frozen=True)
class Problem:
    """The padded sizes and optional operands that a kernel is compiled for.

    Attributes:
      m: rows of the result, a multiple of 8.
      n: columns of the result, a multiple of 64.
      k: contraction length, a multiple of `TILE_DEPTH`.
      rank: rank of the low-rank branch, one of `RANKS`, or 0 for none.
      bias: whether there is a bias.
      itemsize: bytes per element of the result.
    """

    m: int
    n: int
    k: int
    rank: int = 0
    bias: bool = False
    itemsize: int = 2

    @property
    def steps(self) -> int:
        """Steps of the contraction axis; the last one may be incomplete."""
        return -(-self.k // DEPTH)

    @property
    def swizzle(self) -> int:
        """Bytes of a swizzled row of codes, at most 128: copies take whole rows of them."""
        return math.gcd(self.k, DEPTH) // 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Tile sizes and schedule of the product kernel.

    Attributes:
      columns: columns of a cluster's tile, one of `TILE_WIDTHS`.
      collective: whether a cluster is a pair of thread blocks; else a single block.
      stages: pipeline stages, i.e. steps that are loaded ahead.
      clusters: clusters that run concurrently.
      band: row tiles scheduled together, so that they share columns in the cache.
    """

    columns: int
    collective: bool
    stages: int
    clusters: int
    band: int = 8

    def __post_init__(self) -> None:
        if self.columns not in TILE_WIDTHS or self.stages < 1:
            raise ValueError(
                f"columns must be one of {TILE_WIDTHS} and stages >= 1, got columns="
                f"{self.columns}, stages={self.stages}"
            )

    @property
    def blocks(self) -> int:
        """Thread blocks of a cluster."""
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
        """First column of the second accumulator.

        Two accumulators of 256 columns and the scales do not fit into tensor memory. They overlap
        then, and the epilogue reads the shared columns first.
        """
        scales = SCALE_SLOTS * STEP_SCALES // 4 * (ROWS + self.scale_rows) // 32
        return min(self.columns, TENSOR_COLUMNS - scales - self.columns)

    @property
    def scale_rows(self) -> int:
        """Rows of the right operand's scales, rounded up to whole tiles."""
        return -(-self.columns // ROWS) * ROWS

    @property
    def lag(self) -> int:
        """Number of tiles after which an accumulator is overwritten, in part or fully."""
        return 2 if self.second == self.columns else 1

    def tiles(self, problem: Problem) -> tuple[int, int]:
        """Number of tiles of a problem: (down, across)."""
        return -(-problem.m // self.rows), -(-problem.n // self.columns)


def choose(problem: Problem, *, multiprocessors: int, collective: bool | None = None) -> Tiling:
    """The cheapest tiling by `cycles`; `collective` None considers single blocks and pairs."""
    pairs = (True, False) if collective is None else (collective,)
    options = [
        fit(problem, columns, pair, multiprocessors)
        for pair, columns in itertools.product(pairs, TILE_WIDTHS)
    ]
    deep = [tiling for tiling in options if tiling.stages >= _LEAST_STAGES]
    return min(deep, key=lambda tiling: cycles(problem, tiling))


def fit(problem: Problem, columns: int, collective: bool, multiprocessors: int) -> Tiling:
    """The tiling with as many stages as shared memory holds (at most 6) and all clusters."""
    bare = Tiling(columns, collective, stages=1, clusters=1)
    stage = shared_bytes(problem, dataclasses.replace(bare, stages=2)) - shared_bytes(problem, bare)
    stages = 1 + (SHARED_BYTES - shared_bytes(problem, bare)) // stage
    down, across = bare.tiles(problem)
    clusters = max(1, min(down * across, multiprocessors // bare.blocks))
    return dataclasses.replace(bare, stages=min(stages, 6), clusters=clusters)


def shared_bytes(problem: Problem, tiling: Tiling) -> int:
    """Shared memory of a thread block in bytes, without barriers."""
    codes = (ROWS + tiling.own_columns) * DEPTH // 2
    scales = (ROWS + tiling.scale_rows) * STEP_SCALES
    low_rank = 2 * problem.rank * (ROWS + tiling.own_columns)
    bias = 4 * tiling.columns * problem.bias
    return tiling.stages * (codes + scales) + 2 * ROWS * PIECE_BYTES + low_rank + bias


def cycles(problem: Problem, tiling: Tiling) -> float:
    """Modelled cycles: waves of tiles, each bound by products or by shared memory.

    Every operand counts twice in shared memory, for its write and its read. Global memory, launch
    and the first loads are not modelled.
    """
    down, across = tiling.tiles(problem)
    waves = -(-down * across // tiling.clusters)
    product_cycles = ROWS * tiling.columns * (DEPTH * problem.steps + 4 * problem.rank) / _PRODUCTS
    loaded = (ROWS + tiling.own_columns) / 2 + (ROWS + tiling.scale_rows) / 16
    shared_memory = 2 * DEPTH * problem.steps * loaded / _SHARED
    handover = _HANDOVER * ((tiling.lag == 1) + (problem.rank > 0))
    return waves * (max(product_cycles, shared_memory) + handover)
