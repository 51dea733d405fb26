"""Classifier-free guidance as a wrapper of a velocity function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from longlive_jax.typing import Array, Float

type VelocityFn = Callable[
    [Float[Array, "b f h w c"], Float[Array, "b f"]], Float[Array, "b f h w c"]
]


def doubled[T](tree: T) -> T:
    """Every array twice along its first axis: the conditional half, then the unconditional one."""
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)


def guided(velocity: VelocityFn, scale: Float[Array, ""] | float) -> VelocityFn:
    """`uncond + scale (cond - uncond)` from one call on a doubled batch.

    `velocity` takes 2b samples; its text and its cache hold the prompts of the first b, and the
    negative prompts of the last b. The result takes b samples.

    Ho and Salimans 2022, arXiv:2207.12598.
    """

    def both(x: Array, timestep: Array) -> Array:
        conditional, unconditional = jnp.split(velocity(doubled(x), doubled(timestep)), 2)
        return unconditional + scale * (conditional - unconditional)

    return both
