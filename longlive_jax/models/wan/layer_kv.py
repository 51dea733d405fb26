"""Cached keys and values of one layer, and attention over them and a call's own.

A layer's cache attends for itself, because a packed one may be read by a kernel of its own. Own and
cached keys are attended one after the other and merged by their log-sum-exp: joining them would
copy the cache in every call. The call's own keys and values come dense or packed: an exchange
between devices (sequence parallelism) can stand between `SelfAttention.compute_kv` and `attend` and
send 4.5 bits per value.
"""

import dataclasses
from typing import Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from longlive_jax.models.wan.packed_cache import KVFormat, PackedTensor
from longlive_jax.models.wan.positions import apply_rope
from longlive_jax.typing import Array, Float
from pallas_kernels.attention import AttentionFn
from pallas_kernels.attention.packed_kv import attention_packed
from pallas_kernels.attention.parts import attend_parts, with_lse
from pallas_kernels.tokens import VISIBILITY_COLUMNS, Tokens

KV = tuple[Array, Array]
"""Keys and values of one layer, each `[b, l, n, d]`."""

PackedKV = tuple[PackedTensor, PackedTensor]
"""The same in NVFP4, as `pack_keys` and `pack_values` give them."""


@flax.struct.dataclass
class AttentionContext:
    """What self-attention needs beside activations; the same in every layer.

    Attributes:
      q_tokens: metadata of the queries.
      k_tokens: metadata of the keys: own ones, then cached ones.
      q_rotation: cosines and sines of the queries' rotary angles.
      k_rotation: those of the keys that are rotated at attention time: all keys if positions are
        relative, else the call's own keys only.
      relative: whether positions are relative to the window, so that the cache holds unrotated
        keys.
    """

    q_tokens: Tokens
    k_tokens: Tokens
    q_rotation: KV
    k_rotation: KV
    relative: bool = flax.struct.field(pytree_node=False, default=False)

    def rotate_keys(self, k: Array) -> Array:
        """All keys with their rotation: unchanged unless positions are relative."""
        return apply_rope(k, self.k_rotation) if self.relative else k

    def split(self, own: int) -> tuple["AttentionContext", "AttentionContext"]:
        """The context of the `own` first keys alone, and that of the cached ones."""
        return self._of_keys(slice(0, own)), self._of_keys(slice(own, None))

    def _of_keys(self, keys: slice) -> "AttentionContext":
        tokens = self.k_tokens
        pos = tokens.pos[..., keys, :]
        columns = {name: getattr(tokens, name)[..., keys] for name in VISIBILITY_COLUMNS}
        rotation = self.k_rotation
        if self.relative:
            rotation = jax.tree.map(lambda x: x[..., keys, :], rotation)
        tokens = dataclasses.replace(tokens, pos=pos, **columns)
        return dataclasses.replace(self, k_tokens=tokens, k_rotation=rotation)


class LayerKV(Protocol):
    """Cached keys and values of one layer: a pytree."""

    def attend(
        self, q: Array, own: KV | PackedKV, context: AttentionContext, attend: AttentionFn, /
    ) -> Array:
        """Attention `[b, l, n, d]` of rotated queries to `own` keys, then cached ones.

        `own` keys and values are those of `SelfAttention.compute_kv`, dense or packed.
        """


@flax.struct.dataclass
class DenseLayerKV:
    """Cached keys and values as arrays."""

    k: Float[Array, "b slots m n d"]
    v: Float[Array, "b slots m n d"]

    def attend(
        self, q: Array, own: KV | PackedKV, context: AttentionContext, attend: AttentionFn
    ) -> Array:
        """See `LayerKV`."""
        cached = join_slots(self.k), join_slots(self.v)
        return _attend(q, dense_kv(own, q.dtype), cached, context, attend)


@flax.struct.dataclass
class PackedLayerKV:
    """Cached keys and values in NVFP4, `[b, slots, m, n, d]`.

    Attributes:
      k: packed keys.
      v: packed values.
      form: how they are packed, and what reads them.
    """

    k: PackedTensor
    v: PackedTensor
    form: KVFormat = flax.struct.field(pytree_node=False)

    def attend(
        self, q: Array, own: KV | PackedKV, context: AttentionContext, attend: AttentionFn
    ) -> Array:
        """See `LayerKV`.

        The Mosaic kernel reads rotated keys only; `CachePolicy` refuses it for relative positions.
        """
        own = dense_kv(own, q.dtype)
        if self.form.reader == "mosaic":
            return self._attend_packed(q, own, context)
        k, v = (join_slots(x.dequantize(own[0].dtype)) for x in (self.k, self.v))
        centered = self.form.smoothing == "reference"
        return _attend(q, own, (k, v), context, attend, centered=centered)

    def _attend_packed(self, q: Array, own: KV, context: AttentionContext) -> Array:
        """The kernel that reads packed slots; it takes own keys and values dense."""
        k, v = own
        if self.form.smoothing == "reference":
            k = without_mean(k)
        return attention_packed(
            q, k, v, self.k.array, self.v.array, context.q_tokens, context.k_tokens,
            offset=self.k.offset, implementation="mosaic",
        )  # fmt: skip


def dense_kv(own: KV | PackedKV, dtype: DTypeLike) -> KV:
    """A call's own keys and values as arrays: packed ones dequantized to `dtype`."""
    k, v = (x.dequantize(dtype) if isinstance(x, PackedTensor) else x for x in own)
    return k, v


def join_slots(x: Float[Array, "b slots m n d"]) -> Float[Array, "b k n d"]:
    """Keys or values of all slots, one slot after the other."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def without_mean(k: Array) -> Array:
    """Keys less their mean over the head's channels: "reference" treats own keys so."""
    return (k - k.astype(jnp.float32).mean(-1, keepdims=True)).astype(k.dtype)


def _attend(
    q: Array,
    own: KV,
    cached: KV,
    context: AttentionContext,
    attend: AttentionFn,
    *,
    centered: bool = False,
) -> Array:
    """Attention to own and cached keys; own ones lose their mean if `centered`."""
    # 1. Keys as they are attended.
    length = own[0].shape[1]
    mine, past = context.split(length)
    k, past_k = mine.rotate_keys(own[0]), past.rotate_keys(cached[0])
    k = without_mean(k) if centered else k
    # 2. A function without log-sum-exp needs one sequence of keys.
    run = with_lse(attend)
    if run is None:
        keys, values = (
            jnp.concatenate(pair, axis=1) for pair in ((k, past_k), (own[1], cached[1]))
        )
        return attend(q, keys, values, context.q_tokens, context.k_tokens)
    # 3. Otherwise each part where it is. Tokens of one chunk, all noisy or all clean, see each
    # other, so that their part needs no mask.
    tokens = (context.q_tokens, mine.k_tokens)
    own_tokens = (None, None) if context.q_tokens.uniform_mask else tokens
    parts = [(k, own[1], *own_tokens), (past_k, cached[1], context.q_tokens, past.k_tokens)]
    return attend_parts(run, q, parts)
