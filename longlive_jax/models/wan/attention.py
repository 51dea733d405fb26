"""Self-attention over the video and a cache, and cross-attention to one prompt a segment."""

from typing import Protocol, runtime_checkable

import flax.struct
import jax.numpy as jnp
from flax import nnx

from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.layers import Linear, RMSNorm
from longlive_jax.models.wan.positions import rotate
from longlive_jax.typing import Array, Float
from pallas_kernels.attention import AttentionFn, attention
from pallas_kernels.tokens import Tokens

KV = tuple[Array, Array]
"""Keys and values of one layer, each `[b, l, n, d]`."""


class LayerKV(Protocol):
    """Cached keys and values of one layer: a pytree."""

    def attend(self, q: Array, own: KV, seen: "AttentionContext", attend: AttentionFn, /) -> Array:
        """Attention `[b, l, n, d]` of rotated queries to `own` keys and, after them, cached ones.

        `own` keys are as `SelfAttention.compute_kv` gives them.
        """


@flax.struct.dataclass
class DenseLayerKV:
    """Cached keys and values as arrays."""

    k: Float[Array, "b slots m n d"]
    v: Float[Array, "b slots m n d"]

    def attend(self, q: Array, own: KV, seen: "AttentionContext", attend: AttentionFn) -> Array:
        """See `LayerKV`."""
        past = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (self.k, self.v))
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, past, strict=True))
        return attend(q, seen.rotate_keys(k), v, seen.q_tokens, seen.k_tokens)


@runtime_checkable
class Cache(Protocol):
    """What the model reads of a key-value cache; see `models.wan.cache`."""

    @property
    def past(self) -> LayerKV:
        """Keys and values of all layers; every leaf begins with an axis of layers."""

    def tokens(self, queries: Tokens, /) -> Tokens:
        """What the cached keys are, `[b, slots * m]` in slot order, for a chunk of these tokens."""


@flax.struct.dataclass
class TextKV:
    """Keys and values of prompts in every layer, made once a prompt by `DiT.text_kv`.

    The frames of each of `streams` equal streams are split into `s` equal segments, and segment i
    attends prompt i. Teacher forcing has two streams, clean and noisy.
    """

    k: Float[Array, "layers b s t n d"]
    v: Float[Array, "layers b s t n d"]
    streams: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def segments(self) -> int:
        """`s`."""
        return self.k.shape[2]


@flax.struct.dataclass
class TextRows:
    """The prompts of a `TextKV` before that, as `DiT.text_rows` embeds them: every layer makes its
    own keys and values. For training, where those of all layers would be kept for the gradient.
    """

    rows: Float[Array, "b s t e"]
    streams: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def segments(self) -> int:
        """`s`."""
        return self.rows.shape[1]


class Attention(nnx.Module):
    """The four linears and two norms that self- and cross-attention share."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.heads = cfg.heads
        self.q = Linear(cfg.dim, cfg.dim, cfg, rngs=rngs)
        self.k = Linear(cfg.dim, cfg.dim, cfg, rngs=rngs)
        self.v = Linear(cfg.dim, cfg.dim, cfg, rngs=rngs)
        self.o = Linear(cfg.dim, cfg.dim, cfg, rngs=rngs)
        self.norm_q, self.norm_k = RMSNorm(cfg), RMSNorm(cfg)

    def queries(self, x: Float[Array, "... l e"]) -> Float[Array, "... l n d"]:
        """Normalised queries, not yet rotated."""
        return self._split(self.norm_q(self.q(x)))

    def keys_values(self, x: Float[Array, "... l e"]) -> KV:
        """Normalised keys, not yet rotated, and values."""
        return self._split(self.norm_k(self.k(x))), self._split(self.v(x))

    def out(self, y: Float[Array, "... l n d"]) -> Float[Array, "... l e"]:
        """Heads joined and projected."""
        return self.o(y.reshape(*y.shape[:-2], -1))

    def _split(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


@flax.struct.dataclass
class AttentionContext:
    """What self-attention needs beside activations, the same in every layer."""

    q_tokens: Tokens
    k_tokens: Tokens
    q_rotation: KV
    k_rotation: KV
    """Of the keys to be rotated: own ones only if the cache holds rotated keys."""
    relative: bool = flax.struct.field(pytree_node=False, default=False)

    def rotate_keys(self, k: Array) -> Array:
        """All keys, rotated if they are not yet."""
        return rotate(k, self.k_rotation) if self.relative else k


class SelfAttention(Attention):
    """Attention over own keys and, after them, cached ones."""

    def __call__(
        self,
        x: Float[Array, "b l e"],
        seen: AttentionContext,
        past: LayerKV | None,
        *,
        attend: AttentionFn,
    ) -> tuple[Float[Array, "b l e"], KV]:
        """Returns the output and this call's own (k, v), keys as a cache should hold them."""
        k, v = own = self.compute_kv(x, seen)
        q = rotate(self.queries(x), seen.q_rotation)
        if past is None:
            y = attend(q, seen.rotate_keys(k), v, seen.q_tokens, seen.k_tokens)
        else:
            y = past.attend(q, own, seen, attend)
        return self.out(y), own

    def compute_kv(self, x: Float[Array, "b l e"], seen: AttentionContext) -> KV:
        """Only the (k, v) of this call: rotated, or raw if positions are relative to the window."""
        k, v = self.keys_values(x)
        return (k if seen.relative else rotate(k, seen.k_rotation)), v


class CrossAttention(Attention):
    """Attention of each segment of frames to its own prompt; padding rows of a prompt count."""

    def __call__(
        self, x: Float[Array, "b l e"], text: KV, *, streams: int, attend: AttentionFn = attention
    ) -> Array:
        k, v = text
        b, segments, *rest = k.shape
        q = self.queries(x)
        length, (n, d) = q.shape[1], q.shape[-2:]
        # Streams are batched as more queries of the same prompt: [b s, streams * l', n, d].
        q = q.reshape(b, streams, segments, -1, n, d).swapaxes(1, 2)
        q = q.reshape(b * segments, -1, n, d)
        k, v = (x.reshape(b * segments, *rest) for x in (k, v))
        y = attend(q, k, v)
        y = y.reshape(b, segments, streams, -1, n, d).swapaxes(1, 2)
        return self.out(y.reshape(b, length, n, d))
