"""Balanced sequence parallelism: every device has clean and noisy tokens of the same frames.

Teacher forcing learns from [all clean; all noisy]. Split in two halves of devices, one half would
have no loss and the other no context; here device p holds [clean_p; noisy_p], in the order in which
attention then sees them: clean_0, noisy_0, clean_1, ... (paper, section 2.1 and appendix C).
"""

import jax.numpy as jnp

from longlive_jax.typing import Array


def paired(context: Array, target: Array, parts: int, *, axis: int = 1) -> Array:
    """[all context; all target] along `axis` as [context_0; target_0; context_1; ...].

    Both are split into `parts` equal parts. Where the axis is sharded so, nothing moves.
    """
    both = [_split(x, parts, axis) for x in (context, target)]
    joined = jnp.concatenate(both, axis=axis + 1)
    return joined.reshape(*joined.shape[:axis], -1, *joined.shape[axis + 2 :])


def _split(x: Array, parts: int, axis: int) -> Array:
    if x.shape[axis] % parts:
        raise ValueError(f"{x.shape[axis]} entries do not split into {parts} parts")
    return x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
