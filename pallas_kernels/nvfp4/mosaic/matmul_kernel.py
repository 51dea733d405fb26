"""Block-scaled matrix product on Blackwell: tcgen05 and tensor memory, with three roles.

One warp loads tiles and scales, one issues products, and a warpgroup reads the accumulators, scales
them and writes the result. Thread blocks (CTAs) are persistent: the epilogue of a tile and the
loads of the next one overlap with products. All tiles cost the same, so they are assigned to
clusters statically. In the collective form the two blocks of a cluster share a tile of 256 rows:
each loads its rows of the left operand and half of the right operand, and the first block's warp
issues the products for both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.nvfp4.format import CODE_DTYPE, SCALE_DTYPE
from pallas_kernels.nvfp4.mosaic.matmul_tiling import (
    DEPTH,
    PIECE_BYTES,
    ROWS,
    SCALE_SLOTS,
    STEP_SCALES,
    Problem,
    Tiling,
)

LAYOUT = plgpu.Layout.TCGEN05
CONTROL, EPILOGUE = range(2)  # warpgroups
LOADER, ISSUER = range(2)  # warps of the first
SCALE_TILES = DEPTH // 64  # tiles of 128 rows and 4 scales per step
_PLGPU: Any = plgpu  # its classes look abstract to a type checker


def kernel(problem: Problem, tiling: Tiling, dtype, *, interpret: Any = None) -> Callable:
    """Builds `(a, b, a_scales, b_scales, alpha, *bias, *low_rank) -> y`, padded as in `Problem`.

    y = alpha * (a @ b^T + low-rank product) + bias; alpha scales the branch as well.

    The arguments of the kernel are:
      a, b: codes [m, k] and [n, k].
      a_scales, b_scales: [rows / 128, k / 64, 32, 16], whole tiles that cover the codes.
      alpha: float32 [1].
      bias: float32 [n], if the problem has a bias.
      low_rank: bfloat16 [m, rank] and [rank, n], if the problem has a rank.
    """
    return plgpu.kernel(
        _body(problem, tiling),
        out_type=jax.ShapeDtypeStruct((problem.m, problem.n), dtype),
        grid=(tiling.clusters,),
        grid_names=("cluster",),
        cluster=(tiling.blocks,),
        cluster_names=("block",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=_scratch(problem, tiling, jnp.dtype(dtype)),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({} if interpret is None else {"interpret": interpret}),
    )


def _swizzled(dtype, row_bytes: int = 128) -> tuple:
    """Shared-memory layout of tiles: 8 rows of at most 128 bytes together."""
    columns = row_bytes * 8 // jnp.finfo(dtype).bits
    return _PLGPU.TilingTransform((8, columns)), _PLGPU.SwizzleTransform(row_bytes)


def _scratch(problem: Problem, tiling: Tiling, dtype) -> dict[str, Any]:
    """Shared memory (`_s`), tensor memory (`_t`) and barriers."""
    # 1. Kinds of buffers and barriers.
    pair, stages = tiling.collective, tiling.stages
    scale_tiles = tiling.scale_rows // ROWS
    twice = plgpu.Barrier(num_barriers=2, orders_tensor_core=True)
    both: Any = plgpu.ClusterBarrier(
        collective_axes=("block",), num_barriers=2, orders_tensor_core=True, leader_tracked=True
    )

    def codes(rows: int):
        transforms = _swizzled(CODE_DTYPE, problem.swizzle)
        return plgpu.SMEM((stages, rows, DEPTH), CODE_DTYPE, transforms=transforms)

    def scales(tiles: int):
        return plgpu.SMEM((stages, tiles, SCALE_TILES, 32, 16), SCALE_DTYPE)

    def scales_in_tensor_memory(rows: int):
        layout = plgpu.TMEMLayout.SCALES_LAYOUT
        scales = plgpu.TMEM((rows, STEP_SCALES), SCALE_DTYPE, layout=layout, collective=pair)
        return (scales,) * SCALE_SLOTS

    # 2. The buffers of every product, then those of the optional operands.
    buffers = {
        "operands_s": (codes(ROWS), codes(tiling.own_columns), scales(1), scales(scale_tiles)),
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        "empty": plgpu.Barrier(num_barriers=stages, orders_tensor_core=True),
        "sums_t": plgpu.TMEM((ROWS, tiling.second + tiling.columns), jnp.float32, collective=pair),
        "scales_t": (scales_in_tensor_memory(ROWS), scales_in_tensor_memory(tiling.scale_rows)),
        "done": twice,
        "drained": both if pair else twice,  # only the first block of a pair waits for it
        "out_s": plgpu.SMEM(
            (2, ROWS, PIECE_BYTES // dtype.itemsize), dtype, transforms=_swizzled(dtype)
        ),
    }
    if problem.bias:
        buffers |= {
            "bias_s": plgpu.SMEM((tiling.columns,), jnp.float32),
            "bias_here": plgpu.Barrier(),
        }
    if problem.rank:
        buffers |= _low_rank_scratch(problem.rank, tiling)
    return buffers


def _low_rank_scratch(rank: int, tiling: Tiling) -> dict[str, Any]:
    transforms = _swizzled(jnp.bfloat16, min(128, 2 * rank))  # tcgen05 needs the same for both

    def part(rows: int, columns: int):
        return plgpu.SMEM((rows, columns), jnp.bfloat16, transforms=transforms)

    return {
        "low_rank_s": (part(ROWS, rank), part(rank, tiling.own_columns)),
        "low_rank_here": plgpu.Barrier(num_arrivals=2),
        "low_rank_done": plgpu.Barrier(orders_tensor_core=True),
    }


def _body(problem: Problem, tiling: Tiling):
    def body(*arrays, **buffers):
        *sources, out = arrays
        operands, alpha, rest = sources[:4], sources[4], sources[5:]
        bias, low_rank = rest[: problem.bias], rest[problem.bias :]
        warpgroup, block = (lax.axis_index(name) for name in ("warpgroup", "block"))

        @pl.when(warpgroup == CONTROL)
        def _control():
            @plgpu.warp_map
            def _warps(warp):
                @pl.when(warp == LOADER)
                def _load():
                    _loads(problem, tiling, operands, low_rank, **buffers)

                @pl.when((warp == ISSUER) & (block == 0))
                def _issue():
                    _products(problem, tiling, **buffers)

        @pl.when(warpgroup == EPILOGUE)
        def _epilogue():
            _write(problem, tiling, alpha, bias, out, block, **buffers)

    return body


def _each_tile(problem: Problem, tiling: Tiling, run: Callable[[Array, Array, Array], None]):
    """Calls `run(t, row, column)` for every tile of this cluster and returns their number."""
    down, across = tiling.tiles(problem)
    cluster = lax.axis_index("cluster")
    mine = lax.div(down * across - cluster + tiling.clusters - 1, jnp.int32(tiling.clusters))

    def tile(t, _):
        index = cluster + t * tiling.clusters
        run(t, *tile_of(index, down, across, tiling.band))

    lax.fori_loop(0, mine, tile, None)
    return mine


def tile_of(index: Array, down: int, across: int, band: int) -> tuple[Array, Array]:
    """Row and column of the tile at position `index` of the schedule.

    Tiles are scheduled in bands of `band` row tiles, so that concurrent clusters share operands in
    the cache.
    """
    return plgpu.planar_snake(index, (down, across), 0, min(band, down))


def _loads(problem, tiling, operands, low_rank, *, operands_s, full, empty, **buffers):
    """Loads the operands of every step once their slot is free; zeros past the edges."""
    steps, stages = problem.steps, tiling.stages

    def whole_tiles(start, size):
        return pl.ds(start * (size // ROWS), size // ROWS)

    def tile(t, row, column):
        rows = pl.ds(row * tiling.rows, tiling.rows)
        columns = pl.ds(column * tiling.columns, tiling.columns)
        if low_rank:
            _load_low_rank(tiling, low_rank, t, rows, columns, **buffers)

        def step(i, _):
            at = t * steps + i
            slot = lax.rem(at, jnp.int32(stages))

            @pl.when(at >= stages)
            def _wait_empty():
                plgpu.barrier_wait(empty.at[slot])

            depth, tiles = pl.ds(i * DEPTH, DEPTH), pl.ds(i * SCALE_TILES, SCALE_TILES)
            sources = (
                operands[0].at[rows, depth],
                operands[1].at[columns, depth],
                operands[2].at[whole_tiles(row, tiling.rows), tiles],
                operands[3].at[whole_tiles(column, tiling.scale_rows), tiles],
            )
            # Both blocks of a pair need the scales of all columns.
            for source, target, axis in zip(sources, operands_s, (0, 0, 0, None), strict=True):
                _copy(tiling, source, target.at[slot], full.at[slot], axis)

        lax.fori_loop(0, steps, step, None)

    total = _each_tile(problem, tiling, tile) * steps
    _wait_last(empty, total, stages, stages)
    if low_rank:
        plgpu.barrier_wait(buffers["low_rank_done"])


def _load_low_rank(
    tiling, low_rank, t, rows, columns, *, low_rank_s, low_rank_here, low_rank_done, **_
):
    """Loads the low-rank operands of a tile once those of the previous tile are used."""

    @pl.when(t >= 1)
    def _wait_low_rank_done():
        plgpu.barrier_wait(low_rank_done)

    sources = low_rank[0].at[rows, :], low_rank[1].at[:, columns]
    for axis, (source, target) in enumerate(zip(sources, low_rank_s, strict=True)):
        _copy(tiling, source, target, low_rank_here, axis)


def _copy(tiling: Tiling, source, target, arrived, axis: int | None) -> None:
    """Copies to shared memory; a pair of blocks splits the copy along `axis`.

    The block that issues products waits for `arrived`.
    """
    pair: dict[str, Any] = {}
    if tiling.collective:
        parts: Any = plgpu.CopyPartition
        how = parts.REPLICATED if axis is None else parts.PARTITIONED(axis)
        pair = {"collective_axes": "block", "leader_tracked": how}
    plgpu.copy_gmem_to_smem(source, target, arrived, **pair)


def _products(problem, tiling, *, empty, sums_t, done, drained, **buffers):
    """Issues all products; in each tile those of the low-rank branch come first."""
    steps, lag, axis = problem.steps, tiling.lag, _pair_axis(tiling)

    def tile(t, row, column):
        half = lax.rem(t, jnp.int32(2))
        target = sums_t.at[:, pl.ds(half * tiling.second, tiling.columns)]

        @pl.when(t >= lag)
        def _wait_drained():
            plgpu.barrier_wait(drained.at[lax.rem(t - lag, jnp.int32(2))])

        if problem.rank:
            _low_rank_product(tiling, target, **buffers)

        def step(i, _):
            started = (i > 0) | (problem.rank > 0)
            _scaled_products(tiling, t * steps + i, target, started, empty, **buffers)

        lax.fori_loop(0, steps, step, None)
        plgpu.tcgen05_commit_arrive(done.at[half], collective_axis=axis)

    tiles = _each_tile(problem, tiling, tile)
    _wait_last(empty, tiles * steps, SCALE_SLOTS, tiling.stages)
    _wait_last(drained, tiles, lag, 2)


def _pair_axis(tiling: Tiling) -> str | None:
    return "block" if tiling.collective else None


def _low_rank_product(tiling, target, *, low_rank_s, low_rank_here, low_rank_done, **_):
    left, right = low_rank_s
    plgpu.barrier_wait(low_rank_here)
    plgpu.tcgen05_mma(
        target, left, right, low_rank_done, accumulate=False, collective_axis=_pair_axis(tiling)
    )
    # Products of two kinds are not ordered with each other.
    plgpu.barrier_wait(low_rank_done)


def _scaled_products(tiling, at, target, started, empty, *, operands_s, full, scales_t, **_):
    """Issues step `at` of all steps; adds to `target` if `started`, else overwrites it."""
    a_s, b_s, *scales_s = operands_s
    slot, axis = lax.rem(at, jnp.int32(tiling.stages)), _pair_axis(tiling)
    plgpu.barrier_wait(full.at[slot])

    # A copy of scales does not wait for earlier products, so they must have finished.
    @pl.when(at >= SCALE_SLOTS)
    def _wait_scales_read():
        plgpu.barrier_wait(empty.at[lax.rem(at - SCALE_SLOTS, jnp.int32(tiling.stages))])

    for parity in range(SCALE_SLOTS):

        @pl.when(lax.rem(at, jnp.int32(SCALE_SLOTS)) == parity)
        def _issue(parity=parity):
            scales = [slots[parity] for slots in scales_t]
            for source, index in zip(scales_s, scales, strict=True):
                plgpu.async_copy_scales_to_tmem(source.at[slot], index, collective_axis=axis)
            plgpu.tcgen05_mma(
                target, a_s.at[slot], b_s.at[slot].transpose((1, 0)), empty.at[slot],
                a_scale=scales[0], b_scale=scales[1], accumulate=started, collective_axis=axis,
            )  # fmt: skip


def _wait_last(barriers, uses, pending: int, slots: int) -> None:
    """Waits for the last `pending` of all `uses` of slots: every barrier phase is observed."""

    @pl.loop(lax.max(uses - pending, jnp.int32(0)), uses)
    def _wait(i):
        plgpu.barrier_wait(barriers.at[lax.rem(i, jnp.int32(slots))])


def _write(
    problem, tiling, alpha, bias, out, block, *, sums_t, done, drained, out_s, bias_s=None,
    bias_here=None, **_,
):  # fmt: skip
    """Epilogue: reads every accumulator and writes alpha times it, plus the bias."""
    piece = out_s.shape[2]
    pieces = tiling.columns // piece
    # Columns that the next tile overwrites are read into registers first.
    first = pieces if tiling.lag == 2 else -(-(tiling.columns - tiling.second) // piece)
    scale = alpha[0]

    def tile(t, row, column):
        half = lax.rem(t, jnp.int32(2))
        rows = pl.ds(row * tiling.rows + block * ROWS, ROWS)
        if bias:
            columns = pl.ds(column * tiling.columns, tiling.columns)
            plgpu.copy_gmem_to_smem(bias[0].at[columns], bias_s, bias_here)

        def part(i):
            """Columns of the i-th piece, starting where the accumulators overlap."""
            return lax.select(half == 0, jnp.int32(pieces - 1 - i), jnp.int32(i)) * piece

        def read(i):
            columns = pl.ds(half * tiling.second + part(i), piece)
            return plgpu.async_load_tmem(sums_t.at[:, columns], layout=LAYOUT)

        plgpu.barrier_wait(done.at[half])
        read_ahead = [read(i) for i in range(first)]
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(drained.at[half])
        if bias:
            plgpu.barrier_wait(bias_here)
        for i in range(pieces):
            values = (read_ahead[i] if i < first else read(i)) * scale
            if bias:
                values = values + _along_rows(bias_s.at[pl.ds(part(i), piece)], values.shape)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            out_s.at[i % 2][...] = values.astype(out_s.dtype)
            plgpu.commit_smem()  # also orders the reads of the bias before its next load
            columns = pl.ds(column * tiling.columns + part(i), piece)
            plgpu.copy_smem_to_gmem(out_s.at[i % 2], out.at[rows, columns])

    _each_tile(problem, tiling, tile)
    plgpu.wait_load_tmem()
    plgpu.wait_smem_to_gmem(0)


def _along_rows(numbers_s, shape):
    """Per-column values, broadcast to all rows."""
    numbers = plgpu.load(numbers_s, layout=LAYOUT.reduce(0), optimized=False)
    # A single row of values would be inferred to have Hopper's layout.
    return plgpu.layout_cast(lax.broadcast_in_dim(numbers, shape, [1]), LAYOUT)
