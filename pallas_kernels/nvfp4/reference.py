"""Quantization to NVFP4 in float32, bit for bit as LongLive 2.0 quantizes (paper 2.2, App. F).

Here a block that exceeds 6 by the rounding of a tiny scale saturates, where the published
PyTorch code wraps to -0. Not a number and infinity pass through: the block, and `amax` and with
it the whole, if it is taken of `x`, dequantize to NaN. An `amax` below `TINY` counts as 0.
"""

import functools
import operator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.nvfp4.format import BLOCK, CODE, LIMITS, NVFP4, SCALE, Rule, constant, over
from pallas_kernels.nvfp4.hadamard import rotate
from pallas_kernels.nvfp4.rounding import MOST as MOST
from pallas_kernels.nvfp4.rounding import by_chance, to_nearest, to_scale

TINY = 2.0**-104
"""So that one over the smallest scale is finite."""

Draws = tuple[Array, Array]
"""For each entry a draw from [0, 1) for "becomes 6", and one for "becomes 4"."""


def oriented(x: Float[Array, "*rows k"], transpose: bool, hadamard: bool) -> Array:
    """What is quantized: the last two axes of `x` swapped, and its last axis rotated, if wanted."""
    x = jnp.swapaxes(x, -1, -2) if transpose else x
    return rotate(x) if hadamard else x


def largest(x: Float[Array, "*lead_rows k"], lead: int = 0) -> Float32[Array, "*lead"]:
    """max |x| over all but the leading axes; NaN where there is one."""
    return _peak(x.astype(jnp.float32), tuple(range(lead, x.ndim)))


def _peak(x: Float32[Array, "*n"], axes: tuple[int, ...], keepdims: bool = False) -> Array:
    """max |x| by the bits, which grow with the number and are largest for NaN: XLA's maximum of
    floats over an axis may pass it over."""
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    most = jnp.max(bits, axis=axes, keepdims=keepdims, initial=0)
    return lax.bitcast_convert_type(most, jnp.float32)


def feed_in_order(errors: Float32[Array, "*n rows blocks 16"]) -> Float32[Array, "*n 1 blocks 1"]:
    """The sum over each tile in the order of PyTorch on x86: of two candidates that err alike, the
    last bit of their sums picks one. Eight lanes, up to four sums in each of them, then across.
    """
    *n, rows, blocks, width = errors.shape
    flat = jnp.swapaxes(errors, -3, -2).reshape(*n, blocks, rows * width // 8, 8)
    sums = min(4, flat.shape[-2])
    rounds = [flat[..., i : i + sums, :] for i in range(0, flat.shape[-2], sums)]
    lanes = functools.reduce(operator.add, rounds)
    lanes = functools.reduce(operator.add, [lanes[..., i, :] for i in range(sums)])
    total = functools.reduce(operator.add, [lanes[..., i] for i in range(8)])
    return total[..., None, :, None]


def quantize(
    x: Float[Array, "*lead_rows k"],
    *,
    rule: Rule = "mse",
    block_rows: int = 1,
    lead: int = 0,
    amax: Float32[Array, "*lead"] | None = None,
    transpose: bool = False,
    hadamard: bool = False,
    draws: Draws | None = None,
) -> NVFP4:
    """As `api.quantize`, but rounds by given draws, in the shape of the result, not by a key."""
    x = oriented(x, transpose, hadamard)
    amax = largest(x, lead) if amax is None else jnp.asarray(amax, jnp.float32)
    tiles = functools.partial(_tiles, block_rows=block_rows)
    by = None if draws is None else (tiles(draws[0]), tiles(draws[1]))
    values, scales = _encode(tiles(x.astype(jnp.float32)), amax, rule, by)
    scales = jnp.broadcast_to(scales, (*values.shape[:-1], 1)).astype(SCALE)
    codes, scales = (_untiled(a, x.shape) for a in (values.astype(CODE), scales))
    return NVFP4(codes, scales, amax, rule)


def _tiles(x: Array, block_rows: int) -> Float[Array, "*n rows blocks 16"]:
    """What shares a scale, on the third axis from the end and the last; rows filled up with 0."""
    if block_rows == 1:
        return x.reshape(*x.shape[:-1], 1, -1, BLOCK)
    missing = -x.shape[-2] % block_rows
    x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, missing), (0, 0)])
    return x.reshape(*x.shape[:-2], -1, block_rows, x.shape[-1] // BLOCK, BLOCK)


def _untiled(tiles: Array, shape: tuple[int, ...]) -> Array:
    """Entries of tiles in the rows of an array of `shape`, without those that filled it up."""
    *before, rows, _ = (1, *shape)
    width = tiles.shape[-2] * tiles.shape[-1]
    return tiles.reshape(*before, -1, width)[..., :rows, :].reshape(*shape[:-1], width)


def _encode(
    t: Float32[Array, "*n rows blocks 16"],
    amax: Array,
    rule: Rule,
    draws: Draws | None,
) -> tuple[Array, Array]:
    """Values of the codes, and those of the scales, [*n, 1, blocks, 1]."""
    amax = over(amax, t.ndim)
    grow = jnp.where(amax < TINY, 0.0, constant(rule) / amax)
    shrink = 1 / lax.optimization_barrier(grow)
    peak = _peak(t, (-3, -1), keepdims=True)
    wanted = (third(peak) / 2 if LIMITS[rule][0] == 6 else peak / 4) * grow

    def candidate(factor: float, draw: Array | None) -> tuple[Array, Array]:
        step = jnp.where(peak < jnp.inf, to_scale(factor * wanted), jnp.nan)
        u = t * jnp.where(step == 0, 0.0, 1 / (shrink * step))
        u = 0.0 - (-u)  # -0 becomes 0
        return to_nearest(u) if draw is None else by_chance(u, draw), step

    first, second = (None, None) if draws is None else draws
    values, scale = candidate(1.0, first)
    if rule in ("static_6", "static_4"):
        return values, scale
    values_4, scale_4 = candidate(1.5, second)

    def error(values: Array, scale: Array) -> Array:
        off = third(values * scale * amax) / 512 - t  # 6 * 256 is 3 * 512
        if rule == "abs_max":
            return jnp.max(jnp.abs(off), axis=(-3, -1), keepdims=True)
        return feed_in_order(square(off) if rule == "mse" else jnp.abs(off))

    four = error(values_4, scale_4) < error(values, scale)
    return jnp.where(four, values_4, values), jnp.where(four, scale_4, scale)


def square(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """x * x, whose rounding the bound keeps: it stands between the product and the sum that
    compilers would make one step."""
    return jnp.minimum(x * x, jnp.finfo(jnp.float32).max)


def third(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """x / 3, rounded as division rounds, also by compilers that make a division by a constant a
    product with its inverse, and of a product and a sum one step: three times `near` is exact, so
    is what remains of `x`, and either way of adding a third of that is right.
    """
    inverse = jnp.float32(1 / 3)
    near = lax.reduce_precision(x * inverse, exponent_bits=8, mantissa_bits=20)
    return near + (x - 3 * near) * inverse
