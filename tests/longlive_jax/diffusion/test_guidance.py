"""Classifier-free guidance, with one model call on a doubled batch."""

import jax.numpy as jnp
import numpy as np

from longlive_jax.diffusion.guidance import guided


def test_guidance_extrapolates_from_the_unconditional_half():
    calls = []

    def velocity(x, timestep):
        calls.append((x.shape, timestep.shape))
        half = len(x) // 2
        return x * jnp.where(jnp.arange(len(x)) < half, 2.0, 1.0)[:, None, None, None, None]

    x = jnp.ones((3, 2, 1, 1, 1))
    np.testing.assert_allclose(guided(velocity, 3.0)(x, jnp.zeros((3, 2))), 1 + 3 * (2 - 1) * x)
    assert calls == [((6, 2, 1, 1, 1), (6, 2))]
