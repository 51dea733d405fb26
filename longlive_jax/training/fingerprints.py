"""A number per array that changes when the array does.

Orbax restores a flipped byte without a word. A position-weighted hash, computed where the data
lies, is the same on every mesh and costs less than the save.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.parallel.rules import path_of
from longlive_jax.typing import Array

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprints(tree: Any) -> dict[str, str]:
    """Path -> 16 hexadecimal digits, for every array of `tree`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    marks = jax.device_get(_marks([leaf for _, leaf in leaves]))
    return {
        path_of(keys): f"{int(a):08x}{int(b):08x}"
        for (keys, _), (a, b) in zip(leaves, marks, strict=True)
    }


@jax.jit
def _marks(leaves: list[Array]) -> list[Array]:
    return [mark(x) for x in leaves]


def mark(x: Array) -> Array:
    """Two uint32 of an array of 1, 2 or 4 byte numbers; sums, so independent of any split."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    word = lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = (word + jnp.uint32(0x9E3779B9)) * (place * jnp.uint32(2) + jnp.uint32(1))
    mixed = (mixed ^ (mixed >> jnp.uint32(15))) * jnp.uint32(0x85EBCA6B)
    mixed = mixed ^ (mixed >> jnp.uint32(13))
    sums = (mixed, mixed * (place | jnp.uint32(1)))
    return jnp.stack([jnp.sum(s, dtype=jnp.uint32) for s in sums])
