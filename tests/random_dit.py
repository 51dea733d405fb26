"""Random DiT parameters drawn with NumPy, for tests that do not train."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig


def random_dit(cfg: DiTConfig, seed: int = 0):
    """Graph definition and float32 parameters; matrices preserve the scale of their inputs."""
    rng = np.random.default_rng(seed)
    graphdef, shapes = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))

    def draw(shape):
        spread = shape[-2] ** -0.5 if len(shape) > 1 else 1.0
        return jnp.asarray(rng.normal(size=shape) * spread, jnp.float32)

    return graphdef, jax.tree.map(lambda leaf: draw(leaf.shape), shapes)
