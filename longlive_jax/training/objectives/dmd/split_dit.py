"""A DiT that is called with whole videos and computes its own part of them (Ulysses).

Inside `shard_map` every device of an sp group holds the same latents, which are small, and runs the
model on its own frames: those of a chunk that is sampled, or its own chunks of a video. Attention
exchanges tokens for heads, so a device caches all tokens of its own heads. Velocities are gathered.
With a clean context a device has clean and noisy frames of the same times (`parallel.balanced`).

Blocks are gathered one by one as they are used (`parallel.fsdp`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp
from jax import lax

from longlive_jax.models.wan.attention import Cache
from longlive_jax.models.wan.cache import CachePolicy, KVCache, empty_cache
from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.dit import DiT, EmbeddedText, TextKV, WriteLayer, attention_context
from longlive_jax.models.wan.layer_kv import KV, AttentionContext, LayerKV
from longlive_jax.models.wan.packed_cache import pack_keys, pack_values
from longlive_jax.parallel.fsdp import Gather
from longlive_jax.parallel.mesh import SP
from longlive_jax.parallel.ulysses import exchange
from longlive_jax.typing import Array, Float
from pallas_kernels.attention import AttentionFn
from pallas_kernels.tokens import VISIBILITY_COLUMNS, Tokens

__all__ = ["SplitDiT", "head_cache", "tokens_by_device"]


@dataclasses.dataclass(frozen=True)
class SplitDiT:
    """A DiT for use inside `shard_map`; it is called as one on a single device is.

    Attributes:
      dit: the model, whose blocks are shards.
      gather: all-gathers the parameters of a layer.
      count: size of the sp axis.
    """

    dit: DiT
    gather: Gather
    count: int

    @property
    def cfg(self) -> DiTConfig:
        """The model's sizes."""
        return self.dit.cfg

    def text_kv(self, text_features: Float[Array, "b s t e"]) -> TextKV:
        """See `DiT.text_kv`."""
        return self.dit.text_kv(text_features, materialize=self.gather)

    def embed_text(
        self, text_features: Float[Array, "b s t e"], *, streams: int = 1
    ) -> EmbeddedText:
        """See `DiT.embed_text`."""
        return self.dit.embed_text(text_features, streams=streams)

    def __call__(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, "b f"],
        text: TextKV | EmbeddedText,
        tokens: Tokens,
        cache: Cache | None = None,
        *,
        attend: AttentionFn,
        noisy_from: int = 0,
        **options: Any,
    ) -> tuple[Float[Array, "b f2 h w c2"], None]:
        """See `DiT.__call__`.

        `attend` gets the tokens of all devices, stream by stream (`tokens_by_device`).
        """
        inputs, attend = self._own(latents, timestep, text, tokens, cache, attend)
        velocity, _ = self.dit(
            *inputs,
            attend=attend,
            noisy_from=noisy_from // self.count,
            materialize=self.gather,
            **options,
        )
        return lax.all_gather(velocity, SP, axis=1, tiled=True), None

    def write_kv(
        self,
        latents: Float[Array, "b f h w c"],
        timestep: Float[Array, "b f"],
        text: TextKV,
        tokens: Tokens,
        cache: Cache,
        write: WriteLayer,
        *,
        attend: AttentionFn,
    ) -> LayerKV:
        """See `DiT.write_kv`; `write` gets all tokens of a device's own heads."""

        def exchanged(stored: Any, layer: Any, k: Array, v: Array) -> Any:
            k, v = (exchange(x, split=2, concat=1) for x in (k, v))
            return ExchangedLayerKV(write(stored.layer_kv, layer, k, v))

        inputs, attend = self._own(latents, timestep, text, tokens, cache, attend)
        options: Any = {"attend": attend, "materialize": self.gather}
        stored: Any = self.dit.write_kv(*inputs, exchanged, **options)
        return stored.layer_kv

    def _own(
        self,
        latents: Array,
        timestep: Array,
        text: TextKV | EmbeddedText,
        tokens: Tokens,
        cache: Cache | None,
        attend: AttentionFn,
    ) -> tuple[tuple[Array, Array, Any, Tokens, Any], "ExchangedAttention"]:
        """The arguments of a device's own frames, and attention over those of all devices."""
        streams = text.streams

        def own(x: Array, axis: int = 1, streams: int = streams) -> Array:
            size = x.shape[axis] // self.count
            ordered = jnp.asarray(by_device(x, self.count, streams, axis=axis))
            return lax.dynamic_slice_in_dim(ordered, lax.axis_index(SP) * size, size, axis)

        if text.segments > 1:
            assert isinstance(text, EmbeddedText)
            text = dataclasses.replace(text, features=own(text.features, streams=1))
        ordered = tokens_by_device(tokens, self.count, streams)
        context = attention_context(ordered, cache, self.cfg, False)
        exchanged = None if cache is None else ExchangedCache(cache)
        inputs = (own(latents), own(timestep), text, _map_columns(own, tokens), exchanged)
        return inputs, ExchangedAttention(attend, context)


