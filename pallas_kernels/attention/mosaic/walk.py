"""Iteration over the tile ranges of one row of a tile map, inside a kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def walk(ranges, steps, stages: int, step: Callable, carry: Any, *, first: int = 0) -> Any:
    """Folds `step(t, slot, tile, is_full, carry) -> carry` over the tiles of a row's ranges.

    `ranges` are references to start, stop and full of the row; `slot` is the pipeline slot of step
    `t`. Steps before `first` are skipped.
    """

    def body(t, state):
        (tile, index), carry = state
        slot = lax.rem(t, jnp.int32(stages))
        # The next tile is read before the step, which hides the latency.
        is_full, following = ranges[2][index] == 1, _advance(ranges, tile, index)
        return following, step(t, slot, tile, is_full, carry)

    at = (ranges[0][0], jnp.int32(0))
    for _ in range(first):
        at = _advance(ranges, *at)
    _, carry = lax.fori_loop(first, steps, body, (at, carry))
    return carry


def produce(
    ranges,
    steps,
    stages: int,
    rows: int,
    sources: Sequence[Sequence[Callable]],
    targets: Sequence[Sequence],
    here: Sequence,
    used: Sequence,
) -> None:
    """Producer loop: loads every tile of all sources as soon as its slot is free.

    Args:
      ranges: references to start, stop and full of the row.
      steps: number of tiles.
      stages: pipeline slots.
      rows: rows of a tile.
      sources: groups of functions from a slice of rows to a reference in global memory; a group is
        loaded and released together.
      targets: shared-memory buffers of each group.
      here: per group, barriers that signal that a slot's data has arrived.
      used: per group, barriers that signal that a slot may be overwritten.
    """

    def step(t, at):
        tile, index = at
        slot = lax.rem(t, jnp.int32(stages))
        part = pl.ds(tile * rows, rows)
        for group, slots, arrived, free in zip(sources, targets, here, used, strict=True):

            @pl.when(t >= stages)
            def _(free=free):
                plgpu.barrier_wait(free.at[slot])

            for source, target in zip(group, slots, strict=True):
                plgpu.copy_gmem_to_smem(source(part), target.at[slot], arrived.at[slot])
        return _advance(ranges, tile, index)

    lax.fori_loop(0, steps, step, (ranges[0][0], jnp.int32(0)))

    @pl.loop(0, lax.min(steps, jnp.int32(stages)))
    def _drain(i):
        slot = lax.rem(lax.max(steps - stages, jnp.int32(0)) + i, jnp.int32(stages))
        for free in used:
            plgpu.barrier_wait(free.at[slot])


def _advance(ranges, tile, index):
    """(tile, range) of the next step; after the last range the tile is meaningless."""
    start, stop, _ = ranges
    at_range_end = tile + 1 >= stop[index]
    following = lax.min(index + 1, jnp.int32(start.shape[0] - 1))
    return lax.select(at_range_end, start[following], tile + 1), lax.select(
        at_range_end, following, index
    )
