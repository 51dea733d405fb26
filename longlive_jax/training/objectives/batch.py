"""Batches for teacher forcing, and everything random in one evaluation of its loss."""

import dataclasses
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp

from longlive_jax.diffusion.flow import TIMESTEPS, FlowSchedule, corrupt
from longlive_jax.typing import Array, Bool, Float, Int, Key


@flax.struct.dataclass
class TeacherForcingBatch:
    """`j` context chunks and `k` target chunks of `m` latent frames for each of `b` samples.

    The last axis of the integer arrays runs over the context chunks, then the target chunks.

    Attributes:
      context: clean latents.
      target: clean latents of the chunks to denoise.
      mask: 1 where a target frame counts, 0 where it is padding.
      chunk_index: index of a chunk in its video; EMPTY for context that does not exist.
      start: temporal position of the chunk's first frame, shot offset included.
      window_start: oldest visible chunk (see `Tokens`).
      sink: shot sink (see `Tokens`).
      prompt: row of the chunk's prompt in the text features.
      noisy: whether each chunk is a target; None: those after the context are.
    """

    context: Float[Array, "b jm h w c"]
    target: Float[Array, "b km h w c"]
    mask: Float[Array, "b km"]
    chunk_index: Int[Array, "b j+k"]
    start: Int[Array, "b j+k"]
    window_start: Int[Array, "b j+k"]
    sink: Int[Array, "b j+k"]
    prompt: Int[Array, "b j+k"]
    noisy: Bool[Array, "b j+k"] | None = None


@dataclasses.dataclass(frozen=True)
class ARLossSpec:
    """Noise levels and corruption of the teacher-forcing loss.

    Attributes:
      shift: shift of the noise levels (paper: 5).
      weighting: weight of an error by its noise level. "bell" is the reference's and suits
        fine-tuning: it nearly ignores the noisiest levels, at which a model trained from scratch
        learns to follow its text.
      global_sinks: number of first chunks that all later chunks attend to.
      context_noise: largest noise level of the context. Every chunk's level is uniform in
        [0, context_noise], since the sampler's own context is never quite clean.
      context_noise_told: whether that level is the context's timestep, which is 0 otherwise.
      one_level: probability that all chunks of a sample have one noise level, as in the training of
        a bidirectional model; otherwise each chunk has its own.
      text_dropout: probability that all prompts of a sample are replaced by the empty one, for
        classifier-free guidance.
      image_to_video: whether the first latent frame of a video is a conditioning frame: clean, at
        timestep 0, in context and target, and excluded from the loss.
    """

    shift: float = 5.0
    weighting: Literal["bell", "uniform"] = "bell"
    global_sinks: int = 1
    context_noise: float = 0.0
    context_noise_told: bool = False
    one_level: float = 0.0
    text_dropout: float = 0.0
    image_to_video: bool = False


@flax.struct.dataclass
class Draws:
    """Everything random in one evaluation of the loss.

    Attributes:
      noise: noise of the target frames.
      sigma: their noise levels.
      timestep: timestep that the model is given for them.
      weight: weight of their errors.
      context: context latents as the model sees them.
      context_timestep: timestep that the model is given for the context.
      dropped: whether all prompts of a sample are replaced by the empty one.
      conditioning_frame: whether a target frame is given (image to video) and not in the loss.
    """

    noise: Float[Array, "b km h w c"]
    sigma: Float[Array, "b km"]
    timestep: Float[Array, "b km"]
    weight: Float[Array, "b km"]
    context: Float[Array, "b jm h w c"]
    context_timestep: Float[Array, "b jm"]
    dropped: Bool[Array, "b"]
    conditioning_frame: Bool[Array, "b km"]


