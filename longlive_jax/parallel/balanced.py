"""Balanced sequence parallelism: every device has clean and noisy tokens of the same frames.

Teacher forcing trains on [all clean; all noisy]. Splitting that sequence contiguously would give
half of the devices no loss and the other half no context. Here device p holds [clean_p; noisy_p],
and attention gathers them in device order: clean_0, noisy_0, clean_1, ... (paper, section 2.1 and
appendix C).
"""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.typing import Array


def interleave_shards(context: Array, target: Array, num_shards: int, *, axis: int = 1) -> Array:
    """Reorders [all context; all target] along `axis` to [context_0; target_0; context_1; ...].

    Context and target are each split into `num_shards` equal shards. If `axis` is already sharded
    that way, no data moves between devices. NumPy arrays stay NumPy. Raises ValueError if either
    does not split evenly.
    """
    shards = [_split(x, num_shards, axis) for x in (context, target)]
    xp = jnp if any(isinstance(x, jax.Array) for x in shards) else np
    joined = xp.concatenate(shards, axis=axis + 1)
    return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])


def _split(x: Array, num_shards: int, axis: int) -> Array:
    if x.shape[axis] % num_shards:
        raise ValueError(f"{x.shape[axis]} entries do not split into {num_shards} shards")
    return x.reshape(*x.shape[:axis], num_shards, -1, *x.shape[axis + 1 :])
