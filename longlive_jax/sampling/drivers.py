"""The compiled functions of the sampler: one step per chunk, or one scan over all chunks.

Both draw the same noise and give the same latents bit for bit. Neither waits for the device: the
arrays returned may still be computing, and the cache never leaves the device.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import lax
from jax.sharding import Mesh

from longlive_jax.diffusion.solvers import Solver
from longlive_jax.models.params import with_params
from longlive_jax.models.wan.cache import KVCache
from longlive_jax.models.wan.dit import DiT, TextKV
from longlive_jax.sampling.chunk import (
    ChunkRequest,
    chunk_noise,
    fold_in,
    sample_chunk,
    write_context,
)
from longlive_jax.sampling.sharding import (
    LAYERS_VIDEOS,
    REPLICATED,
    VIDEOS,
    cache_specs,
    over_videos,
)
from longlive_jax.typing import Array, Bool, Float, Int, Key, Params
from pallas_kernels.attention import AttentionFn, attention

SOLVER_KEY = 2**31 - 1
"""Folded into the keys of stochastic solvers. No chunk has this index, so a solver's noise is
independent of the noise that chunks start from."""

COMPILER_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
"""XLA otherwise joins products of the same activations, for which it copies their weights together
in every call: 2.3 GB for the keys and values of the 5B model."""


@struct.dataclass
class ChunkInputs:
    """Inputs of one chunk that change during a video; small enough to prepare on the host.

    Attributes:
      text: the prompts: keys and values (for a step), or indices into a bank of prompts (for the
        scan). With guidance the b prompts, then the b negative ones.
      cut: whether the chunk begins a shot other than the first.
      shot_rope_offset: latent frames added to the chunk's temporal positions.
      noise: initial noise in place of the noise drawn from the keys; None draws it.
    """

    text: TextKV | Int[Array | np.ndarray, "b"]
    cut: Bool[Array | np.ndarray, "b"]
    shot_rope_offset: Int[Array | np.ndarray, "b"]
    noise: Float[Array, "b f h w c"] | None = None


@struct.dataclass
class VideoConditioning:
    """Inputs that stay constant for a video.

    Attributes:
      solver: coefficients of the solver; its length is the number of steps.
      keys: random keys, one per sample.
      conditioning_frame: latents of the first frame (image to video).
      has_conditioning_frame: which samples have one; frame 0 of their chunk 0 is fixed to it.
      guidance: scale of classifier-free guidance, or None for none.
    """

    solver: Solver
    keys: Key[Array, "b"]
    conditioning_frame: Float[Array, "b h w c"]
    has_conditioning_frame: Bool[Array | np.ndarray, "b"]
    guidance: Float[Array, ""] | float | None = None


class Sampler:
    """The jitted functions of one DiT structure; parameters are arguments.

    Each compiles once: for all chunks, prompts, cuts and seeds, with or without a conditioning
    frame. Caches passed in are donated and must not be used again. `dit` builds the module from
    parameters.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef[DiT],
        *,
        attend: AttentionFn = attention,
        mesh: Mesh | None = None,
    ):
        """`mesh` shards the videos of a batch over its devices; None runs on one device."""
        self.dit = functools.partial(with_params, graphdef)
        self._attend, self._mesh = attend, mesh
        jit = functools.partial(jax.jit, donate_argnums=1, compiler_options=COMPILER_OPTIONS)
        self.step = jit(self._step)
        self.write_context = jit(self._write_context)
        self.text = jax.jit(self._text)
        self._jitted_scan = jit(self._scan)

    def sample(
        self,
        params: Params,
        cache: KVCache,
        conditioning: VideoConditioning,
        inputs: ChunkInputs,
        bank: TextKV,
    ) -> tuple[Float[Array, "b f h w c"], KVCache]:
        """Latents of all chunks by one scan, and the cache after them.

        `inputs` has a leading axis of chunks; its `text` are indices into the prompt axis of `bank`
        (`[layers, p, 1, t, n, d]`).
        """
        return self._jitted_scan(params, cache, conditioning, inputs, bank)

    def _step(
        self,
        params: Params,
        cache: KVCache,
        conditioning: VideoConditioning,
        inputs: ChunkInputs,
    ):
        """Latents of the next chunk, and the cache after it."""

        def step(params: Params, cache: KVCache, conditioning: Any, inputs: Any):
            request = self._request(cache, conditioning, inputs)
            return sample_chunk(
                self.dit(params), cache, request, conditioning.solver,
                guidance=conditioning.guidance, attend=self._attend,
            )  # fmt: skip

        arguments = (params, cache, conditioning, inputs)
        return over_videos(
            self._mesh, step, arguments, _specs(*arguments), (VIDEOS, cache_specs(cache))
        )

    def _scan(
        self,
        params: Params,
        cache: KVCache,
        conditioning: VideoConditioning,
        inputs: ChunkInputs,
        bank: TextKV,
    ):
        def body(cache: KVCache, chunk: ChunkInputs):
            index = cast(Array, chunk.text)
            text = jax.tree.map(lambda x: jnp.take(x, index, axis=1), bank)
            chunk = dataclasses.replace(chunk, text=text)
            # Barriers isolate the step from the loop, so that XLA compiles it as it does alone.
            arguments = lax.optimization_barrier((params, cache, conditioning, chunk))
            latents, cache = lax.optimization_barrier(self._step(*arguments))
            return cache, latents

        cache, latents = lax.scan(body, cache, inputs)
        latents = jnp.moveaxis(latents, 0, 1)
        return latents.reshape(latents.shape[0], -1, *latents.shape[3:]), cache

    def _write_context(
        self,
        params: Params,
        cache: KVCache,
        conditioning: VideoConditioning,
        inputs: ChunkInputs,
        latents: Array,
    ) -> KVCache:
        """The cache after a given chunk of latents, of a video to be continued."""

        def write(params: Params, cache: KVCache, conditioning: Any, inputs: Any, latents: Array):
            request = self._request(cache, conditioning, inputs)
            return write_context(
                self.dit(params), cache, latents, request,
                guidance=conditioning.guidance, attend=self._attend,
            )  # fmt: skip

        arguments = (params, cache, conditioning, inputs)
        specs = (*_specs(*arguments), VIDEOS)
        return over_videos(self._mesh, write, (*arguments, latents), specs, cache_specs(cache))

    def _text(self, params: Params, features: Float[Array, "b t e"]) -> TextKV:
        """Keys and values of one prompt per sample, for `ChunkInputs.text` or as a bank."""
        return self.dit(params).text_kv(features[:, None])

    def _request(
        self, cache: KVCache, conditioning: VideoConditioning, inputs: ChunkInputs
    ) -> ChunkRequest:
        batch, *space = conditioning.conditioning_frame.shape
        frames, chunk = cache.size[0], cache.num_chunks[:batch]
        noise = inputs.noise
        if noise is None:
            noise = chunk_noise(conditioning.keys, chunk, (frames, *space))
        has_fixed_frame = jnp.asarray(conditioning.has_conditioning_frame) & (chunk == 0)
        return ChunkRequest(
            noise=noise,
            text_kv=cast(TextKV, inputs.text),
            cut=jnp.asarray(inputs.cut),
            shot_rope_offset=jnp.asarray(inputs.shot_rope_offset),
            fixed_latents=jnp.broadcast_to(conditioning.conditioning_frame[:, None], noise.shape),
            is_fixed=has_fixed_frame[:, None] & (jnp.arange(frames) == 0),
            keys=fold_in(fold_in(conditioning.keys, SOLVER_KEY), chunk),
        )


def _specs(
    params: Params, cache: KVCache, conditioning: VideoConditioning, inputs: ChunkInputs
) -> tuple[Any, Any, Any, Any]:
    """Partition specs of the inputs of a chunk over a mesh of devices."""
    constant: dict[str, Any] = {
        "solver": REPLICATED,
        "keys": VIDEOS,
        "conditioning_frame": VIDEOS,
        "has_conditioning_frame": VIDEOS,
        "guidance": None if conditioning.guidance is None else REPLICATED,
    }
    changing: dict[str, Any] = {
        "text": LAYERS_VIDEOS,
        "cut": VIDEOS,
        "shot_rope_offset": VIDEOS,
        "noise": None if inputs.noise is None else VIDEOS,
    }
    return (
        REPLICATED, cache_specs(cache), VideoConditioning(**constant), ChunkInputs(**changing)
    )  # fmt: skip


def stack_chunk_inputs(inputs: Iterable[ChunkInputs]) -> ChunkInputs:
    """Stacks the inputs of chunks, with indices for text, for the scan of `Sampler.sample`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *inputs)
