"""Online softmax of Blackwell's attention forward, one row per thread, in tensor memory.

The weights replace the logits. Earlier sums are rescaled only when a row's maximum grew by more
than `MOST_GROWTH` since the last rescaling: weights relative to an older maximum are larger by at
most 2 ** MOST_GROWTH, and the final division uses the same maximum.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic.blackwell_rows import (
    ROW,
    any_row,
    load_rows,
    wait_loads,
    wait_stores,
)
from pallas_kernels.attention.mosaic.columns import code_mask
from pallas_kernels.attention.mosaic.primitives import LOG2_E, MASKED, per_column, per_row
from pallas_kernels.attention.mosaic.walk import walk

PIECE = 64  # columns of weights that are passed on together
AT_ONCE = 32  # columns in registers where the logits of a row are there too, or must not be
MOST_GROWTH = 8.0  # of a row's maximum without rescaling, in units of log2
POLYNOMIAL = 16  # columns of each piece whose exponentials are polynomials
COEFFICIENTS = 0.69328282, 0.24220917, 0.05500809  # of 2 ** x - 1 for |x| <= 1/2, best relative fit
ROUNDING = 1.5 * 2**23  # a float32 this large has no fraction


def softmax(size, width: int, mask: Callable, ranges, steps, **buffers):
    """Turns the logits of a query tile into weights in every step.

    A weight is 2 ** (logit * scale - shift), where the shift is a maximum of the row so far.

    Args:
      size: tile sizes of the kernel.
      width: head width.
      mask: `mask(tile, logits)` masks the logits of a partial tile in place.
      ranges: references to start, stop and full of the row of the tile map.
      steps: number of tiles.
      **buffers: those of the query tile, see `_step`.

    Returns the shift and the sum of the weights of each row.
    """
    rows = buffers["sums_t"].shape[:1]
    scale = width**-0.5 * LOG2_E

    def step(t, slot, k_tile, is_full, carry):
        partial_mask = functools.partial(mask, k_tile)
        return _step(scale, t, is_full, partial_mask, rounding, carry, **buffers)

    # No compiler may know that adding and subtracting `ROUNDING` cancel.
    numbers = (
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        lax.optimization_barrier(jnp.full(rows, ROUNDING, jnp.float32)),
    )
    *start, rounding = (plgpu.layout_cast(x, ROW.reduce(1)) for x in numbers)
    top, total = walk(ranges, steps, size.stages, step, tuple(start))
    return _shift(top, scale), total


def _step(
    scale, t, is_full, mask, rounding, carry, *, sums_t, logits_weights_t, logits_full, weights_full
):
    """One step: (maximum that weights are relative to, sum of weights) before and after.

    `logits_full` signals the logits of a step; `weights_full` signal its weights, by piece of
    columns. `sums_t` are the sums of weighted values.
    """
    # 1. The logits, and what they change about the maximum.
    top, total = carry
    logits_t, weights_t = logits_weights_t
    pieces = [pl.ds(i * PIECE, PIECE) for i in range(len(weights_full))]
    plgpu.barrier_wait(logits_full)
    pl.when(~is_full)(lambda: mask(logits_t))
    logits = [load_rows(logits_t.at[:, columns]) for columns in pieces]
    wait_loads()
    new_top = functools.reduce(jnp.maximum, (x.max(axis=1) for x in logits), top)
    top, total = _rescaled(t, scale, top, new_top, total, sums_t)

    # 2. The weights replace the logits, piece by piece: products start with the first.
    shift = _shift(top, scale)
    for columns, x, full in zip(pieces, logits, weights_full, strict=True):
        weights = _exp2(x * scale - per_row(shift, x.shape), rounding)
        total = total + weights.sum(axis=1)
        plgpu.async_store_tmem(weights_t.at[:, columns], weights.astype(weights_t.dtype))
        wait_stores()
        plgpu.barrier_arrive(full)
    return top, total


def _shift(top, scale: float):
    """What the scaled logits of a row are relative to; zero if all were masked so far."""
    return jnp.where(top <= MASKED, 0.0, top * scale)


def _rescaled(t, scale: float, top, new_top, total, sums_t):
    """The maximum that the weights are relative to, and the sum of weights relative to it.

    The sums in tensor memory are rescaled if the maximum of any row of the warp grew too much. The
    products of the previous step are finished: the logits of this step came after them.
    """

    def rescale():
        fade = jnp.exp2((top - new_top) * scale)

        @pl.when(t >= 1)
        def _sums():
            for i in range(0, sums_t.shape[1], AT_ONCE):
                part = sums_t.at[:, pl.ds(i, AT_ONCE)]
                sums = load_rows(part)
                wait_loads()
                plgpu.async_store_tmem(part, sums * per_row(fade, sums.shape))

        return new_top, total * fade

    return lax.cond(any_row((new_top - top) * scale > MOST_GROWTH), rescale, lambda: (top, total))


def _exp2(x, rounding):
    """2 ** x; of every `PIECE` columns, the last `POLYNOMIAL` without the unit of exponentials."""
    hardware = x.shape[1] - POLYNOMIAL
    parts = jnp.exp2(x[:, :hardware]), _polynomial_exp2(x[:, hardware:], rounding)
    return jnp.concatenate(parts, axis=1)


def _polynomial_exp2(x, rounding):
    """2 ** x for x < 128, by multiply-adds; the relative error of 1e-4 is below bfloat16's.

    The integer part goes to the exponent, and a polynomial gives 2 ** fraction. All x below -127
    give exactly zero.
    """
    x = jnp.maximum(x, -127.0)
    rounding = per_row(rounding, x.shape)
    nearest = x + rounding  # the integer is in the low bits
    fraction = x - (nearest - rounding)
    first, second, third = COEFFICIENTS
    value = ((third * fraction + second) * fraction + first) * fraction + 1.0
    exponent = lax.shift_left(lax.bitcast_convert_type(nearest, jnp.int32), jnp.int32(23))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.int32) + exponent, x.dtype)


def mask_logits(size, query, key, k_tile, logits_t):
    """Masks the logits of a partial tile in tensor memory, so that full tiles need no registers.

    The mask columns are read from global memory.
    """
    columns = [
        plgpu.load(query.at[i], layout=ROW.reduce(1), optimized=False)
        for i in range(query.shape[0])
    ]

    for i in range(0, size.keys, AT_ONCE):
        keys = pl.ds(k_tile * size.keys + i, AT_ONCE)
        code = plgpu.load(key.at[keys], layout=ROW.reduce(0), optimized=False)
        part = logits_t.at[:, pl.ds(i, AT_ONCE)]
        logits = load_rows(part)
        wait_loads()
        code = plgpu.layout_cast(per_column(code, logits.shape), ROW)
        by_row = [per_row(x, logits.shape) for x in columns]
        visible = code_mask(by_row.__getitem__, code)
        plgpu.async_store_tmem(part, jnp.where(visible, logits, MASKED))
    wait_stores()
