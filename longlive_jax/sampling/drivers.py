"""Two drivers of `sample_chunk`: `sample`, one scan over all chunks, and `stream`, one at a time.

Both draw the same noise and give the same latents bit for bit. Neither waits for the device: a
stream hands out arrays that may still be under way, and the cache never leaves the device.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import lax

from longlive_jax.diffusion.solvers import Solver
from longlive_jax.models.params import with_params
from longlive_jax.models.wan.cache import KVCache
from longlive_jax.models.wan.dit import DiT, TextKV
from longlive_jax.sampling.chunk import (
    ChunkRequest,
    chunk_noise,
    folded,
    sample_chunk,
    write_context,
)
from longlive_jax.typing import Array, Bool, Float, Int, Key, Params
from pallas_kernels.attention import AttentionFn, attention

SOLVER_DRAWS = 2**31 - 1
"""No chunk has this number, so what a solver draws is apart from what any chunk begins from."""


@struct.dataclass
class ChunkInputs:
    """What one chunk shall be, small enough to make on the host between two chunks.

    Fields: `text`, the prompts' keys and values (`stream`) or their places in a bank of prompts
    (`sample`), with guidance the b prompts and then the b negative ones; `cut`, `shot_rope_offset`
    as in `ChunkRequest`; `noise` overrides the noise drawn from the keys, where given.
    """

    text: TextKV | Int[Array | np.ndarray, "b"]
    cut: Bool[Array | np.ndarray, "b"]
    shot_rope_offset: Int[Array | np.ndarray, "b"]
    noise: Float[Array, "b f h w c"] | None = None


@struct.dataclass
class VideoConditioning:
    """What stays the same for a whole video.

    Fields: `solver` (its length is the number of steps); `keys`, one a sample; `first` latents and
    whether they are `given`: where so, frame 0 of chunk 0 is held at them (image to video);
    `guidance` scale or None.
    """

    solver: Solver
    keys: Key[Array, "b"]
    first: Float[Array, "b h w c"]
    given: Bool[Array | np.ndarray, "b"]
    guidance: Float[Array, ""] | float | None = None


class Sampler:
    """The jitted drivers of one DiT structure; parameters are arguments.

    Every method compiles once: for all chunks, prompts, cuts, seeds, and with or without a given
    first frame. Caches passed in are donated and must not be used again. `dit` makes the module
    of parameters.
    """

    def __init__(self, graphdef: nnx.GraphDef[DiT], *, attend: AttentionFn = attention):
        self.dit = functools.partial(with_params, graphdef)
        self._attend = attend
        self.step = jax.jit(self._step, donate_argnums=1)
        self.write_context = jax.jit(self._write_context, donate_argnums=1)
        self.text = jax.jit(self._text)
        self._sample = jax.jit(self._scan, donate_argnums=1)

    def sample(
        self,
        params: Params,
        cache: KVCache,
        setting: VideoConditioning,
        orders: ChunkInputs,
        bank: TextKV,
    ) -> tuple[Float[Array, "b f h w c"], KVCache]:
        """Latents of all chunks by one scan, and the cache after them.

        `orders` has a leading axis of chunks; its text are indices into the prompt axis of `bank`
        (`[layers, p, 1, t, n, d]`).
        """
        return self._sample(params, cache, setting, orders, bank)

    def stream(
        self,
        params: Params,
        cache: KVCache,
        setting: VideoConditioning,
        orders: Iterable[ChunkInputs],
    ) -> Iterator[Float[Array, "b f h w c"]]:
        """Yields the latents of one chunk for each order, in constant memory, however long.

        An order is taken when the chunk before it has been handed out, so `orders` may be a
        generator that decides about the next prompt or cut at the last moment.
        """
        for order in orders:
            latents, cache = self.step(params, cache, setting, order)
            yield latents

    def _step(self, params: Params, cache: KVCache, setting: VideoConditioning, order: ChunkInputs):
        request = self._request(cache, setting, order)
        return sample_chunk(
            self.dit(params), cache, request, setting.solver,
            guidance=setting.guidance, attend=self._attend,
        )  # fmt: skip

    def _scan(
        self, params, cache: KVCache, setting: VideoConditioning, orders: ChunkInputs, bank: TextKV
    ):
        def body(cache: KVCache, order: ChunkInputs):
            index = cast(Array, order.text)
            text = jax.tree.map(lambda x: jnp.take(x, index, axis=1), bank)
            order = dataclasses.replace(order, text=text)
            # Apart from the loop round it, so that it is compiled as the single step is.
            inputs = lax.optimization_barrier((params, cache, setting, order))
            latents, cache = lax.optimization_barrier(self._step(*inputs))
            return cache, latents

        cache, latents = lax.scan(body, cache, orders)
        latents = jnp.moveaxis(latents, 0, 1)
        return latents.reshape(latents.shape[0], -1, *latents.shape[3:]), cache

    def _write_context(
        self,
        params: Params,
        cache: KVCache,
        setting: VideoConditioning,
        order: ChunkInputs,
        latents: Array,
    ) -> KVCache:
        """The cache after a given chunk of latents, of the video to be continued."""
        request = self._request(cache, setting, order)
        return write_context(
            self.dit(params), cache, latents, request,
            guidance=setting.guidance, attend=self._attend,
        )  # fmt: skip

    def _text(self, params: Params, embedding: Float[Array, "b t e"]) -> TextKV:
        """Keys and values of prompts, one a sample, for `ChunkInputs.text` or as a bank."""
        return self.dit(params).text_kv(embedding[:, None])

    def _request(
        self, cache: KVCache, setting: VideoConditioning, order: ChunkInputs
    ) -> ChunkRequest:
        batch, *space = setting.first.shape
        frames, chunk = cache.size[0], cache.num_chunks[:batch]
        noise = order.noise
        if noise is None:
            noise = chunk_noise(setting.keys, chunk, (frames, *space))
        held = jnp.asarray(setting.given) & (chunk == 0)
        return ChunkRequest(
            noise=noise,
            text=cast(TextKV, order.text),
            cut=jnp.asarray(order.cut),
            shot_rope_offset=jnp.asarray(order.shot_rope_offset),
            clamp=jnp.broadcast_to(setting.first[:, None], noise.shape),
            clamped=held[:, None] & (jnp.arange(frames) == 0),
            keys=folded(folded(setting.keys, SOLVER_DRAWS), chunk),
        )


def stack_chunk_inputs(orders: Iterable[ChunkInputs]) -> ChunkInputs:
    """Orders with indices for text as the one stacked order that `Sampler.sample` scans."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *orders)
