"""Bytes of sharded arrays that are not allocated."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longlive_jax.parallel import rules

__all__ = ["bytes_per_device"]


def bytes_per_device(shapes: Any, specs: Any, mesh: Mapping[str, int]) -> int:
    """Bytes of one device's shards of a tree of arrays; `mesh` has the size of every axis."""

    def shard_bytes(x: jax.ShapeDtypeStruct, spec: P) -> int:
        num_shards = math.prod(rules.num_shards(mesh, names) for names in spec)
        return math.ceil(x.size * _bits(x.dtype) / 8) // num_shards

    return sum(jax.tree.leaves(jax.tree.map(shard_bytes, shapes, specs)))


def _bits(dtype: Any) -> int:
    """Bits of a number on a device, where two of 4 bits share a byte."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 64
    if dtype == jnp.bool_:
        return 8
    floating = jnp.issubdtype(dtype, jnp.floating)
    return (jnp.finfo if floating else jnp.iinfo)(dtype).bits
