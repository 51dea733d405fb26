"""Reference quantization to NVFP4 in float32, bit-exact with LongLive 2.0 (paper 2.2, App. F).

One difference: a block that exceeds 6 because its tiny scale was rounded saturates here, while the
published PyTorch code wraps to -0. A block with NaN or infinity dequantizes to NaN, and so does the
whole tensor if `amax` is computed from `x`. An `amax` below `TINY` counts as 0.
"""

import functools
import operator

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.nvfp4.format import (
    BLOCK,
    CODE_DTYPE,
    LIMITS,
    NVFP4,
    SCALE_DTYPE,
    Rule,
    StochasticRounding,
    amax_divisor,
    expand_amax,
)
from pallas_kernels.nvfp4.hadamard import rotate
from pallas_kernels.nvfp4.rounding import MAX_SCALE as MAX_SCALE
from pallas_kernels.nvfp4.rounding import scale_above, stochastic_round, to_nearest, to_scale

TINY = 2.0**-104
"""Smallest `amax`; above it, the inverse of the smallest scale is finite."""

RoundingNoise = tuple[Array, Array]
"""Uniform noise in [0, 1) for each entry: for a largest code of 6, and for one of 4."""


def transpose_and_rotate(x: Float[Array, "*rows k"], transpose: bool, hadamard: bool) -> Array:
    """Optionally swaps the last two axes of `x`, then optionally rotates the last axis."""
    x = jnp.swapaxes(x, -1, -2) if transpose else x
    return rotate(x) if hadamard else x


def max_abs(x: Float[Array, "*lead_rows k"], lead: int = 0) -> Float32[Array, "*lead"]:
    """max |x| in float32 over all but the leading axes; NaN if there is a NaN."""
    return _peak(x.astype(jnp.float32), tuple(range(lead, x.ndim)))


def _peak(x: Float32[Array, "*n"], axes: tuple[int, ...], keepdims: bool = False) -> Array:
    """max |x| over axes, computed on the bits, which are monotonic and largest for NaN.

    XLA's floating-point maximum over an axis may ignore NaN.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    most = jnp.max(bits, axis=axes, keepdims=keepdims, initial=0)
    return lax.bitcast_convert_type(most, jnp.float32)


def sum_in_pytorch_order(
    errors: Float32[Array, "*n rows blocks 16"],
) -> Float32[Array, "*n 1 blocks 1"]:
    """Sums errors over each tile in the summation order of PyTorch on x86.

    The order matters: when two candidates have equal errors, the last bit of the sums decides.
    PyTorch uses eight lanes with up to four partial sums each, then adds across lanes.
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
    noise: RoundingNoise | None = None,
    stochastic: StochasticRounding = "unbiased",
) -> NVFP4:
    """`api.quantize` with explicit rounding noise, in the shape of the result, instead of a key."""
    x = transpose_and_rotate(x, transpose, hadamard)
    amax = max_abs(x, lead) if amax is None else jnp.asarray(amax, jnp.float32)
    tiles = functools.partial(_tiles, block_rows=block_rows)
    tiled_noise = None if noise is None else (tiles(noise[0]), tiles(noise[1]))
    values, scales = _encode(tiles(x.astype(jnp.float32)), amax, rule, tiled_noise, stochastic)
    scales = jnp.broadcast_to(scales, (*values.shape[:-1], 1)).astype(SCALE_DTYPE)
    codes, scales = (_untiled(a, x.shape) for a in (values.astype(CODE_DTYPE), scales))
    return NVFP4(codes, scales, amax, rule)


def _tiles(x: Array, block_rows: int) -> Float[Array, "*n rows blocks 16"]:
    """Splits x so that axes -3 and -1 share a scale; missing rows are padded with zeros."""
    if block_rows == 1:
        return x.reshape(*x.shape[:-1], 1, -1, BLOCK)
    missing = -x.shape[-2] % block_rows
    x = jnp.pad(x, [*[(0, 0)] * (x.ndim - 2), (0, missing), (0, 0)])
    return x.reshape(*x.shape[:-2], -1, block_rows, x.shape[-1] // BLOCK, BLOCK)


def _untiled(tiles: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `_tiles` for an array of `shape`, without the padding."""
    *before, rows, _ = (1, *shape)
    width = tiles.shape[-2] * tiles.shape[-1]
    return tiles.reshape(*before, -1, width)[..., :rows, :].reshape(*shape[:-1], width)


def _encode(
    t: Float32[Array, "*n rows blocks 16"],
    amax: Array,
    rule: Rule,
    noise: RoundingNoise | None,
    stochastic: StochasticRounding,
) -> tuple[Array, Array]:
    """Values of the codes [*n, rows, blocks, 16] and of the scales [*n, 1, blocks, 1]."""
    # 1. Scales for a largest code of M2, from each block's peak.
    amax = expand_amax(amax, t.ndim)
    grow = jnp.where(amax < TINY, 0.0, amax_divisor(rule) / amax)
    shrink = 1 / lax.optimization_barrier(grow)
    peak = _peak(t, (-3, -1), keepdims=True)
    wanted = (third(peak) / 2 if LIMITS[rule][0] == 6 else peak / 4) * grow
    unbiased = noise is not None and stochastic == "unbiased"
    round_scale = scale_above if unbiased else to_scale

    # 2. Round to the candidate scales; unbiased rounding compares codes rounded to nearest.
    def scaled(step: Array) -> Array:
        return 0.0 - (-(t * jnp.where(step == 0, 0.0, 1 / (shrink * step))))  # -0 becomes 0

    def candidate(factor: float, candidate_noise: Array | None) -> tuple[Array, Array]:
        step = jnp.where(peak < jnp.inf, round_scale(factor * wanted), jnp.nan)
        return _rounded(scaled(step), candidate_noise), step

    first, second = (None, None) if noise is None else noise
    if rule in ("static_6", "static_4"):
        return candidate(1.0, first)
    values, scale = candidate(1.0, None if unbiased else first)
    values_4, scale_4 = candidate(1.5, None if unbiased else second)

    # 3. Take the candidate with the smaller error in each block.
    def error(values: Array, scale: Array) -> Array:
        off = third(values * scale * amax) / 512 - t  # 6 * 256 is 3 * 512
        if rule == "abs_max":
            return jnp.max(jnp.abs(off), axis=(-3, -1), keepdims=True)
        return sum_in_pytorch_order(square(off) if rule == "mse" else jnp.abs(off))

    four = error(values_4, scale_4) < error(values, scale)
    scale = jnp.where(four, scale_4, scale)
    if noise is not None and not unbiased:
        return jnp.where(four, values_4, values), scale
    # Codes are computed again from the chosen scale, so that XLA need not store candidates.
    return _rounded(scaled(scale), first), scale


def _rounded(u: Array, noise: Array | None) -> Array:
    return to_nearest(u) if noise is None else stochastic_round(u, noise)


def square(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """x * x, rounded separately: the bound prevents fusing the product into a following sum."""
    return jnp.minimum(x * x, jnp.finfo(jnp.float32).max)


def third(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """x / 3, correctly rounded.

    It stays correct under compilers that replace a division by a constant with a product and that
    fuse a product and a sum: `3 * near` is exact, so is the remainder of x, and adding a third of
    the remainder rounds correctly with or without fusion.
    """
    inverse = jnp.float32(1 / 3)
    near = lax.reduce_precision(x * inverse, exponent_bits=8, mantissa_bits=20)
    return near + (x - 3 * near) * inverse
