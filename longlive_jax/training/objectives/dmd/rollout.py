"""The student's own videos, and the one pass that carries the gradient (paper, section 4.1).

`rollout` samples without a gradient, chunk by chunk against a cache, and leaves every chunk at its
exit step. `student_pass` then denoises all chunks at that step at once: each attends to the cached
clean chunks before it. Its output equals the rollout's, and its gradient is that of the exit steps.
A gradient so needs the memory of one pass over the video, whatever the number of chunks.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from longlive_jax import layout
from longlive_jax.diffusion import solvers
from longlive_jax.diffusion.flow import FlowSchedule, corrupt, x0_from_velocity
from longlive_jax.models.wan.cache import CachePolicy, KVCache, empty_cache, insert_layer
from longlive_jax.models.wan.dit import DiT
from longlive_jax.models.wan.layer_kv import (
    KV,
    AttentionContext,
    DenseLayerKV,
    LayerKV,
)
from longlive_jax.training.objectives.dmd.draws import RolloutDraws, RolloutSpec
from longlive_jax.typing import Array, Bool, Float, Int
from pallas_kernels.attention import AttentionFn
from pallas_kernels.tokens import Tokens, make


@flax.struct.dataclass
class Scene:
    """What a video shows.

    Attributes:
      text: text features of every chunk's prompt.
      cut: whether the chunk begins a shot other than the first.
      first_frame: latents of the given first frame, or None.
    """

    text: Float[Array, "b n t e"]
    cut: Bool[Array, "b n"]
    first_frame: Float[Array, "b h w c"] | None = None


@flax.struct.dataclass
class Rollout:
    """A video that the student has sampled up to the exit step.

    Attributes:
      x: every frame's sample before the exit step.
      x0: the exit step's estimate of the clean video.
      layer_kv: keys and values of the finished chunks, one slot per chunk.
      exit_step: the exit step.
    """

    x: Float[Array, "b f h w c"]
    x0: Float[Array, "b f h w c"]
    layer_kv: Any
    exit_step: Int[Array, ""]


@flax.struct.dataclass
class ChunkColumns:
    """Per-chunk columns of a video's tokens, each `[b, n]`.

    Attributes:
      shot_rope_offset: latent frames added to temporal positions.
      window_start: first chunk of the attention window.
      sink: the shot sink, or -1.
    """

    shot_rope_offset: Int[Array, "b n"]
    window_start: Int[Array, "b n"]
    sink: Int[Array, "b n"]

    @classmethod
    def of(cls, cut: Bool[Array, "b n"], spec: RolloutSpec) -> "ChunkColumns":
        """The columns of videos with these cuts."""
        window = cut.shape[1] + spec.global_sinks + 2 if spec.window is None else spec.window
        start, sink = layout.windows(
            cut, window=window, global_sinks=spec.global_sinks, shot_sink=spec.shot_sinks
        )
        return cls(spec.shot_rope_offset * jnp.cumsum(cut, axis=1), start, sink)


def rollout(
    dit: DiT,
    scene: Scene,
    draws: RolloutDraws,
    spec: RolloutSpec,
    *,
    chunk_frames: int,
    attend: AttentionFn,
    make_cache: Callable[..., KVCache] = empty_cache,
) -> Rollout:
    """Samples a video up to its exit step; take no gradient of it.

    The cache keeps a slot for every chunk, because the pass with the gradient needs all of them;
    a smaller window is a mask. `make_cache` is called like `empty_cache`.
    """
    # 1. Arrays of every chunk, chunks first.
    chunks = scene.cut.shape[1]
    xs = (
        jnp.arange(chunks),
        *_by_chunk((draws.noise, draws.context_noise, scene.text), chunks),
        scene.cut.T,
        jax.tree.map(jnp.transpose, ChunkColumns.of(scene.cut, spec)),
    )
    batch, _, height, width, _ = draws.noise.shape
    size = (chunk_frames, height // 2, width // 2)
    cache = make_cache(dit.cfg, batch, size, _keep_all(chunks, spec))

    # 2. Chunk by chunk: denoise up to the exit step, then write the estimate to the cache.
    def chunk(cache: KVCache, x: Any):
        index, noise, context_noise, text, cut, own = x
        kv = dit.text_kv(text)
        fixed = _fixed_frames(scene.first_frame, noise.shape, index)
        tokens = partial(_chunk_tokens, cache, own, spec)
        at_exit, x0 = _denoise(
            dit, noise, kv, tokens(noisy=True), cache, fixed, draws.exit_step, spec, attend
        )
        context = x0
        if context_noise is not None:
            level = jnp.full(x0.shape[:2], FlowSchedule(spec.shift).sigmas[-1])
            context = fixed.apply(corrupt(x0, context_noise, level))
        after = _write(dit, context, kv, tokens(noisy=False), cache, cut, own, attend)
        return after, (at_exit, x0)

    cache, (x, x0) = lax.scan(chunk, cache, xs)
    return Rollout(_by_frame(x), _by_frame(x0), cache.layer_kv, draws.exit_step)


def student_pass(
    dit: DiT,
    scene: Scene,
    rolled: Rollout,
    spec: RolloutSpec,
    *,
    chunk_frames: int,
    attend: AttentionFn,
    **options: Any,
) -> Float[Array, "b f h w c"]:
    """The rollout's estimate of the clean video once more, with a gradient.

    `options` are arguments of `DiT.__call__`, such as `remat`. Given frames are returned as they
    are.
    """
    # 1. Tokens of all chunks, noisy, and the cached clean ones.
    frames = rolled.x.shape[1]
    tokens = _video_tokens(scene, rolled.x.shape, spec, chunk_frames)
    layer_kv = lax.stop_gradient(rolled.layer_kv)
    if spec.leaks:
        layer_kv = LeakingLayerKV(layer_kv.k, layer_kv.v)
    clean: Any = np.zeros(tokens.noisy.shape, bool)
    cache = FinishedChunks(layer_kv, dataclasses.replace(tokens, noisy=clean))

    # 2. The exit step of all chunks.
    fixed = _fixed_frames(scene.first_frame, rolled.x.shape, jnp.zeros((), jnp.int32))
    timestep, sigma = _exit_level(spec, rolled.exit_step, fixed)
    velocity, _ = dit(
        rolled.x, timestep, dit.embed_text(scene.text), tokens, cache, attend=attend, **options
    )
    assert velocity is not None
    x0 = fixed.apply(x0_from_velocity(rolled.x, velocity, sigma))
    if spec.tail is None:
        return x0
    in_tail = jnp.arange(frames) >= frames - spec.tail * chunk_frames
    return jnp.where(in_tail[:, None, None, None], x0, lax.stop_gradient(x0))


@flax.struct.dataclass
class FinishedChunks:
    """The finished chunks of a rollout as a cache that is only read.

    Attributes:
      layer_kv: keys and values of all layers, one slot per chunk.
      own_tokens: metadata of the chunks' tokens, clean.
    """

    layer_kv: Any
    own_tokens: Tokens

    def tokens(self, _queries: Tokens, /) -> Tokens:
        """Metadata of the cached keys."""
        return self.own_tokens


@flax.struct.dataclass
class LeakingLayerKV:
    """Cached keys and values whose gradient goes to the call's own keys and values.

    The original's cache holds the clean pass's values with the history of the noisy pass.
    """

    k: Float[Array, "b slots m n d"]
    v: Float[Array, "b slots m n d"]

    def attend(self, q: Array, own: KV, context: AttentionContext, attend: AttentionFn, /) -> Array:
        """See `LayerKV`; the call must hold the same chunks as the slots, in the same order."""
        leaking = (
            stored + (x - lax.stop_gradient(x)).reshape(stored.shape).astype(stored.dtype)
            for stored, x in zip((self.k, self.v), own, strict=True)
        )
        return DenseLayerKV(*leaking).attend(q, own, context, attend)


@flax.struct.dataclass
class FixedFrames:
    """Frames that are given rather than denoised.

    Attributes:
      latents: their latents; other frames are not read.
      is_fixed: which frames are given.
    """

    latents: Float[Array, "b f h w c"] | None
    is_fixed: Bool[Array, "b f"]

    def apply(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
        """`x` with the given frames put in."""
        if self.latents is None:
            return x
        return jnp.where(self.is_fixed[:, :, None, None, None], self.latents, x)

    def level(self, value: Array) -> Float[Array, "b f"]:
        """`value` for every frame, and 0 for given ones."""
        return jnp.where(self.is_fixed, 0.0, value)


def _fixed_frames(first: Array | None, shape: tuple[int, ...], index: Array) -> FixedFrames:
    """The given frames of chunk `index` (or of a video, with index 0), of this shape."""
    if first is None:
        return FixedFrames(None, jnp.zeros(shape[:2], bool))
    is_first = (jnp.arange(shape[1]) == 0) & (index == 0)
    return FixedFrames(
        jnp.broadcast_to(first[:, None], shape), jnp.broadcast_to(is_first, shape[:2])
    )


def _exit_level(spec: RolloutSpec, exit_step: Array, fixed: FixedFrames) -> tuple[Array, Array]:
    """Timestep and noise level [b, f] of the exit step."""
    levels = (spec.table().timestep, spec.exit_sigmas())
    timestep, sigma = (fixed.level(jnp.asarray(x)[exit_step]) for x in levels)
    return timestep, sigma


def _denoise(
    dit: DiT,
    noise: Array,
    kv: Any,
    tokens: Tokens,
    cache: KVCache,
    fixed: FixedFrames,
    exit_step: Array,
    spec: RolloutSpec,
    attend: AttentionFn,
) -> tuple[Array, Array]:
    """A chunk's sample before the exit step, and the exit step's estimate of x0."""
    table = jax.tree.map(jnp.asarray, spec.table())

    def velocity(x: Array, timestep: Array) -> Array:
        predicted, _ = dit(x, timestep, kv, tokens, cache, attend=attend)
        assert predicted is not None
        return predicted

    def advance(k: Array, state: solvers.SolverState) -> solvers.SolverState:
        row = jax.tree.map(lambda column: column[k], table)
        state = dataclasses.replace(state, x=fixed.apply(state.x))
        return solvers.step(state, velocity(state.x, fixed.level(row.timestep)), row)

    state = lax.fori_loop(0, exit_step, advance, solvers.start(noise))
    x = fixed.apply(state.x)
    timestep, sigma = _exit_level(spec, exit_step, fixed)
    return x, fixed.apply(x0_from_velocity(x, velocity(x, timestep), sigma))


def _write(
    dit: DiT,
    latents: Array,
    kv: Any,
    tokens: Tokens,
    cache: KVCache,
    cut: Array,
    columns: ChunkColumns,
    attend: AttentionFn,
) -> KVCache:
    """The cache after the context pass over a finished chunk."""
    after, slot = cache.reserve(cut=cut, shot_rope_offset=columns.shot_rope_offset)

    def write(stored: LayerKV, layer: Array | int, k: Array, v: Array) -> LayerKV:
        return insert_layer(stored, cache.pack(k, v), layer, slot, may_drop=False)

    timestep = jnp.zeros(latents.shape[:2])
    stored = dit.write_kv(latents, timestep, kv, tokens, cache, write, attend=attend)
    return after.with_layer_kv(stored)


def _chunk_tokens(
    cache: KVCache, columns: ChunkColumns, spec: RolloutSpec, *, noisy: bool
) -> Tokens:
    """Tokens of the next chunk, with its attention window."""
    tokens = cache.upcoming(columns.shot_rope_offset, noisy=noisy)
    if spec.window is None:
        return tokens
    return make(
        tokens.pos,
        tokens.chunk_index,
        tokens.noisy,
        window_start=columns.window_start[:, None],
        sink=columns.sink[:, None],
        global_sinks=spec.global_sinks,
        uniform_mask=True,
    )


def _video_tokens(
    scene: Scene, shape: tuple[int, ...], spec: RolloutSpec, chunk_frames: int
) -> Tokens:
    """Tokens of all chunks, noisy, with their attention windows."""
    b, frames, height, width, _ = shape
    columns = ChunkColumns.of(scene.cut, spec)
    offset = jnp.repeat(columns.shot_rope_offset, chunk_frames, axis=1)
    tokens = layout.grid(
        frames,
        height // 2,
        width // 2,
        chunk_frames=chunk_frames,
        shot_rope_offset=offset,
        noisy=True,
    )
    if spec.window is None:
        return tokens
    per_token = partial(jnp.repeat, repeats=len(tokens) // scene.cut.shape[1], axis=1)
    return dataclasses.replace(
        tokens,
        window_start=per_token(columns.window_start),
        sink=per_token(columns.sink),
        global_sinks=jnp.full((b, len(tokens)), spec.global_sinks, jnp.int32),
    )


def _keep_all(chunks: int, spec: RolloutSpec) -> CachePolicy:
    """A cache with a slot for every chunk, which evicts none."""
    return CachePolicy(window=chunks + 1, global_sinks=0, shot_sinks=False, format=spec.format)


def _by_chunk(arrays: Any, chunks: int) -> Any:
    """Every array [b, chunks * m, ...] as [chunks, b, m, ...]."""

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, arrays)


def _by_frame(x: Array) -> Array:
    """[chunks, b, m, ...] to [b, chunks * m, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
