"""Sampling of one chunk: denoise it against the cache, then write it to the cache.

Everything that may change from chunk to chunk (noise, prompt, cut, shot offset, a fixed first
frame) is an array in `ChunkRequest`, so all chunks of a run share one compilation. (LongLive 2.0,
sections 3.2 and 3.3.)
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from longlive_jax.diffusion import solvers
from longlive_jax.diffusion.guidance import doubled, guided
from longlive_jax.diffusion.solvers import Solver
from longlive_jax.models.wan.cache import KVCache, insert_layer
from longlive_jax.models.wan.dit import DiT, TextKV
from longlive_jax.models.wan.layer_kv import LayerKV
from longlive_jax.typing import Array, Bool, Float, Int, Key
from pallas_kernels.attention import AttentionFn, attention


@struct.dataclass
class ChunkRequest:
    """Inputs of one chunk.

    Attributes:
      noise: the pure noise that denoising starts from.
      text_kv: the prompts' keys and values, one prompt per sample; with guidance the b prompts,
        then the b negative ones.
      cut: whether the chunk begins a shot other than the first.
      shot_rope_offset: latent frames added to the chunk's temporal positions.
      fixed_latents: values of the fixed frames.
      is_fixed: which frames are fixed: they are not denoised and count as clean. Image to video
        fixes frame 0 of chunk 0.
      keys: random keys for stochastic solvers, one per sample.
    """

    noise: Float[Array, "b f h w c"]
    text_kv: TextKV
    cut: Bool[Array, "b"]
    shot_rope_offset: Int[Array, "b"]
    fixed_latents: Float[Array, "b f h w c"]
    is_fixed: Bool[Array, "b f"]
    keys: Key[Array, "b"]


def sample_chunk(
    dit: DiT,
    cache: KVCache,
    request: ChunkRequest,
    solver: Solver,
    *,
    guidance: Float[Array, ""] | float | None = None,
    attend: AttentionFn = attention,
) -> tuple[Float[Array, "b f h w c"], KVCache]:
    """Latents (float32) of the next chunk, and the cache with the chunk written to it.

    With `guidance` the cache and `request.text_kv` have 2b samples, the negative ones last, and
    each model call runs both halves. Without it, nothing is computed for negative prompts.
    """
    # 1. The velocity field: the model against the cache, guided or not.
    repeat = _identity if guidance is None else doubled
    tokens = cache.upcoming(repeat(request.shot_rope_offset), noisy=True)

    def predict(x: Array, timestep: Array) -> Array:
        relative = cache.policy.relative_rope
        velocity, _ = dit(
            x, timestep, request.text_kv, tokens, cache, attend=attend, relative_rope=relative
        )
        assert velocity is not None
        return velocity

    velocity = predict if guidance is None else guided(predict, guidance)

    # 2. Solver steps from noise to clean latents.
    def denoise(state: solvers.SolverState, step: tuple[Solver, Array]):
        row, k = step
        state = dataclasses.replace(state, x=_fix_frames(state.x, request))
        timestep = jnp.where(request.is_fixed, 0.0, row.timestep)
        fresh = None
        if row.noise_std is not None:
            fresh = chunk_noise(request.keys, k, state.x.shape[1:])
        return solvers.step(state, velocity(state.x, timestep), row, fresh), None

    steps = (solver, jnp.arange(solver.steps))
    state, _ = lax.scan(denoise, solvers.start(request.noise), steps)
    latents = _fix_frames(state.x, request)

    # 3. Clean context pass.
    return latents, write_context(dit, cache, latents, request, guidance=guidance, attend=attend)


def write_context(
    dit: DiT,
    cache: KVCache,
    latents: Float[Array, "b f h w c"],
    request: ChunkRequest,
    *,
    guidance: Float[Array, ""] | float | None = None,
    attend: AttentionFn = attention,
) -> KVCache:
    """The cache after the clean context pass: finished latents at noise level 0.

    Also the way to fill the cache from the latents of a given video. Of the last layer only keys
    and values are computed.
    """
    repeat = _identity if guidance is None else doubled
    cut, shot_rope_offset = repeat(request.cut), repeat(request.shot_rope_offset)
    cache = cache.before_write(cut)
    after, slot = cache.reserve(cut=cut, shot_rope_offset=shot_rope_offset)

    may_drop = cache.policy.may_drop

    def write(stored: LayerKV, layer: Array | int, k: Array, v: Array) -> LayerKV:
        return insert_layer(stored, cache.pack(k, v), layer, slot, may_drop=may_drop)

    stored = dit.write_kv(
        repeat(latents),
        jnp.zeros((cache.num_chunks.shape[0], latents.shape[1])),
        request.text_kv,
        cache.upcoming(shot_rope_offset, noisy=False),
        cache,
        write,
        attend=attend,
        relative_rope=cache.policy.relative_rope,
    )
    return after.with_layer_kv(stored)


def chunk_noise(
    keys: Key[Array, "b"], chunk: Int[Array, "b"] | int, shape: tuple[int, ...]
) -> Float[Array, "b f h w c"]:
    """Standard normal noise of `shape` (f, h, w, c) for one chunk of every sample.

    It depends only on the sample's own key and the chunk's index: not on the batch, nor on whether
    chunks are scanned or streamed.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(fold_in(keys, chunk))


def fold_in(keys: Key[Array, "b"], number: Int[Array, "b"] | int) -> Key[Array, "b"]:
    """`jax.random.fold_in` for each key, with a number per key or the same number for all."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(number), keys.shape))


def _fix_frames(x: Array, request: ChunkRequest) -> Array:
    return jnp.where(request.is_fixed[:, :, None, None, None], request.fixed_latents, x)


def _identity[T](x: T) -> T:
    return x
