"""Rectified flow: noise levels, the forward process, and the prediction target.

A sample at noise level sigma is `x = (1 - sigma) x0 + sigma noise`, and the model predicts the
velocity `noise - x0`. Levels come from a table that `shift` skews towards the noisy end:
`sigma = shift s / (1 + (shift - 1) s)` for s evenly spaced in (0, 1]. The timestep, 1000 sigma, is
used only as the model's embedding input.

Everything here is float32; a level of exactly 0 is allowed and means a clean sample.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.typing import Array, Float, Int, Key

TIMESTEPS = 1000
"""The model's time scale: timestep = 1000 sigma."""


def shifted(s: np.ndarray | Array, shift: float) -> np.ndarray | Array:
    """Skews evenly spaced levels in [0, 1] towards 1; 0 and 1 are fixed points."""
    return shift * s / (1 + (shift - 1) * s)


@dataclasses.dataclass(frozen=True)
class FlowSchedule:
    """The training table of noise levels, from 1 down to just above 0.

    Attributes:
      shift: skew of the levels towards the noisy end.
      size: number of levels; entry 0 is pure noise.
    """

    shift: float = 5.0
    size: int = TIMESTEPS

    def __post_init__(self) -> None:
        if self.shift <= 0 or self.size < 2:
            raise ValueError(f"shift must be > 0 and size >= 2, got {self.shift} and {self.size}")

    @functools.cached_property
    def sigmas(self) -> np.ndarray:
        """Noise levels, float32 [size], descending; bit-identical to the reference for shift 5.

        A timestep that is off by one unit in the last place changes the model's output by 1e-5,
        through the sines of its embedding. So the steps are those of a float32 linspace (a rounded
        increment, counted from the nearer end), and the shift is applied in float32.
        """
        k, step = np.arange(self.size), float(np.float32(1.0 / self.size))
        near_one = k < (self.size + 1) // 2
        even = np.where(near_one, 1.0 - k * step, (self.size - k) * step).astype(np.float32)
        return np.asarray(shifted(even, self.shift), np.float32)

    @functools.cached_property
    def timesteps(self) -> np.ndarray:
        """1000 sigma, float32 [size]."""
        return self.sigmas * np.float32(TIMESTEPS)

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """Loss weights, float32 [size]: a Gaussian around t = 500, shifted to minimum 0, mean 1."""
        bell = np.exp(-2.0 * ((self.timesteps.astype(np.float64) - 500.0) / TIMESTEPS) ** 2)
        bell -= bell.min()
        return (bell * (self.size / bell.sum())).astype(np.float32)

    def index(self, timestep: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
        """Index of the table entry nearest to each timestep; ties go to the noisier entry."""
        return jnp.argmin(jnp.abs(jnp.asarray(self.timesteps) - timestep[..., None]), axis=-1)

    def draw(self, key: Key[Array, ""], shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Uniformly drawn table indices; training draws one per (sample, chunk)."""
        return jax.random.randint(key, shape, 0, self.size)


def per_frame(sigma: Float[Array, "*lead"], like: Array) -> Float[Array, "..."]:
    """Noise levels in float32 with trailing axes added, to broadcast against `like`."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def corrupt(
    x0: Float[Array, "*lead h w c"], noise: Float[Array, "*lead h w c"], sigma: Float[Array, "..."]
) -> Float[Array, "*lead h w c"]:
    """`(1 - sigma) x0 + sigma noise`, in the dtype of `noise`.

    `sigma` has the shape of the leading axes of `x0`.
    """
    level = per_frame(sigma, x0)
    return ((1 - level) * x0 + level * noise).astype(noise.dtype)


def velocity_target(x0: Float[Array, "..."], noise: Float[Array, "..."]) -> Float[Array, "..."]:
    """The velocity that the model is trained to predict: `noise - x0`, float32."""
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def x0_from_velocity(
    x: Float[Array, "..."], velocity: Float[Array, "..."], sigma: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The clean sample implied by a predicted velocity: `x - sigma velocity`, float32."""
    return x.astype(jnp.float32) - per_frame(sigma, x) * velocity.astype(jnp.float32)


def velocity_from_x0(
    x: Float[Array, "..."], x0: Float[Array, "..."], sigma: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The velocity implied by a clean estimate: `(x - x0) / sigma`, float32, for sigma > 0."""
    return (x.astype(jnp.float32) - x0.astype(jnp.float32)) / per_frame(sigma, x)