@dataclasses.dataclass(frozen=True, eq=False)
class ExchangedAttention:
    """Attention over the tokens of all devices, from a device's own ones and all heads.

    Attributes:
      attend: attention over all tokens.
      context: metadata of all tokens, in the order of the devices, and of cached ones.
    """

    attend: AttentionFn
    context: AttentionContext

    def __call__(self, q: Array, k: Array, v: Array, *_own: Tokens) -> Array:
        """Attention without a cache."""
        q, k, v = (exchange(x, split=2, concat=1) for x in (q, k, v))
        out = self.attend(q, k, v, self.context.q_tokens, self.context.k_tokens)
        return exchange(out, split=1, concat=2)

    def cached(self, layer_kv: LayerKV, q: Array, own: KV) -> Array:
        """Attention to own keys, then those of a layer's cache."""
        q, k, v = (exchange(x, split=2, concat=1) for x in (q, *own))
        out = layer_kv.attend(q, (k, v), self.context, self.attend)
        return exchange(out, split=1, concat=2)


@flax.struct.dataclass
class ExchangedLayerKV:
    """A layer's cache of all tokens of a device's own heads.

    Attributes:
      layer_kv: the cache.
    """

    layer_kv: Any

    def attend(self, q: Array, own: Any, _context: AttentionContext, attend: Any, /) -> Array:
        """See `LayerKV`; `attend` is an `ExchangedAttention`."""
        assert isinstance(attend, ExchangedAttention)
        return attend.cached(self.layer_kv, q, own)


@dataclasses.dataclass(frozen=True)
class ExchangedCache:
    """A cache of a device's own heads as the model reads it.

    Attributes:
      cache: the cache.
    """

    cache: Cache

    @property
    def layer_kv(self) -> LayerKV:
        """See `Cache`."""
        return ExchangedLayerKV(self.cache.layer_kv)

    def tokens(self, queries: Tokens, /) -> Tokens:
        """See `Cache`."""
        return self.cache.tokens(queries)


@flax.struct.dataclass
class HeadCache(KVCache):
    """A cache of a device's own heads: in NVFP4 it is that of all heads, divided."""

    def pack(self, k: Array, v: Array) -> tuple[Any, Any]:
        """See `KVCache.pack`."""
        form = self.policy.format
        if not form.packed:
            return super().pack(k, v)
        return pack_keys(k, form, axes=(SP,)), pack_values(v, form, axes=(SP,))


def head_cache(
    cfg: DiTConfig, batch: int, size: tuple[int, int, int], policy: CachePolicy, *, count: int
) -> HeadCache:
    """`empty_cache` of a device's own heads, `1 / count` of them."""
    own = dataclasses.replace(cfg, heads=cfg.heads // count, dim=cfg.dim // count)
    cache = empty_cache(own, batch, size, policy)
    return HeadCache(**{f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)})


def tokens_by_device(tokens: Tokens, count: int, streams: int) -> Tokens:
    """Tokens of `streams` equal streams as `count` devices have them, a part of each stream.

    Columns that are NumPy arrays stay so, and with them a mask that is known when tracing.
    """
    return _map_columns(lambda x, axis: by_device(x, count, streams, axis=axis), tokens)


def by_device(x: Any, count: int, streams: int, *, axis: int) -> Any:
    """Streams along `axis`, reordered: the first device's part of each stream, and so on."""
    if streams == 1:
        return x
    axis %= x.ndim
    parts = x.reshape(*x.shape[:axis], streams, count, -1, *x.shape[axis + 1 :])
    return parts.swapaxes(axis, axis + 1).reshape(x.shape)


def _map_columns(function: Callable[[Any, int], Any], tokens: Tokens) -> Tokens:
    """Tokens with `function(column, token axis)` of every column."""
    columns = {name: function(getattr(tokens, name), -1) for name in VISIBILITY_COLUMNS}
    return dataclasses.replace(tokens, pos=function(tokens.pos, -2), **columns)
