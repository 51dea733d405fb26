"""Rounding to E2M1 and E4M3, and the random numbers for doing so by chance.

All by arithmetic on float32: of a cast to a narrow type and back, compilers leave nothing where
they may keep excess precision, as XLA does on GPUs.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, UInt32

LARGEST = 6.0
"""Of the codes."""
MOST = 448.0
"""Of the scales."""


def to_nearest(u: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """The nearest code's value, of two as near that of the even code, beyond 6 always 6.

    What is rounded to 0 keeps its sign.
    """
    return jnp.sign(u) * _rounded(jnp.abs(u), 0.0)


def by_chance(u: Float32[Array, "*n"], draw: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """The value of one of the two codes around `u`, the nearer the likelier; `draw` in [0, 1).

    The mean over draws is `u` where |u| <= 6. What is a code already stays, but for a draw of 0.
    """
    return jnp.sign(u) * _rounded(jnp.abs(u), draw - 0.5)


def _rounded(size: Float32[Array, "*n"], noise: Array | float) -> Float32[Array, "*n"]:
    """The whole steps under 2, those of 1 from there to 4 and those of 2 beyond, each with `noise`
    in [-1/2, 1/2) of a step. Without comparisons, whose results XLA would keep in memory."""
    halves = jnp.round(2 * jnp.minimum(size, 2) + noise) / 2
    ones = jnp.round(jnp.clip(size, 2, 4) + noise)
    twos = 2 * jnp.round(jnp.clip(size, 4, 8) / 2 + noise)
    return halves - (2 - ones) - (4 - jnp.minimum(twos, LARGEST))


def to_scale(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """The nearest value of E4M3 to one not negative, beyond 448 always 448; NaN stays."""
    fixed, floating = jnp.round(512 * x) / 512, lax.reduce_precision(x, 8, 3)
    return jnp.minimum(jnp.where(x < 2.0**-6, fixed, floating), MOST)


def mix(word: UInt32[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Spreads every bit of a word over all of it, one to one (the finalizer of MurmurHash3)."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def seeds(key: Array) -> UInt32[Array, "2"]:
    """The two words that a key gives to `draws`."""
    return jax.random.bits(key, (2,), jnp.uint32)


def draws(
    words: UInt32[Array, "2"], shape: Sequence[int]
) -> tuple[Float32[Array, "*shape"], Float32[Array, "*shape"]]:
    """Two independent draws from (0, 1) for each entry, of 16 bits each: (i + 1/2) / 65536.

    They depend on the words and the entry's place in the array alone, not on how it is laid out
    over devices, and cost some 20 integer operations; places are counted modulo 2**32, so in
    larger arrays draws come again. Rounding by them errs from its mean by 2**-17 of a step.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        place += lax.broadcasted_iota(jnp.uint32, tuple(shape), axis) * stride
    word = mix(mix(place + words[0]) + words[1])
    return _uniform(word >> 16), _uniform(word & jnp.uint32(0xFFFF))


def _uniform(bits: UInt32[Array, "*n"]) -> Float32[Array, "*n"]:
    return (bits.astype(jnp.float32) + 0.5) * 2.0**-16
