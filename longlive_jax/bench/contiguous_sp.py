"""What Balanced SP is measured against: [all clean; all noisy] cut into equal slices.

The first half of the devices then has no frame that is learnt, the second no context, and nobody
can make its part of the sequence without the frames of others. For benchmarks only.
"""

import dataclasses

import jax.numpy as jnp

from longlive_jax.training.objectives.batch import (
    Draws,
    TeacherForcingBatch,
)
from longlive_jax.training.objectives.sharded import SequenceLayout
from longlive_jax.typing import Array


def contiguous_layout(
    batch: TeacherForcingBatch, draws: Draws
) -> tuple[TeacherForcingBatch, Draws]:
    """The same episode with the context's frames first among the targets, at level 0 and without
    weight, and its chunks told from the others by `noisy`; see `without_context`."""
    frames = batch.context.shape[1]
    chunks = batch.chunk_index.shape[1]
    clean = chunks * frames // (frames + batch.target.shape[1])

    def before(x: Array, value: float = 0) -> Array:
        return jnp.concatenate([jnp.full((x.shape[0], frames), value, x.dtype), x], axis=1)

    line = dataclasses.replace(
        batch,
        target=jnp.concatenate([draws.context, batch.target], axis=1),
        mask=before(batch.mask),
        noisy=jnp.broadcast_to(jnp.arange(chunks) >= clean, batch.chunk_index.shape),
    )
    noise = jnp.concatenate([jnp.zeros_like(draws.context), draws.noise], axis=1)
    return line, dataclasses.replace(
        draws,
        noise=noise,
        sigma=before(draws.sigma),
        timestep=jnp.concatenate([draws.context_timestep, draws.timestep], axis=1),
        weight=before(draws.weight),
        conditioning_frame=before(draws.conditioning_frame, False),
    )


def without_context(batch: TeacherForcingBatch, draws: Draws) -> tuple[TeacherForcingBatch, Draws]:
    """A device's slice of the line less the context, which is in the line. (XLA's CPU compiler
    crashes on empty arrays that cross `shard_map`, so this comes inside of it.)"""
    return (
        dataclasses.replace(batch, context=batch.context[:, :0]),
        dataclasses.replace(
            draws, context=draws.context[:, :0], context_timestep=draws.context_timestep[:, :0]
        ),
    )


def _arrange(
    batch: TeacherForcingBatch, shown: TeacherForcingBatch, draws: Draws, _parts: int
) -> tuple[TeacherForcingBatch, TeacherForcingBatch, Draws]:
    return contiguous_layout(batch, draws)[0], *contiguous_layout(shown, draws)


CONTIGUOUS = SequenceLayout(_arrange, without_context)
"""[all clean; all noisy] cut into equal slices."""
