"""The heart of sampling: denoise one chunk against the cache, then remember it clean.

Everything that may change from chunk to chunk (noise, prompt, cut, shot phase, a clamped first
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
from longlive_jax.models.wan.cache import KVCache
from longlive_jax.models.wan.dit import DiT, TextKV
from longlive_jax.typing import Array, Bool, Float, Int, Key
from pallas_kernels.attention import AttentionFn, attention


@struct.dataclass
class ChunkRequest:
    """What the next chunk shall be.

    Fields: `noise` is its pure noise; `text` the prompts' keys and values, one prompt a sample
    (with guidance the b prompts, then the b negative ones); `cut` marks the first chunk of a shot
    other than the first; `shot_rope_offset` is added to its temporal positions, in latent frames;
    where `clamped`, frames are held at `clamp` and count as clean (image to video: the first frame
    of chunk 0); `keys` are what a solver with a spread draws from, one a sample.
    """

    noise: Float[Array, "b f h w c"]
    text: TextKV
    cut: Bool[Array, "b"]
    shot_rope_offset: Int[Array, "b"]
    clamp: Float[Array, "b f h w c"]
    clamped: Bool[Array, "b f"]
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
    """Latents (float32) of the next chunk, and the cache that remembers them.

    With `guidance` the cache and `request.text` have 2b samples, the negative ones last; each model
    call sees both halves. Without it nothing negative exists.
    """
    twice = _same if guidance is None else doubled
    tokens = cache.upcoming(twice(request.shot_rope_offset), noisy=True)

    def predict(x: Array, timestep: Array) -> Array:
        relative = cache.policy.relative_rope
        velocity, _ = dit(
            x, timestep, request.text, tokens, cache, attend=attend, relative_rope=relative
        )
        assert velocity is not None
        return velocity

    velocity = predict if guidance is None else guided(predict, guidance)

    def denoise(state: solvers.SolverState, at: tuple[Solver, Array]):
        row, k = at
        state = dataclasses.replace(state, x=_clamp(state.x, request))
        timestep = jnp.where(request.clamped, 0.0, row.timestep)
        fresh = None
        if row.noise_std is not None:
            fresh = chunk_noise(request.keys, k, state.x.shape[1:])
        return solvers.step(state, velocity(state.x, timestep), row, fresh), None

    steps = (solver, jnp.arange(solver.steps))
    state, _ = lax.scan(denoise, solvers.start(request.noise), steps)
    latents = _clamp(state.x, request)
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
    """The cache after a pass over finished latents at noise level 0 (the context pass).

    Also how a given video enters the cache, to be continued. Of the last layer only keys and values
    are computed.
    """
    twice = _same if guidance is None else doubled
    cut, shot_rope_offset = twice(request.cut), twice(request.shot_rope_offset)
    cache = cache.before_write(cut)
    _, packed = dit(
        twice(latents),
        jnp.zeros((cache.num_chunks.shape[0], latents.shape[1])),
        request.text,
        cache.upcoming(shot_rope_offset, noisy=False),
        cache,
        attend=attend,
        output=False,
        store=cache.pack,
        relative_rope=cache.policy.relative_rope,
    )
    return cache.insert(packed, cut=cut, shot_rope_offset=shot_rope_offset)


def chunk_noise(
    keys: Key[Array, "b"], chunk: Int[Array, "b"] | int, shape: tuple[int, ...]
) -> Float[Array, "b f h w c"]:
    """Standard normal noise of `shape` (f, h, w, c) for one chunk of every sample.

    It depends on the sample's own key and the chunk's index alone: not on the batch, nor on whether
    chunks are scanned or streamed.
    """
    return jax.vmap(lambda key: jax.random.normal(key, shape))(folded(keys, chunk))


def folded(keys: Key[Array, "b"], number: Int[Array, "b"] | int) -> Key[Array, "b"]:
    """Keys of their own for a number, or for one number a key."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(number), keys.shape))


def _clamp(x: Array, request: ChunkRequest) -> Array:
    return jnp.where(request.clamped[:, :, None, None, None], request.clamp, x)


def _same[T](x: T) -> T:
    return x