def draw(
    key: Key[Array, ""], batch: TeacherForcingBatch, *, chunk_frames: int, spec: ARLossSpec
) -> Draws:
    """Draws for a batch: noise, dropout, and noise levels, uniform over the table.

    Every chunk has its own level, or all chunks of a sample the same (`ARLossSpec.one_level`).
    """
    keys = jax.random.split(key, 5)
    b, frames = batch.target.shape[:2]
    level_key, noise_key = jax.random.split(keys[2])
    level = jax.random.uniform(level_key, (b, batch.context.shape[1] // chunk_frames))
    index = FlowSchedule(spec.shift).draw(keys[0], (b, frames // chunk_frames))
    if spec.one_level:
        has_one = jax.random.uniform(keys[4], (b, 1)) < spec.one_level
        index = jnp.where(has_one, index[:, :1], index)
    context_noise = None
    if spec.context_noise:
        context_noise = jax.random.normal(noise_key, batch.context.shape)
    return draws_of(
        batch,
        noise=jax.random.normal(keys[1], batch.target.shape),
        index=index,
        context_level=spec.context_noise * level,
        context_noise=context_noise,
        dropped=jax.random.uniform(keys[3], (b, 1))[:, 0] < spec.text_dropout,
        chunk_frames=chunk_frames,
        spec=spec,
    )


def draws_of(
    batch: TeacherForcingBatch,
    *,
    noise: Float[Array, "b km h w c"],
    index: Int[Array, "b k"],
    context_level: Float[Array, "b j"],
    context_noise: Float[Array, "b jm h w c"] | None,
    dropped: Bool[Array, "b"],
    chunk_frames: int,
    spec: ARLossSpec,
) -> Draws:
    """`Draws` from random numbers, so that the reference's can be replayed.

    Args:
      batch: the batch.
      noise: noise of the target frames.
      index: index of every target chunk in the table of noise levels.
      context_level: noise level of every context chunk.
      context_noise: noise of the context frames, or None.
      dropped: whether all prompts of a sample are replaced by the empty one.
      chunk_frames: latent frames of a chunk.
      spec: settings of the loss.
    """
    schedule, context_frames = FlowSchedule(spec.shift), batch.context.shape[1]
    index, level = (jnp.repeat(x, chunk_frames, axis=1) for x in (index, context_level))
    conditioning = _conditioning_frames(batch, chunk_frames, spec)
    in_context, in_target = conditioning[:, :context_frames], conditioning[:, context_frames:]

    # The context, and the timestep that the model is given for it.
    context, timestep = batch.context, 0 * level
    if context_noise is not None:
        context = corrupt(batch.context, context_noise, level)
        if spec.context_noise_told:
            timestep = TIMESTEPS * level
    return Draws(
        noise=noise,
        sigma=jnp.where(in_target, 0.0, jnp.asarray(schedule.sigmas)[index]),
        timestep=jnp.where(in_target, 0.0, jnp.asarray(schedule.timesteps)[index]),
        weight=_weight(spec, schedule, index),
        context=jnp.where(in_context[:, :, None, None, None], batch.context, context),
        context_timestep=jnp.where(in_context, 0.0, timestep),
        dropped=dropped,
        conditioning_frame=in_target,
    )


def num_loss_frames(
    batch: TeacherForcingBatch, chunk_frames: int, spec: ARLossSpec
) -> Float[Array, ""]:
    """Number of target frames that the loss averages over."""
    conditioning = _conditioning_frames(batch, chunk_frames, spec)[:, batch.context.shape[1] :]
    return jnp.sum(batch.mask * ~conditioning)


def _conditioning_frames(
    batch: TeacherForcingBatch, chunk_frames: int, spec: ARLossSpec
) -> Bool[Array, "b jm+km"]:
    """Whether each frame of context and target is the image that a video begins with."""
    first = jnp.repeat(batch.chunk_index == 0, chunk_frames, axis=1)
    return first & (jnp.arange(first.shape[1]) % chunk_frames == 0) & spec.image_to_video


def _weight(spec: ARLossSpec, schedule: FlowSchedule, index: Array) -> Array:
    if spec.weighting == "uniform":
        return jnp.ones(index.shape)
    return jnp.asarray(schedule.weights)[index]
