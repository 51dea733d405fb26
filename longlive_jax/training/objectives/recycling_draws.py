"""The random numbers of error recycling, drawn for a full batch before it is sharded."""

import flax.struct
import jax
import numpy as np

from longlive_jax.typing import Array, Float, Key


@flax.struct.dataclass
class InjectionDraws:
    """Uniform numbers in [0, 1) for one kind of injection.

    Attributes:
      gate: decides whether a sample gets any errors.
      entry: chooses the error that a chunk gets.
      scale: sets the strength of that error.
    """

    gate: Float[Array, "b"]
    entry: Float[Array, "b n"]
    scale: Float[Array, "b n"]


@flax.struct.dataclass
class RecyclingDraws:
    """All random numbers of one step of recycling, uniform in [0, 1).

    Attributes:
      clean: compared with `RecyclingSpec.clean`.
      update: compared with `RecyclingSpec.update`.
      noise: draws for injecting noise errors into the noise.
      latent: draws for injecting latent errors into the targets.
      context: draws for injecting latent errors into the context.
      evict_latent: chooses the entry that a new latent error replaces in a full bucket.
      evict_noise: chooses the entry that a new noise error replaces in a full bucket.
    """

    clean: Float[Array, "b"]
    update: Float[Array, "b"]
    noise: InjectionDraws
    latent: InjectionDraws
    context: InjectionDraws
    evict_latent: Float[Array, "b k"]
    evict_noise: Float[Array, "b k"]


def draw_recycling(key: Key[Array, ""], samples: int, context: int, target: int) -> RecyclingDraws:
    """Draws for a batch of `samples` with `context` and `target` chunks each."""
    chunks = [target] * 6 + [context] * 2
    uniform = jax.random.uniform(key, (samples, 5 + sum(chunks)))
    clean, update, *gates = (uniform[:, i] for i in range(5))
    ends = 5 + np.cumsum(chunks)
    evict_latent, evict_noise, *rest = (
        uniform[:, end - count : end] for count, end in zip(chunks, ends, strict=True)
    )
    noise, latent, history = (
        InjectionDraws(gates[i], rest[2 * i], rest[2 * i + 1]) for i in range(3)
    )
    return RecyclingDraws(clean, update, noise, latent, history, evict_latent, evict_noise)
