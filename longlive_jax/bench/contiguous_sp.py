"""Contiguous sequence parallelism, the baseline for Balanced SP. For benchmarks only.

The sequence [all clean; all noisy] is cut into equal slices (paper, section 2.1). The first half of
the devices then has no frame with a loss, the second half has no context, and no device can build
its slice of the sequence without the frames of others.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from longlive_jax.training.objectives.batch import (
    Draws,
    TeacherForcingBatch,
)
from longlive_jax.training.objectives.sharded import SequenceLayout
from longlive_jax.typing import Array


def contiguous_layout(
    batch: TeacherForcingBatch, draws: Draws
) -> tuple[TeacherForcingBatch, Draws]:
    """Moves the context frames in front of the targets, so that both form one sequence.

    The moved frames have noise level 0, no weight and no mask; `noisy` of the result tells context
    chunks from target chunks. The context itself stays in place until `without_context` removes it.
    """
    frames = batch.context.shape[1]
    chunks = batch.chunk_index.shape[1]
    clean = chunks * frames // (frames + batch.target.shape[1])

    def prepend(x: Array, value: float = 0) -> Array:
        """`x` [b, frames, ...] behind as many context frames of a constant."""
        return jnp.concatenate([jnp.full((x.shape[0], frames), value, x.dtype), x], axis=1)

    # 1. Context frames become targets with an empty mask.
    sequence = dataclasses.replace(
        batch,
        target=jnp.concatenate([draws.context, batch.target], axis=1),
        mask=prepend(batch.mask),
        noisy=jnp.broadcast_to(jnp.arange(chunks) >= clean, batch.chunk_index.shape),
    )
    # 2. They get no noise and no weight.
    noise = jnp.concatenate([jnp.zeros_like(draws.context), draws.noise], axis=1)
    return sequence, dataclasses.replace(
        draws,
        noise=noise,
        sigma=prepend(draws.sigma),
        timestep=jnp.concatenate([draws.context_timestep, draws.timestep], axis=1),
        weight=prepend(draws.weight),
        conditioning_frame=prepend(draws.conditioning_frame, False),
    )


def without_context(batch: TeacherForcingBatch, draws: Draws) -> tuple[TeacherForcingBatch, Draws]:
    """Removes the context from a device's slice, whose targets already include it.

    Runs inside `shard_map`, because XLA's CPU compiler crashes on empty arrays that cross it.
    """
    return (
        dataclasses.replace(batch, context=batch.context[:, :0]),
        dataclasses.replace(
            draws, context=draws.context[:, :0], context_timestep=draws.context_timestep[:, :0]
        ),
    )


def _arrange(
    target_batch: TeacherForcingBatch,
    model_batch: TeacherForcingBatch,
    draws: Draws,
    _num_shards: int,
) -> tuple[TeacherForcingBatch, TeacherForcingBatch, Draws]:
    return contiguous_layout(target_batch, draws)[0], *contiguous_layout(model_batch, draws)


def _order(context: np.ndarray, target: np.ndarray, _num_shards: int) -> np.ndarray:
    return np.concatenate([context, target])


CONTIGUOUS = SequenceLayout(_arrange, _order, without_context)
"""[all clean; all noisy] cut into equal slices."""
