"""Rotary positions over frame, row and column, exact at any frame (paper, section 3.2).

Angles are pos * 10000^(-2j/w). At frame 10^6 a float32 product is off by 0.06 rad, and a table of
angles would have a last frame. So the integer part of a position is multiplied by a fixed-point
number of turns: 32-bit integers wrap exactly where angles do. The remainder is below pi in
magnitude and accurate to 1e-6 rad.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from longlive_jax.typing import Array, Float, Float32

BASE = 10_000.0


def frequencies(width: int) -> np.ndarray:
    """10000^(-2j/width) for each of `width / 2` pairs, in float64."""
    return BASE ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def angles(pos: Array, freqs: np.ndarray) -> Float32[Array, "..."]:
    """`pos[..., None] * freqs` modulo one turn, in float32 and exact to about 1e-6 rad.

    `pos` is an integer or float32 array (below 2^24 in size if float), `freqs` float64 in (0, 1].
    """
    # 1. The integer part of the position times the integer part of the turns, modulo 2^32.
    turns = freqs / (2 * math.pi) * 2.0**32
    coarse = np.floor(turns)
    integer = jnp.floor(pos).astype(jnp.int32) if _is_float(pos) else pos.astype(jnp.int32)
    wrapped = integer.astype(jnp.uint32)[..., None] * coarse.astype(np.uint32)
    unit = 2 * math.pi / 2.0**32
    out = lax.bitcast_convert_type(wrapped, jnp.int32).astype(jnp.float32) * np.float32(unit)
    # 2. The fractional parts of the turns and of the position.
    fine = ((turns - coarse) * unit).astype(np.float32)
    out += integer.astype(jnp.float32)[..., None] * fine
    if _is_float(pos):
        fraction = (pos - integer.astype(pos.dtype)).astype(jnp.float32)
        out += fraction[..., None] * np.float32(freqs)
    return out


def rope_angles(pos: Array, head_dim: int) -> Float32[Array, "*b l p"]:
    """Angles of all `head_dim / 2` pairs of channels for positions `[..., l, 3]`.

    The pairs are split into frame, row and column, in this order. As in Wan, rows and columns get
    `head_dim // 6` pairs each and the frame gets the rest.
    """
    side = head_dim // 6
    widths = (head_dim - 4 * side, 2 * side, 2 * side)
    axes = [angles(pos[..., axis], frequencies(width)) for axis, width in enumerate(widths)]
    return jnp.concatenate(axes, axis=-1)


def rope_rotation(pos: Array, head_dim: int) -> tuple[Array, Array]:
    """(cos, sin) of `rope_angles`, each `[..., l, head_dim / 2]` float32."""
    angle = rope_angles(pos, head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "b l n d"], rotation: tuple[Array, Array]
) -> Float[Array, "b l n d"]:
    """Rotates each pair of channels (2j, 2j+1) by its angle, in float32; keeps the dtype of `x`."""
    cos, sin = (table[..., None, :] for table in rotation)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def _is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
