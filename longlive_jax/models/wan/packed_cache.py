"""Keys and values of a chunk in NVFP4: 4.5 bits per value (LongLive 2.0, section 3.2 and Eq. 6).

A finished chunk is packed once, layer by layer within the clean context pass: blocks of 16 along a
head, one `amax` per layer, sample, slot and tensor (keys or values). A slot is overwritten as a
whole, so packed data is never moved or packed again. The chunk being generated attends its own keys
and values without packing. Storage is bytes, because every backend updates bytes in place; `NVFP4`
is a view of them.

Smoothing. A key k_t of chunk c may be packed as k_t - m, with m stored in higher precision:

    q . k_t = q . (k_t - m_c) + q . m_c      channel_mean: m_c is the mean over the chunk's tokens
    q . k_t = q . (k_t - m_t 1) + m_t q . 1  token_mean: m_t is the mean over the head's channels

A softmax over the keys of a single chunk would not change if q . m_c were left out, since the term
is the same for all of them. But the softmax runs over all chunks in the window, and each has its
own mean: without the term, all keys of chunk c would be weighted by exp(-q . m_c / sqrt(d)). And
m_t differs from key to key. Both are therefore added back, and only the packed part changes:
outliers that all tokens share in a channel leave the blocks, which then get finer scales. This also
holds for keys that are stored unrotated, because the mean is added before the rotation.

"reference" is what LongLive 2.0 ships instead: keys are packed without smoothing, and the current
chunk's own, unpacked keys lose their mean over the head's channels at attention time, which is not
added back. It reproduces the release; it is not exact even without packing.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.typing import DTypeLike

from longlive_jax.spec import UserError
from longlive_jax.typing import Array, Float, UInt8
from pallas_kernels.nvfp4 import NVFP4, Rule, dequantize, quantize
from pallas_kernels.nvfp4.format import BLOCK, SCALE_DTYPE, pack, unpack
from pallas_kernels.nvfp4.reference import max_abs

Smoothing = Literal["none", "reference", "token_mean", "channel_mean"]
Storage = Literal["model", "nvfp4"]
Reader = Literal["auto", "mosaic"]


@dataclasses.dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored.

    Attributes:
      storage: the model's own dtype, or NVFP4.
      smoothing: what is subtracted from NVFP4 keys; the default has the lowest measured error
        (`bench.kv_quant`).
      rule: how NVFP4 block scales are chosen.
      reader: "auto" dequantizes one layer at a time and attends as without packing; "mosaic" is a
        kernel that reads packed slots.
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
        """Raises UserError if heads of this width do not split into NVFP4 blocks."""
        if self.packed and head_dim % BLOCK:
            raise UserError(
                f"kv=nvfp4 needs heads of a multiple of {BLOCK} channels, this model has heads of "
                f"{head_dim}; use kv=model"
            )


@struct.dataclass
class PackedTensor:
    """Keys or values in NVFP4.

    Attributes:
      codes: two 4-bit codes per byte.
      scales: the bytes of the E4M3 block scales.
      amax: largest magnitude per leading index.
      offset: the mean that was subtracted and is added back; None without smoothing.
      rule: how block scales were chosen.
    """

    codes: UInt8[Array, "*rows d/2"]
    scales: UInt8[Array, "*rows d/16"]
    amax: Float[Array, "*lead"]
    offset: Float[Array, "*lead #m n #d"] | None
    rule: Rule = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dequantized array."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def array(self) -> NVFP4:
        """The codes and scales as an array, without the offset."""
        scales = lax.bitcast_convert_type(self.scales, SCALE_DTYPE)
        return NVFP4(unpack(self.codes), scales, self.amax, self.rule)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*rows d"]:
        """The values with the offset added back, rounded once from float32 to `dtype`."""
        return dequantize(self.array, jnp.dtype(dtype), offset=self.offset)


def pack_keys(
    k: Float[Array, "*lead m n d"], form: KVFormat, *, axes: tuple[str, ...] = ()
) -> PackedTensor:
    """Keys of one chunk in NVFP4, smoothed as `form` says; one `amax` per leading index.

    `axes` are mesh axes over which the heads are divided, inside `shard_map`; `amax` is that of
    all heads.
    """
    offset = _mean(k, form.smoothing)
    if offset is not None:
        k = k.astype(jnp.float32) - offset.astype(jnp.float32)
    return _pack(k, offset, form, axes)


def pack_values(
    v: Float[Array, "*lead m n d"], form: KVFormat, *, axes: tuple[str, ...] = ()
) -> PackedTensor:
    """Values of one chunk in NVFP4; one `amax` per leading index. `axes`: see `pack_keys`."""
    return _pack(v, None, form, axes)


def empty_packed(shape: tuple[int, ...], form: KVFormat) -> tuple[PackedTensor, PackedTensor]:
    """Zero keys and values of `shape` [layers, b, slots, m, n, d]."""
    layers, b, slots, *chunk = shape
    dense = jax.ShapeDtypeStruct((layers, b, *chunk), jnp.float32)
    pair = jax.eval_shape(lambda x: (pack_keys(x, form), pack_values(x, form)), dense)
    return jax.tree.map(lambda x: jnp.zeros((layers, b, slots, *x.shape[2:]), x.dtype), pair)


def _mean(k: Array, smoothing: Smoothing) -> Array | None:
    """The mean to subtract, rounded to its stored precision first, so that nothing is lost."""
    axis = {"channel_mean": -3, "token_mean": -1}.get(smoothing)
    if axis is None:
        return None
    return k.astype(jnp.float32).mean(axis, keepdims=True).astype(jnp.bfloat16)


def _pack(x: Array, offset: Array | None, form: KVFormat, axes: tuple[str, ...]) -> PackedTensor:
    lead = x.ndim - 3
    amax = lax.pmax(max_abs(x, lead), axes) if axes else None
    array = quantize(x, rule=form.rule, lead=lead, amax=amax)
    scales = lax.bitcast_convert_type(array.scales, jnp.uint8)
    return PackedTensor(pack(array.codes), scales, array.amax, offset, form.rule)
