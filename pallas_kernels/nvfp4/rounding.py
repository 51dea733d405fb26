"""Rounding to E2M1 and E4M3, and the noise of stochastic rounding.

Everything is float32 arithmetic: compilers that allow excess precision, such as XLA on GPUs, may
remove a cast to a narrow type and back.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt32

MAX_CODE = 6.0
"""Largest E2M1 code."""
MAX_SCALE = 448.0
"""Largest E4M3 scale."""
SLACK = 1 - 2.0**-18
"""Share of a value that a scale rounded up must reach. The largest block of a tensor wants the
largest scale up to rounding errors, and must not get the next one."""


def to_nearest(u: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Rounds to the nearest code, ties to even, saturating at 6; a zero result keeps its sign."""
    return jnp.sign(u) * _round_magnitude(jnp.abs(u), 0.0)


def stochastic_round(u: Float32[Array, "*n"], noise: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Rounds stochastically to one of the two codes around `u`; `noise` is uniform in [0, 1).

    The mean over the noise is `u` where |u| <= 6. Exact codes do not change, unless the noise is 0.
    """
    return jnp.sign(u) * _round_magnitude(jnp.abs(u), noise - 0.5)


def _round_magnitude(size: Float32[Array, "*n"], noise: Array | float) -> Float32[Array, "*n"]:
    """Rounds magnitudes to steps of 1/2 below 2, 1 below 4 and 2 above.

    `noise` in [-1/2, 1/2) steps is added first. There are no comparisons, whose results XLA would
    store.
    """
    halves = jnp.round(2 * jnp.minimum(size, 2) + noise) / 2
    ones = jnp.round(jnp.clip(size, 2, 4) + noise)
    twos = 2 * jnp.round(jnp.clip(size, 4, 8) / 2 + noise)
    return halves - (2 - ones) - (4 - jnp.minimum(twos, MAX_CODE))


def to_scale(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Rounds nonnegative values to the nearest E4M3 value, saturating at 448; NaN stays NaN."""
    fixed, floating = jnp.round(512 * x) / 512, lax.reduce_precision(x, 8, 3)
    return jnp.minimum(jnp.where(x < 2.0**-6, fixed, floating), MAX_SCALE)


def scale_above(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Rounds nonnegative values up to an E4M3 value, saturating at 448; NaN stays NaN.

    Values within `SLACK` above an E4M3 value count as that value.
    """
    nearest = to_scale(x)
    return jnp.where(nearest < jnp.minimum(x, MAX_SCALE) * SLACK, next_scale(nearest), nearest)


def next_scale(scale: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """The E4M3 value after a nonnegative one, which is below 448."""
    bits = lax.bitcast_convert_type(scale, jnp.int32) + jnp.int32(2**20)
    normal = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(scale < 2.0**-6, scale + 2.0**-9, normal)


def mix(word: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Mixes the bits of a word, bijectively (the finalizer of MurmurHash3)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def seeds(key: Array) -> UInt32[Array, "2"]:
    """The two seed words for `rounding_noise`, from a PRNG key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def rounding_noise(
    words: UInt32[Array, "2"], shape: Sequence[int]
) -> tuple[Float32[Array, "*shape"], Float32[Array, "*shape"]]:
    """Two independent uniform values in (0, 1) per entry, of 16 bits each: (i + 1/2) / 65536.

    They depend only on the seed words and the entry's index, not on the array's sharding, and cost
    about 20 integer operations. Indices are taken modulo 2**32, so the noise repeats in larger
    arrays. The bias of rounding with them is 2**-17 of a step.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place += lax.broadcasted_iota(jnp.uint32, tuple(shape), axis) * stride
    word = mix(mix(place + words[0]) + words[1])
    return _uniform(word >> 16), _uniform(word & jnp.uint32(0xFFFF))


def _uniform(bits: UInt32[Array, "*n"]) -> Float32[Array, "*n"]:
    return (bits.astype(jnp.float32) + 0.5) * 2.0**-16
