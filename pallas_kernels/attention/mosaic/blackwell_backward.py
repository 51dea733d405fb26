"""What the two kernels of Blackwell's attention backward share: tiles, roles, loads and stores.

`blackwell_query_gradient` computes dq and `blackwell_key_value_gradient` computes dk and dv. In
both, one warp loads tiles and one issues matrix products; two warpgroups turn logits into operands
of the gradient products. These operands and all sums stay in tensor memory. Neither kernel uses
atomics, so results are deterministic.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.attention.mosaic.primitives import (
    MASKED,
    SWIZZLED,
    BackwardInputs,
    broadcast_batch,
    per_column,
)
from pallas_kernels.attention.mosaic.walk import walk
from pallas_kernels.attention.tilemap import TileMap

LAYOUT = plgpu.Layout.TCGEN05
CONTROL, COMPUTING = 0, 2  # number of the control warpgroup, count of computing warpgroups
LOADER, ISSUER = range(2)  # warps of the control warpgroup
CONTROL_REGISTERS, COMPUTE_REGISTERS = 88, 208  # together all registers of three warpgroups
PARTS = 2  # pieces of a step per computing warpgroup
SHORT_STAGES = 2  # of tiles that are not needed from the first to the last product of a step
TILE = 64  # columns of a swizzled tile


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile sizes of the backward kernels.

    Attributes:
      rows: rows of a thread block.
      step: rows of the other operand per step.
      stages: pipeline stages of the tiles that a step reads first and last. The others, which it
        needs for a shorter time, have two.
    """

    rows: int = 128
    step: int = 128
    stages: int = 3


def launch(
    body: Callable,
    saved: BackwardInputs,
    tiles: TileMap,
    size: BackwardTiles,
    like: Sequence[Array],
    scratch: dict[str, Any],
    interpret: Any,
) -> tuple[Array, ...]:
    """Runs `body` in one thread block per head, `size.rows` rows and sample.

    `like` are arrays with the shapes and dtypes of the outputs.
    """
    b, length, heads, _ = like[0].shape
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
        grid=(heads, length // size.rows, b),
        grid_names=("head", "row", "batch"),
        num_threads=1 + COMPUTING,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    query, key = (broadcast_batch(x, b) for x in (saved.columns.query, saved.columns.key))
    maps = jax.tree.map(lambda x: broadcast_batch(x, b), tiles)
    return kernel(
        saved.q, saved.k, saved.v, saved.grad, saved.lse, saved.delta, query, key,
        maps.start, maps.stop, maps.full, maps.count, maps.order,
    )  # fmt: skip


def block_position(size: BackwardTiles, start, stop, full, count, order):
    """(head, sample, rows, tile ranges, steps) of this thread block; longest rows first."""
    head, place, batch = (lax.axis_index(name) for name in ("head", "row", "batch"))
    row = order[batch, place]
    ranges = tuple(x.at[batch, row] for x in (start, stop, full))
    return head, batch, pl.ds(row * size.rows, size.rows), ranges, count[batch, row]


def load_tiles(
    size: BackwardTiles, position, own, streamed, *, own_s, own_here, targets, here, used, **_
) -> None:
    """Loads the block's rows of the arrays `own`, then those of `streamed` step by step."""
    head, batch, rows, ranges, steps = position
    for source, target in zip(own, own_s, strict=True):
        plgpu.copy_gmem_to_smem(source.at[batch, rows, head], target, own_here)
    sources = tuple((lambda part, x=x: x.at[batch, part, head],) for x in streamed)
    produce(ranges, steps, size.step, sources, targets, here, used)


def assign_roles(load: Callable, issue: Callable, compute: Callable) -> None:
    """Runs `load()` and `issue()` in one warp each, `compute(parity)` in both warpgroups."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == CONTROL)
    def _control():
        plgpu.set_max_registers(CONTROL_REGISTERS, action="decrease")

        @plgpu.warp_map
        def _warps(warp):
            pl.when(warp == LOADER)(load)
            pl.when(warp == ISSUER)(issue)

    @pl.when(warpgroup != CONTROL)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute(warpgroup - 1)


def staged_scratch(size: BackwardTiles, width: int, dtype) -> dict[str, Any]:
    """Tiles that a step loads, with barriers: `here` has arrived, `used` may be overwritten.

    The first tile is the one with `size.stages` stages.
    """
    stages = size.stages, SHORT_STAGES
    return {
        "targets": tuple(
            (plgpu.SMEM((n, size.step, width), dtype, transforms=SWIZZLED),) for n in stages
        ),
        "here": tuple(plgpu.Barrier(num_barriers=n) for n in stages),
        "used": tuple(plgpu.Barrier(num_barriers=n, orders_tensor_core=True) for n in stages),
    }


def produce(
    ranges, steps, rows: int, sources: Sequence[Sequence[Callable]], targets, here, used
) -> None:
    """Loads every tile of all sources as soon as its slot is free; groups have their own slots.

    Args:
      ranges: references to start, stop and full of the row.
      steps: number of tiles.
      rows: rows of a tile.
      sources: groups of functions from a slice of rows to a reference in global memory; a group is
        loaded and released together.
      targets: shared-memory buffers of each group, with a leading axis of slots.
      here: per group, barriers that signal that a slot's data has arrived.
      used: per group, barriers that signal that a slot may be overwritten.
    """
    groups = tuple(zip(sources, targets, here, used, strict=True))

    def step(t, slot, tile, is_full, carry):
        part = pl.ds(tile * rows, rows)
        for group, buffers, arrived, free in groups:
            stages = buffers[0].shape[0]
            slot = slot_of(t, stages)

            @pl.when(t >= stages)
            def _(free=free, slot=slot):
                plgpu.barrier_wait(free.at[slot])

            for source, target in zip(group, buffers, strict=True):
                plgpu.copy_gmem_to_smem(source(part), target.at[slot], arrived.at[slot])
        return carry

    walk(ranges, steps, 1, step, ())
    for _, buffers, _, free in groups:
        drain(steps, free, buffers[0].shape[0])


def walk_ahead(ranges, steps, tiles: int, fetch: Callable, step: Callable) -> None:
    """Calls `step(t, tile, is_full, fetch(tile))` for all tiles of a row's ranges, in order.

    The values of a tile are fetched before the step of the tile before, which hides the latency.
    There are `tiles` tiles in all; values are never fetched from beyond the last.
    """

    def lagging(t, slot, tile, is_full, previous):
        following = tile, is_full, fetch(lax.min(tile, jnp.int32(tiles - 1)))
        pl.when(t >= 1)(lambda: step(t - 1, *previous))
        return following

    start = jnp.int32(0), jnp.bool_(False), fetch(jnp.int32(0))
    walk(ranges, steps + 1, 1, lagging, start)


def drain(steps, barriers, stages: int) -> None:
    """Waits for the last use of each of the `stages` barriers, so that every phase is observed."""

    @pl.loop(0, lax.min(steps, jnp.int32(stages)))
    def _wait(i):
        plgpu.barrier_wait(barriers.at[slot_of(lax.max(steps - stages, jnp.int32(0)) + i, stages)])


def slot_of(t, stages: int):
    """The pipeline slot of step `t`."""
    return lax.rem(t, jnp.int32(stages))


def own_columns(size: BackwardTiles, parity) -> tuple[list, int]:
    """(first columns, number of columns) of the pieces that a computing warpgroup has of a step.

    Pieces alternate between the warpgroups, so that the first `PARTS`-th of the columns is complete
    when each has computed its first piece.
    """
    piece = size.step // (PARTS * COMPUTING)
    return [pl.multiple_of((i * COMPUTING + parity) * piece, piece) for i in range(PARTS)], piece


def load(ref):
    """Loads from tensor memory."""
    return plgpu.async_load_tmem(ref, layout=LAYOUT)


def store(ref, values) -> None:
    """Stores to tensor memory, in the dtype of `ref`; visible after `commit_tmem`."""
    plgpu.async_store_tmem(ref, values.astype(ref.dtype))


def row_values(ref):
    """Loads one value per row of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(1), optimized=False)


