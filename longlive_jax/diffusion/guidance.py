"""Classifier-free guidance as a wrapper around a velocity function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from longlive_jax.typing import Array, Float

type VelocityFn = Callable[
    [Float[Array, "b f h w c"], Float[Array, "b f"]], Float[Array, "b f h w c"]
]


def doubled[T](tree: T) -> T:
    """Each array repeated along its first axis: the conditional half, then the unconditional."""
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)


def guided(velocity: VelocityFn, scale: Float[Array, ""] | float) -> VelocityFn:
    """A velocity function that returns `uncond + scale (cond - uncond)` from one doubled call.

    `velocity` takes 2b samples: its text features and KV cache are those of the prompts for the
    first b, and of the negative prompts for the last b. The returned function takes b samples.

    Source: Ho and Salimans 2022, arXiv:2207.12598.
    """

    def guided_velocity(x: Array, timestep: Array) -> Array:
        conditional, unconditional = jnp.split(velocity(doubled(x), doubled(timestep)), 2)
        return unconditional + scale * (conditional - unconditional)

    return guided_velocity
