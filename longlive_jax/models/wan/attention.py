"""Self-attention over the video and its cache; cross-attention to one prompt per segment."""

from typing import Protocol, runtime_checkable

import flax.struct
from flax import nnx

from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.layer_kv import KV, AttentionContext, LayerKV
from longlive_jax.models.wan.layers import Linear, RMSNorm
from longlive_jax.models.wan.positions import apply_rope
from longlive_jax.typing import Array, Float
from pallas_kernels.attention import AttentionFn, attention
from pallas_kernels.tokens import Tokens


@runtime_checkable
class Cache(Protocol):
    """What the model reads from a key-value cache; see `models.wan.cache`."""

    @property
    def layer_kv(self) -> LayerKV:
        """Keys and values of all layers; the first axis of every leaf is the layer."""

    def tokens(self, queries: Tokens, /) -> Tokens:
        """Metadata of the cached keys, `[b, slots * m]` in slot order, for these queries."""


@flax.struct.dataclass
class TextKV:
    """Keys and values of prompts in every layer, computed once per prompt by `DiT.text_kv`.

    The frames of each stream are split into `s` equal segments, and segment i attends prompt i.

    Attributes:
      k: keys of all layers.
      v: values of all layers.
      streams: number of equal streams of frames; teacher forcing has two, clean and noisy.
    """

    k: Float[Array, "layers b s t n d"]
    v: Float[Array, "layers b s t n d"]
    streams: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def segments(self) -> int:
        """`s`, the number of prompts per sample."""
        return self.k.shape[2]


@flax.struct.dataclass
class EmbeddedText:
    """Prompts as `DiT.embed_text` embeds them; every layer computes its own keys and values.

    For training, which would otherwise keep the keys and values of all layers for the gradient.

    Attributes:
      features: prompts at the model's width.
      streams: number of equal streams of frames, as in `TextKV`.
    """

    features: Float[Array, "b s t e"]
    streams: int = flax.struct.field(pytree_node=False, default=1)

    @property
    def segments(self) -> int:
        """`s`, the number of prompts per sample."""
        return self.features.shape[1]


class Attention(nnx.Module):
    """The four linears and two norms common to self- and cross-attention."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.heads = cfg.heads
        self.q = Linear(cfg.dim, cfg.dim, cfg, rngs=rngs)
        self.k = Linear(cfg.dim, cfg.dim, cfg, rngs=rngs)
        self.v = Linear(cfg.dim, cfg.dim, cfg, rngs=rngs)
        self.o = Linear(cfg.dim, cfg.dim, cfg, rngs=rngs)
        self.norm_q, self.norm_k = RMSNorm(cfg), RMSNorm(cfg)

    def queries(self, x: Float[Array, "... l e"]) -> Float[Array, "... l n d"]:
        """Normalised queries, not yet rotated."""
        return self._split_heads(self.norm_q(self.q(x)))

    def keys_values(self, x: Float[Array, "... l e"]) -> KV:
        """Normalised keys, not yet rotated, and values."""
        return self._split_heads(self.norm_k(self.k(x))), self._split_heads(self.v(x))

    def out(self, y: Float[Array, "... l n d"]) -> Float[Array, "... l e"]:
        """Merges the heads and projects the result."""
        return self.o(y.reshape(*y.shape[:-2], -1))

    def _split_heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class SelfAttention(Attention):
    """Attention over own keys, then cached ones."""

    def __call__(
        self,
        x: Float[Array, "b l e"],
        context: AttentionContext,
        layer_kv: LayerKV | None,
        *,
        attend: AttentionFn,
    ) -> tuple[Float[Array, "b l e"], KV]:
        """Returns the output and this call's own (k, v), keys as a cache stores them."""
        k, v = own = self.compute_kv(x, context)
        q = apply_rope(self.queries(x), context.q_rotation)
        if layer_kv is None:
            y = attend(q, context.rotate_keys(k), v, context.q_tokens, context.k_tokens)
        else:
            y = layer_kv.attend(q, own, context, attend)
        return self.out(y), own

    def compute_kv(self, x: Float[Array, "b l e"], context: AttentionContext) -> KV:
        """The (k, v) of this call only: keys are rotated unless positions are relative."""
        k, v = self.keys_values(x)
        return (k if context.relative else apply_rope(k, context.k_rotation)), v


class CrossAttention(Attention):
    """Attention of each segment of frames to its own prompt, padding rows included."""

    def __call__(
        self,
        x: Float[Array, "b l e"],
        text_kv: KV,
        *,
        streams: int,
        attend: AttentionFn = attention,
    ) -> Array:
        """`text_kv` are the keys and values of one layer, each `[b, s, t, n, d]`."""
        k, v = text_kv
        b, segments, *rest = k.shape
        q = self.queries(x)
        length, (n, d) = q.shape[1], q.shape[-2:]
        # Streams become more queries of the same prompt: [b s, streams * l', n, d].
        q = q.reshape(b, streams, segments, -1, n, d).swapaxes(1, 2)
        q = q.reshape(b * segments, -1, n, d)
        k, v = (x.reshape(b * segments, *rest) for x in (k, v))
        y = attend(q, k, v)
        y = y.reshape(b, segments, streams, -1, n, d).swapaxes(1, 2)
        return self.out(y.reshape(b, length, n, d))
