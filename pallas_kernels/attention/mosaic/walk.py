"""Walking over the ranges of one row of a tile map, inside a kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def walk(ranges, steps, stages: int, step: Callable, carry: Any) -> Any:
    """Folds `step(t, slot, tile, is_full, carry) -> carry` over all tiles of a row's ranges.

    `ranges` are references to start, stop and full of the row, `slot` is where tile `t` is loaded.
    """

    def body(t, state):
        (tile, index), carry = state
        slot = lax.rem(t, jnp.int32(stages))
        carry = step(t, slot, tile, ranges[2][index] == 1, carry)
        return _advance(ranges, tile, index), carry

    _, carry = lax.fori_loop(0, steps, body, ((ranges[0][0], jnp.int32(0)), carry))
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
    """Loads every tile's part of all sources, as soon as the last use of its slot is over.

    Sources come in groups that arrive and are released together; each is a function from rows to a
    reference in global memory. `here` and `used` are the barriers of the groups.
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
    """(tile, range) of the next step. Behind the last range the tile is not to be used."""
    start, stop, _ = ranges
    over = tile + 1 >= stop[index]
    following = lax.min(index + 1, jnp.int32(start.shape[0] - 1))
    return lax.select(over, start[following], tile + 1), lax.select(over, following, index)
