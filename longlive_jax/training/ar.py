"""Autoregressive training by teacher forcing (paper, section 2.1; Balanced order comes with SP).

One sequence holds clean context chunks and, after them, the chunks to denoise. Who sees whom follows
from the chunks' numbers, window and sinks, so full-history training (the reference) and training with
exactly the sampler's window are the same code on other numbers.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.diffusion.flow import FlowSchedule, corrupt, velocity_target
from longlive_jax.models.params import with_params
from longlive_jax.models.wan.dit import DiT
from longlive_jax.typing import Array, Float, Int, Key, Params
from pallas_kernels.tokens import Tokens, make


@flax.struct.dataclass
class Episode:
    """A batch for `ar_loss`: `j` context chunks and `k` target chunks of `m` latent frames each.

    The last axis of the integer columns runs over context chunks, then target chunks.
    """

    context: Float[Array, "b jm h w c"]
    target: Float[Array, "b km h w c"]
    mask: Float[Array, "b km"]  # 1 where a target frame counts, 0 where it is padding
    chunk: Int[Array, "b j+k"]  # number in the video; EMPTY for context that is not there
    start: Int[Array, "b j+k"]  # temporal position of the chunk's first frame, shot phase included
    since: Int[Array, "b j+k"]  # see `Tokens`
    sink: Int[Array, "b j+k"]
    prompt: Int[Array, "b j+k"]  # row of the table of text embeddings


@dataclasses.dataclass(frozen=True)
class ARLossSpec:
    """How targets are corrupted and context is roughened.

    Attributes:
      shift: of the noise levels' table (paper: 5).
      global_sinks: first chunks that every later one sees.
      context_noise: context latents get noise of a level uniform in [0, this], per chunk, while their
        timestep stays 0: what the sampler feeds back is never quite clean either.
      text_dropout: share of samples whose prompts are all replaced by the empty one, for guidance.
    """

    shift: float = 5.0
    global_sinks: int = 1
    context_noise: float = 0.0
    text_dropout: float = 0.0


def ar_loss(
    graphdef: nnx.GraphDef[DiT],
    params: Params,
    batch: Episode,
    key: Key[Array, ""],
    *,
    text: Float[Array, "p t e"],
    empty_prompt: int,
    chunk: int,
    spec: ARLossSpec,
    unroll: int = 1,
    remat: bool = False,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted flow-matching loss of the target chunks, one noise level a chunk.

    Returns the loss and metrics: the plain velocity error, also by tercile of the noise level.
    """
    dit = with_params(graphdef, params)
    schedule = FlowSchedule(spec.shift)
    keys = jax.random.split(key, 5)
    b, frames = batch.target.shape[:2]
    context_frames = batch.context.shape[1]
    index = schedule.draw(keys[0], (b, frames // chunk))
    index = jnp.repeat(index, chunk, axis=1)
    sigma = jnp.asarray(schedule.sigmas)[index]
    noise = jax.random.normal(keys[1], batch.target.shape)
    noisy = corrupt(batch.target, noise, sigma)
    context = roughen(keys[2], batch.context, chunk, spec.context_noise)
    dropped = jax.random.uniform(keys[3], (b, 1)) < spec.text_dropout
    prompts = text[jnp.where(dropped, empty_prompt, batch.prompt)]
    timestep = jnp.asarray(schedule.timesteps)[index]
    velocity, _ = dit(
        jnp.concatenate([context, noisy], axis=1),
        jnp.concatenate([jnp.zeros((b, context_frames)), timestep], axis=1),
        dit.text_kv(prompts),
        episode_tokens(batch, chunk, spec.global_sinks),
        noisy_from=context_frames,
        unroll=unroll,
        remat=remat,
    )
    error = jnp.mean((velocity - velocity_target(batch.target, noise)) ** 2, axis=(2, 3, 4))
    weight = jnp.asarray(schedule.weights)[index] * batch.mask
    loss = jnp.sum(error * weight) / jnp.maximum(jnp.sum(batch.mask), 1)
    return loss, _by_level(error, sigma, batch.mask)


def roughen(key, context: Float[Array, "b f h w c"], chunk: int, most: float) -> Array:
    """Context with noise of a level drawn uniformly from [0, most] for every chunk."""
    if not most:
        return context
    level_key, noise_key = jax.random.split(key)
    level = most * jax.random.uniform(level_key, (context.shape[0], context.shape[1] // chunk))
    noise = jax.random.normal(noise_key, context.shape)
    return corrupt(context, noise, jnp.repeat(level, chunk, axis=1))


def episode_tokens(batch: Episode, chunk: int, global_sinks: int) -> Tokens:
    """Tokens of context and target chunks, patches of a frame in row-major order."""
    height, width = batch.target.shape[2:4]
    rows, columns = height // 2, width // 2
    frame, row, column = (
        x.reshape(-1) for x in jnp.mgrid[:chunk, :rows, :columns].astype(jnp.int32)
    )

    def each(values: Array) -> Array:
        return jnp.repeat(values, len(frame), axis=-1)

    chunks = batch.chunk.shape[-1]
    place = each(batch.start) + jnp.tile(frame, chunks)
    pos = jnp.stack(
        [place, *(jnp.broadcast_to(jnp.tile(x, chunks), place.shape) for x in (row, column))], -1
    )
    noisy = jnp.arange(chunks) >= batch.context.shape[1] // chunk
    return make(
        pos,
        each(batch.chunk),
        each(noisy),
        since=each(batch.since),
        sink=each(batch.sink),
        global_sinks=global_sinks,
    )


def _by_level(error: Array, sigma: Array, mask: Array) -> dict[str, Array]:
    metrics = {"velocity_error": jnp.sum(error * mask) / jnp.maximum(jnp.sum(mask), 1)}
    for name, low, high in (("low", 0.0, 0.5), ("mid", 0.5, 0.85), ("high", 0.85, 1.01)):
        here = mask * (sigma >= low) * (sigma < high)
        metrics[f"error_{name}_noise"] = jnp.sum(error * here) / jnp.maximum(jnp.sum(here), 1)
    return metrics
