"""Cached keys and values in NVFP4: 4.5 bits a number (LongLive 2.0, section 3.2 and Eq. 6).

A finished chunk is packed once, layer by layer in the pass that remembers it: blocks of 16 along a
head, one `amax` a layer, sample, slot, and keys or values. Slots are overwritten whole, so nothing
packed is ever moved or packed again. The chunk being made brings its own keys and values as they
are. Storage is bytes, because every backend updates bytes in place; `NVFP4` is a view of them.

Smoothing. A key k_t of chunk c may be packed as k_t - m and m kept in higher precision:

    q . k_t = q . (k_t - m_c) + q . m_c      channel_mean: m_c is the mean over the chunk's tokens
    q . k_t = q . (k_t - m_t 1) + m_t q . 1  token_mean: m_t is the mean over the head's channels

A softmax over the keys of one chunk alone would not notice if q . m_c were left out: it is the same
for all of them. But the softmax goes over all chunks that the window holds, and each has a mean of
its own; without the term chunk c as a whole would weigh exp(-q . m_c / sqrt(d)) times as much. And
m_t differs from key to key. So both are restored, and only what is subtracted changes: outliers
that all tokens share in a channel leave the blocks, which then get finer scales. It holds for keys
stored before their rotation too, since the mean is added before it.

"reference" is what LongLive 2.0 ships instead: keys are packed as they are, and the current
chunk's own, unpacked ones lose their mean over the head's channels at attention time, which is not
restored. It is there to reproduce that; it is not exact even without packing.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from longlive_jax.models.wan.attention import KV, AttentionContext
from longlive_jax.spec import UserError
from longlive_jax.typing import Array, Float, UInt8
from pallas_kernels.attention import AttentionFn
from pallas_kernels.attention.packed_kv import attention_packed, dequantize_kv
from pallas_kernels.nvfp4 import NVFP4, Rule, quantize
from pallas_kernels.nvfp4.format import BLOCK, SCALE, pack, unpack

Smoothing = Literal["none", "reference", "token_mean", "channel_mean"]
Storage = Literal["model", "nvfp4"]
Reader = Literal["auto", "mosaic"]


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored.

    Fields: `storage` in the model's own type or packed; and if packed, `smoothing` of keys, the
    `rule` of block scales, and the `reader`: "auto" unpacks one layer at a time and attends as
    without packing, "mosaic" is the kernel that reads what is packed. The default smoothing is the
    one that measured best (`bench.kv_quant`).
    """

    storage: Storage = "model"
    smoothing: Smoothing = "channel_mean"
    rule: Rule = "mse"
    reader: Reader = "auto"

    @property
    def packed(self) -> bool:
        """Whether keys and values are in NVFP4."""
        return self.storage == "nvfp4"

    def check(self, head_dim: int) -> None:
        """Raises UserError for heads that do not split into blocks."""
        if self.packed and head_dim % BLOCK:
            raise UserError(
                f"kv=nvfp4 needs heads of a multiple of {BLOCK} channels, this model has heads of "
                f"{head_dim}; use kv=model"
            )


@struct.dataclass
class Packed:
    """Numbers in NVFP4 as bytes, and what is to be added to them (None: nothing)."""

    codes: UInt8[Array, "*rows d/2"]
    scales: UInt8[Array, "*rows d/16"]
    amax: Float[Array, "*lead"]
    offset: Float[Array, "*lead #m n #d"] | None
    rule: Rule = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the numbers."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return math.prod(self.shape)

    @property
    def array(self) -> NVFP4:
        """The codes and scales as an array, without the offset."""
        scales = lax.bitcast_convert_type(self.scales, SCALE)
        return NVFP4(unpack(self.codes), scales, self.amax, self.rule)


def pack_keys(k: Float[Array, "*lead m n d"], form: KVFormat) -> Packed:
    """Keys of one chunk packed, smoothed as `form` says; an `amax` for each of the leading axes."""
    offset = _mean(k, form.smoothing)
    if offset is not None:
        k = k.astype(jnp.float32) - offset.astype(jnp.float32)
    return _pack(k, offset, form)


def pack_values(v: Float[Array, "*lead m n d"], form: KVFormat) -> Packed:
    """Values of one chunk packed; an `amax` for each of the leading axes."""
    return _pack(v, None, form)


def empty_packed(shape: tuple[int, ...], form: KVFormat) -> tuple[Packed, Packed]:
    """Keys and values of zero for `[layers, b, slots, m, n, d]`."""
    layers, b, slots, *chunk = shape
    one = jax.ShapeDtypeStruct((layers, b, *chunk), jnp.float32)
    pair = jax.eval_shape(lambda x: (pack_keys(x, form), pack_values(x, form)), one)
    return jax.tree.map(lambda x: jnp.zeros((layers, b, slots, *x.shape[2:]), x.dtype), pair)


def _mean(k: Array, smoothing: Smoothing) -> Array | None:
    """What is subtracted from keys, rounded before that to what is stored: nothing is lost."""
    axis = {"channel_mean": -3, "token_mean": -1}.get(smoothing)
    if axis is None:
        return None
    return k.astype(jnp.float32).mean(axis, keepdims=True).astype(jnp.bfloat16)


def _pack(x: Array, offset: Array | None, form: KVFormat) -> Packed:
    array = quantize(x, rule=form.rule, lead=x.ndim - 3)
    scales = lax.bitcast_convert_type(array.scales, jnp.uint8)
    return Packed(pack(array.codes), scales, array.amax, offset, form.rule)


@struct.dataclass
class PackedLayerKV:
    """Packed keys and values of past chunks, `[b, slots, m, n, d]` in one layer."""

    k: Packed
    v: Packed
    form: KVFormat = struct.field(pytree_node=False)

    def attend(self, q: Array, own: KV, seen: AttentionContext, attend: AttentionFn) -> Array:
        """Attention of rotated queries to `own` keys as they are and to the packed ones.

        The kernel takes rotated keys only, which `CachePolicy` sees to.
        """
        if self.form.reader == "mosaic":
            return self._read(q, own, seen)
        past = (dequantize_kv(x.array, x.offset, own[0].dtype) for x in (self.k, self.v))
        k, v = (jnp.concatenate(pair, axis=1) for pair in zip(own, past, strict=True))
        k = seen.rotate_keys(k)
        if self.form.smoothing == "reference":
            length = q.shape[1]
            k = jnp.concatenate([without_mean(k[:, :length]), k[:, length:]], axis=1)
        return attend(q, k, v, seen.q_tokens, seen.k_tokens)

    def _read(self, q: Array, own: KV, seen: AttentionContext) -> Array:
        k, v = own
        if self.form.smoothing == "reference":
            k = without_mean(k)
        return attention_packed(
            q, k, v, self.k.array, self.v.array, seen.q_tokens, seen.k_tokens,
            offset=self.k.offset, implementation="mosaic",
        )  # fmt: skip


def without_mean(k: Array) -> Array:
    """Keys less their mean over the head's channels, as "reference" has the current chunk's."""
    return (k - k.astype(jnp.float32).mean(-1, keepdims=True)).astype(k.dtype)
