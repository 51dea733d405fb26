"""Sequence parallelism for causal networks: layers receive their padding from the left neighbour.

All devices run a layer at the same time, each on its own frames. The causal padding of a device's
input (its tail: the last input frames of the layer before these) comes from the left neighbour
through `ppermute`. No frame is computed twice, whereas a halo of raw frames recomputes the full
receptive field. Long clips are processed in rounds: the first device then receives its padding from
the last device of the previous round.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.parallel.mesh import SP
from longlive_jax.typing import Array


@dataclasses.dataclass(frozen=True)
class FirstRoundTail:
    """A tail inside `shard_map` that prepends the left neighbour's last frames to a layer's input.

    The first device has no left neighbour. Its padding is `initial`, the tail after the clip's
    first frame, which is encoded separately. So that all devices have equally many frames, its
    input begins with one latent's worth of padding frames; `initial` overwrites the last of these.

    Attributes:
      initial: [b, n, h, w, c], the layer's tail just before the first device's frames.
      latents: number of latents that each device computes per round.
    """

    initial: Array
    latents: int

    def __call__(self, x: Array) -> Array:
        """Returns [b, n + f, h, w, c] for an input [b, f, h, w, c].

        Raises ValueError if a neighbour has fewer than n frames.
        """
        n = self.initial.shape[1]
        _check(x, n, self.latents)
        num_padding = x.shape[1] // self.latents
        is_first = lax.axis_index(SP) == 0
        # 1. Fill the padding before it is sent: with two latents, the first device has only one
        # real latent to pass on.
        m = min(n, num_padding)
        filled = x.at[:, num_padding - m : num_padding].set(self.initial[:, n - m :])
        x = jnp.where(is_first, filled, x)
        # 2. Prepend the left neighbour's frames, or on the first device `initial`.
        padded = jnp.concatenate([_from_left_neighbour(x, n), x], axis=1)
        first = padded.at[:, num_padding : num_padding + n].set(self.initial)
        return jnp.where(is_first, first, padded)


@dataclasses.dataclass(frozen=True)
class LaterRoundTail:
    """A tail like `FirstRoundTail` for later rounds: the first device has no padding frames.

    Attributes:
      initial: [b, n, h, w, c], the layer's tail at the end of the previous round.
      latents: number of latents that each device computes per round.
    """

    initial: Array
    latents: int

    def __call__(self, x: Array) -> Array:
        """Returns [b, n + f, h, w, c] for an input [b, f, h, w, c].

        Raises ValueError if a neighbour has fewer than n frames.
        """
        n = self.initial.shape[1]
        _check(x, n, self.latents)
        is_first = lax.axis_index(SP) == 0
        tail = jnp.where(is_first, self.initial, _from_left_neighbour(x, n))
        return jnp.concatenate([tail, x], axis=1)


def first_round_tails(tails: Any, latents: int) -> Any:
    """A tree of tails, as they are just before the first device's frames, for the first round."""
    return jax.tree.map(lambda initial: FirstRoundTail(initial, latents), tails)


def next_round_tails(tails: Any, latents: int) -> Any:
    """The tails for the next round, given the tails that a round returned on every device."""
    last = lax.axis_size(SP) - 1
    return jax.tree.map(lambda x: LaterRoundTail(lax.ppermute(x, SP, [(last, 0)]), latents), tails)


def _from_left_neighbour(x: Array, n: int) -> Array:
    """The last `n` frames of the left neighbour; zeros on the first device."""
    pairs = [(i, i + 1) for i in range(lax.axis_size(SP) - 1)]
    return lax.ppermute(x[:, -n:], SP, pairs)


def _check(x: Array, n: int, latents: int) -> None:
    if x.shape[1] < n:
        raise ValueError(
            f"{latents} latents per device are too few for a layer that looks back {n} frames; use "
            "a smaller mesh.sp or longer clips, at least 2 latents per device"
        )
