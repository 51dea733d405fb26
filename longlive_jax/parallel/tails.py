"""A causal network over a clip that is cut between devices: every layer's past comes from the left.

All devices run a layer at once, each on its own frames, and fetch from their left neighbour the few
last frames of that layer's input that it looks back at. Nobody computes a frame twice, where a halo
of raw frames costs the whole receptive field again. A long clip is dealt out in rounds: the first
device's past is then the last device's of the round before.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.parallel.mesh import SP
from longlive_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A tail inside `shard_map`: puts the left neighbour's last frames in front of a layer's input.

    The first device has no neighbour. What comes before its frames is `given` (a clip's first frame
    is encoded apart), and its input begins with one latent's worth of frames that are not there, so
    that all devices have equally many; `given` replaces the end of these.

    Attributes:
      given: [b, n, h, w, c], the layer's tail after the frames before the first device's.
      latents: latents a device makes.
    """

    given: Array
    latents: int

    def __call__(self, x: Array) -> Array:
        """[b, n + f, h, w, c]. Raises ValueError if a neighbour has fewer frames than needed."""
        n = self.given.shape[1]
        _check(x, n, self.latents)
        absent = x.shape[1] // self.latents
        here = lax.axis_index(SP) == 0
        # Before it is sent on: of two latents the first device has but one of its own.
        kept = min(n, absent)
        x = jnp.where(here, x.at[:, absent - kept : absent].set(self.given[:, n - kept :]), x)
        seen = jnp.concatenate([_from_the_left(x, n), x], axis=1)
        return jnp.where(here, seen.at[:, absent : absent + n].set(self.given), seen)


@dataclasses.dataclass(frozen=True)
class Continued:
    """As `Fetched`, in a later round: the first device's past is `given`, and nothing is absent."""

    given: Array
    latents: int

    def __call__(self, x: Array) -> Array:
        """[b, n + f, h, w, c]. Raises ValueError if a neighbour has fewer frames than needed."""
        n = self.given.shape[1]
        _check(x, n, self.latents)
        past = jnp.where(lax.axis_index(SP) == 0, self.given, _from_the_left(x, n))
        return jnp.concatenate([past, x], axis=1)


def fetched(tails: Any, latents: int) -> Any:
    """A tree of tails, of the frames before the first device's, as a tree of `Fetched`."""
    return jax.tree.map(lambda given: Fetched(given, latents), tails)


def continued(tails: Any, latents: int) -> Any:
    """The tails that a round left on every device, as what the next round begins with."""
    last = lax.axis_size(SP) - 1
    return jax.tree.map(lambda x: Continued(lax.ppermute(x, SP, [(last, 0)]), latents), tails)


def _from_the_left(x: Array, n: int) -> Array:
    pairs = [(i, i + 1) for i in range(lax.axis_size(SP) - 1)]
    return lax.ppermute(x[:, -n:], SP, pairs)


def _check(x: Array, n: int, latents: int) -> None:
    if x.shape[1] < n:
        raise ValueError(
            f"{latents} latents a device are too few for a layer that looks back {n} frames; use a "
            "smaller mesh.sp or longer clips, 2 latents a device at least"
        )