def column_values(ref):
    """Loads one value per column of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(0), optimized=False)


def along_columns(values, shape):
    """Broadcasts one value per column to all rows."""
    # A single row of values would be inferred to have Hopper's layout.
    return plgpu.layout_cast(per_column(values, shape), LAYOUT)


def softmax_weights(is_full, exponents: Sequence, mask: Callable) -> list:
    """Powers of two of `exponents`, one array per piece of the columns.

    They are zero where `mask(i)` of piece i is false; full tiles skip the mask.
    """

    def piece(i, x):
        x = lax.cond(is_full, lambda x: x, lambda x: jnp.where(mask(i), x, MASKED), x)
        return jnp.exp2(x)

    return [piece(i, x) for i, x in enumerate(exponents)]


def times_weights(is_full, gradient, weights):
    """The gradient of a piece's weights, times the weights.

    Where the mask is false, the product is zero even if the gradient is not a number.
    """

    def masked(product):
        return jnp.where(weights > 0, product, 0.0)

    return lax.cond(is_full, lambda x: x, masked, gradient * weights)


def write(steps, sum_t, own_s, out, scale: float) -> None:
    """Writes a scaled sum to global memory through `own_s`, which no product reads any more.

    Without steps the tensor memory is uninitialised, and zeros are written.
    """
    rows, width = sum_t.shape
    zeros = plgpu.layout_cast(jnp.zeros((rows, TILE), jnp.float32), LAYOUT)
    for i in range(width // TILE):
        columns = pl.ds(i * TILE, TILE)
        values = lax.cond(
            steps > 0, lambda x: x * scale, lambda x: zeros, load(sum_t.at[:, columns])
        )
        own_s.at[:, columns][...] = values.astype(own_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own_s, out)
    plgpu.wait_smem_to_gmem(0)
