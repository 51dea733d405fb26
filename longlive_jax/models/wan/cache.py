"""The key-value cache: slots of one chunk each, and the rule for which slot is overwritten.

A window of W chunks is the chunk being generated, which brings its own keys, and W - 1 slots. A
finished chunk takes the first empty slot. If there is none, it takes the slot of the oldest chunk
that is neither a global sink (one of the first chunks of the video) nor the shot sink (the first
chunk of the current shot). Attention is invariant to the order of the keys, so slots are never
moved: a cut only re-points two scalars per sample, the start and length of the shot sink, when the
cut chunk is written. While the cut chunk itself is denoised, the sink of the previous shot is still
in use. (LongLive 2.0, section 3.2; the reference keeps the same sets by shifting its buffer.)

Keys carry the rotation of their absolute position, or none if positions are relative to the window.
Everything that differs between samples (the chunk in each slot, the start of the shot) is an array,
so the samples of a batch may cut at different times.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.typing import DTypeLike

from longlive_jax.models.per_layer import PerLayer, is_per_layer, is_unstacked, take_layer
from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.layer_kv import DenseLayerKV, LayerKV, PackedLayerKV
from longlive_jax.models.wan.packed_cache import KVFormat, empty_packed, pack_keys, pack_values
from longlive_jax.spec import UserError
from longlive_jax.typing import Array, Bool, Float, Int, Shaped
from pallas_kernels.tokens import EMPTY, Tokens, make


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """Which chunks the cache keeps. Static: each policy compiles once.

    Attributes:
      window: chunks in the attention window, the current one included.
      global_sinks: number of first chunks of the video that are never evicted.
      shot_sinks: whether the first chunk of the current shot is kept.
      clean_recache: whether writing a cut chunk evicts all but the global sinks.
      relative_rope: whether temporal positions are counted from the start of the window.
      format: how keys and values are stored.
    """

    window: int = 4
    global_sinks: int = 1
    shot_sinks: bool = True
    clean_recache: bool = False
    relative_rope: bool = False
    format: KVFormat = dataclasses.field(default_factory=KVFormat)

    def __post_init__(self) -> None:
        least = 1 + max(1, self.global_sinks + self.shot_sinks)
        if self.global_sinks < 0 or self.window < least:
            raise ValueError(
                f"window must be >= {least} chunks for {self.global_sinks} global sinks, "
                f"{int(self.shot_sinks)} shot sinks and the current chunk, got {self.window}"
            )
        if self.relative_rope and self.format.packed and self.format.reader == "mosaic":
            raise UserError(
                "kv_reader=mosaic reads rotated keys, and relative_rope stores unrotated ones; use "
                "kv_reader=auto"
            )

    @property
    def slots(self) -> int:
        """Number of stored chunks."""
        return self.window - 1

    @property
    def may_drop(self) -> bool:
        """Whether sinks can fill every slot, so that a finished chunk is not stored."""
        return self.slots <= self.global_sinks + self.shot_sinks


@struct.dataclass
class KVCache:
    """Keys and values of past chunks, and their bookkeeping.

    Attributes:
      k: keys `[layers, b, slots, m, n, d]`: an array, or a `PackedTensor` in NVFP4. Each array is a
        stack, or a `PerLayer`.
      v: values, stored as the keys are.
      slot_chunk: index of the chunk in each slot; -1 in an empty slot.
      start: temporal position of the first frame of each slot's chunk.
      sink_start: index of the chunk that is the shot sink.
      sink_length: length of the shot sink in chunks.
      num_chunks: chunks written so far, which is the index of the next one.
      size: (frames, rows, columns) of a chunk in tokens.
      policy: which chunks are kept.
    """

    k: Any
    v: Any
    slot_chunk: Int[Array, "b slots"]
    start: Int[Array, "b slots"]
    sink_start: Int[Array, "b"]
    sink_length: Int[Array, "b"]
    num_chunks: Int[Array, "b"]
    size: tuple[int, int, int] = struct.field(pytree_node=False)
    policy: CachePolicy = struct.field(pytree_node=False)

    @property
    def layer_kv(self) -> LayerKV:
        """Keys and values for the model to attend; the first axis of every leaf is the layer."""
        if self.policy.format.packed:
            return PackedLayerKV(self.k, self.v, self.policy.format)
        return DenseLayerKV(self.k, self.v)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the device."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((self.k, self.v)))

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token and sample, over all layers."""
        _, b, slots, tokens, _, _ = self.k.shape
        return self.nbytes / (b * slots * tokens)

    @property
    def compression(self) -> float:
        """Size in bfloat16 divided by the actual size."""
        return 2 * (self.k.size + self.v.size) / self.nbytes

    def tokens(self, queries: Tokens | None = None, /) -> Tokens:
        """Metadata of the cached keys, `[b, slots * m]` in slot order; empty slots are masked.

        Slots are filled in order and emptied only behind the global sinks, which fill the first
        ones, so that empty slots come last (`Tokens.leading`).
        """
        start = self._ordered() if self.policy.relative_rope else self.start
        pos = start[..., None, None] * _FRAME + _grid(self.size)
        chunk = jnp.repeat(self.slot_chunk, _volume(self.size), axis=-1)
        return make(pos.reshape(*chunk.shape, 3), chunk, False, leading=True)

    def upcoming(self, shot_rope_offset: Int[Array, "b"] | int = 0, *, noisy: bool) -> Tokens:
        """Metadata of the next chunk's tokens, `[b, m]`; `noisy` unless in the context pass.

        `shot_rope_offset` latent frames are added to its absolute temporal positions; positions
        relative to the window ignore it.
        """
        pos = self._next_start(shot_rope_offset)[:, None, None] * _FRAME + _grid(self.size)
        chunk = jnp.broadcast_to(self.num_chunks[:, None], pos.shape[:-1])
        return make(pos, chunk, noisy, uniform_mask=True)

    def before_write(self, cut: Bool[Array, "b"]) -> "KVCache":
        """The cache that the context pass over the next chunk attends; `cut` begins a shot.

        Differs from the cache itself under `clean_recache` only.
        """
        if not self.policy.clean_recache:
            return self
        evicted = cut[:, None] & (self.slot_chunk >= self.policy.global_sinks)
        return dataclasses.replace(self, slot_chunk=jnp.where(evicted, EMPTY, self.slot_chunk))

    def pack(
        self, k: Float[Array, "*layers b m n d"], v: Float[Array, "*layers b m n d"]
    ) -> tuple[Any, Any]:
        """Keys and values of a chunk in their stored form, for one layer or all of them."""
        form = self.policy.format
        if form.packed:
            return pack_keys(k, form), pack_values(v, form)
        return k.astype(self.k.dtype), v.astype(self.v.dtype)

    def write(
        self,
        k: Float[Array, "layers b m n d"],
        v: Float[Array, "layers b m n d"],
        *,
        cut: Bool[Array, "b"],
        shot_rope_offset: Int[Array, "b"] | int = 0,
    ) -> "KVCache":
        """Packs the finished next chunk and inserts it; see `insert`."""
        return self.insert(self.pack(k, v), cut=cut, shot_rope_offset=shot_rope_offset)

    def insert(
        self,
        packed: tuple[Any, Any],
        *,
        cut: Bool[Array, "b"],
        shot_rope_offset: Int[Array, "b"] | int = 0,
    ) -> "KVCache":
        """Stores the finished next chunk; the first chunk of a shot becomes the shot sink.

        `packed` are keys and values of all layers from `pack`. The update is in place when the
        cache is donated. If sinks fill every slot, the chunk is not stored.
        """
        cache, slot = self.reserve(cut=cut, shot_rope_offset=shot_rope_offset)
        layers, stored = range(self.k.shape[0]), cache.layer_kv
        if is_unstacked(stored):
            for i in layers:
                chunk = take_layer(packed, i)
                stored = insert_layer(stored, chunk, i, slot, may_drop=self.policy.may_drop)
            return cache.with_layer_kv(stored)
        k, v = jax.tree.map(lambda x, new: insert_slot(x, new, slot), (self.k, self.v), packed)
        return dataclasses.replace(cache, k=k, v=v)

    def reserve(
        self, *, cut: Bool[Array, "b"], shot_rope_offset: Int[Array, "b"] | int = 0
    ) -> tuple["KVCache", Int[Array, "b"]]:
        """The cache after `insert` except for keys and values, and the slot that they belong in.

        The slot is `slots` in samples that do not store the chunk.
        """
        # 1. A cut moves the shot sink, which may free a slot.
        cache = self.set_shot_sink(cut | (self.num_chunks == 0))
        slot = cache.free_slot()
        # 2. Bookkeeping of that slot.
        is_written = jnp.arange(self.slot_chunk.shape[1]) == slot[:, None]
        start = self._next_start(shot_rope_offset)[:, None]
        cache = dataclasses.replace(
            cache,
            slot_chunk=jnp.where(is_written, self.num_chunks[:, None], self.slot_chunk),
            start=jnp.where(is_written, start, self.start),
            num_chunks=self.num_chunks + 1,
        )
        return cache, slot

    def with_layer_kv(self, stored: LayerKV) -> "KVCache":
        """The cache with the keys and values of `stored`, which is like `layer_kv`."""
        assert isinstance(stored, DenseLayerKV | PackedLayerKV)
        return dataclasses.replace(self, k=stored.k, v=stored.v)

    def set_shot_sink(self, cut: Bool[Array, "b"]) -> "KVCache":
        """Points the shot sink at the next chunk where `cut`, which releases the previous sink."""
        if not self.policy.shot_sinks:
            return self
        return dataclasses.replace(
            self,
            sink_start=jnp.where(cut, self.num_chunks, self.sink_start),
            sink_length=jnp.where(cut, 1, self.sink_length),
        )

    def free_slot(self) -> Int[Array, "b"]:
        """Index of the slot to overwrite per sample; `slots` if sinks protect all of them."""
        slots = self.slot_chunk.shape[1]
        first, length = self.sink_start[:, None], self.sink_length[:, None]
        protected = self.slot_chunk < self.policy.global_sinks
        protected |= (self.slot_chunk >= first) & (self.slot_chunk < first + length)
        # Order of eviction: empty slots first, then the oldest chunk, protected ones never.
        never = jnp.iinfo(jnp.int32).max
        age = jnp.where(protected, never, self.slot_chunk)
        age = jnp.where(self.slot_chunk == EMPTY, jnp.arange(slots) - slots, age)
        slot = jnp.argmin(age, axis=-1)
        return jnp.where(jnp.min(age, axis=-1) == never, slots, slot).astype(jnp.int32)

    def _next_start(self, shot_rope_offset: Int[Array, "b"] | int) -> Int[Array, "b"]:
        """Temporal position of the next chunk: absolute, or after the chunks in the window."""
        frames = self.size[0]
        if self.policy.relative_rope:
            return jnp.sum(self.slot_chunk != EMPTY, axis=-1, dtype=jnp.int32) * frames
        return self.num_chunks * frames + jnp.broadcast_to(shot_rope_offset, self.num_chunks.shape)

    def _ordered(self) -> Int[Array, "b slots"]:
        """Window-relative positions: stored chunks are contiguous, oldest first."""
        older = (self.slot_chunk[:, :, None] > self.slot_chunk[:, None, :]) & (
            self.slot_chunk[:, None, :] != EMPTY
        )
        return jnp.sum(older, axis=-1, dtype=jnp.int32) * self.size[0]


_FRAME = np.array([1, 0, 0], np.int32)


def empty_cache(
    cfg: DiTConfig,
    batch: int,
    size: tuple[int, int, int],
    policy: CachePolicy,
    *,
    dtype: DTypeLike | None = None,
    per_layer: bool = False,
) -> KVCache:
    """An empty cache for chunks of `size` (frames, rows, columns) in tokens.

    It has 2 * layers * slots * tokens * dim values per sample, in `dtype` (default: the model's)
    or packed, as the policy's format says; stacked, or `per_layer` for the unrolled loop over
    layers. Raises UserError for heads that cannot be packed.
    """
    shape = (cfg.layers, batch, policy.slots, _volume(size), cfg.heads, cfg.head_dim)
    dtype = cfg.dtype if dtype is None else dtype
    policy.format.check(cfg.head_dim)
    stack: Any = jax.ShapeDtypeStruct(shape, dtype)
    form = policy.format
    shapes = jax.eval_shape(lambda: empty_packed(shape, form)) if form.packed else (stack, stack)
    k, v = jax.tree.map(lambda x: _zeros(x, per_layer=per_layer), shapes)
    # Every array has a buffer of its own: a donated buffer may not appear twice.
    return KVCache(
        k=k,
        v=v,
        slot_chunk=jnp.full((batch, policy.slots), EMPTY, jnp.int32),
        start=jnp.zeros((batch, policy.slots), jnp.int32),
        sink_start=jnp.full(batch, EMPTY, jnp.int32),
        sink_length=jnp.zeros(batch, jnp.int32),
        num_chunks=jnp.zeros(batch, jnp.int32),
        size=size,
        policy=policy,
    )


def _zeros(stack: jax.ShapeDtypeStruct, *, per_layer: bool) -> Array | PerLayer:
    if not per_layer:
        return jnp.zeros(stack.shape, stack.dtype)
    layers, *shape = stack.shape
    return PerLayer(tuple(jnp.zeros(shape, stack.dtype) for _ in range(layers)))


def insert_layer(
    stored: LayerKV,
    packed: tuple[Any, Any],
    layer: Array | int,
    slot: Int[Array, "b"],
    *,
    may_drop: bool,
) -> LayerKV:
    """Writes one layer's keys and values of a chunk to index `slot` of every sample of `stored`.

    `stored` is a cache's `layer_kv`. One update per sample, in place and without a bounds check:
    an index past the last slot needs `may_drop`, with which a slot is read before it is written.
    """
    assert isinstance(stored, DenseLayerKV | PackedLayerKV)

    def write(slots: Array | PerLayer, chunk: Array) -> Array | PerLayer:
        if isinstance(slots, PerLayer):
            assert isinstance(layer, int)
            written = _write_slots(slots.arrays[layer], (), chunk, slot, may_drop)
            return slots.replace_layer(layer, written)
        return _write_slots(slots, (layer,), chunk, slot, may_drop)

    k, v = jax.tree.map(write, (stored.k, stored.v), packed, is_leaf=is_per_layer)
    return dataclasses.replace(stored, k=k, v=v)


def _write_slots(
    slots: Shaped[Array, "*stack"],
    layer: tuple[Array | int, ...],
    chunk: Shaped[Array, "b *rest"],
    slot: Int[Array, "b"],
    may_drop: bool,
) -> Shaped[Array, "*stack"]:
    lead = (1,) * (len(layer) + 2)
    for sample in range(len(chunk)):
        start = (*layer, sample, slot[sample], *(0 for _ in chunk.shape[1:]))
        new = chunk[sample].astype(slots.dtype).reshape(*lead, *chunk.shape[1:])
        if may_drop:
            old = lax.dynamic_slice(slots, start, new.shape)
            new = jnp.where(slot[sample] < slots.shape[len(layer) + 1], new, old)
        slots = lax.dynamic_update_slice(slots, new, start)
    return slots


def insert_slot(
    slots: Shaped[Array, "layers b slots *rest"],
    chunk: Shaped[Array, "layers b *rest"],
    slot: Int[Array, "b"],
) -> Shaped[Array, "layers b slots *rest"]:
    """Writes `chunk` to index `slot` of every sample; an index past the last slot writes nothing.

    One scatter over (sample, slot), which XLA does in place; vmapped updates would copy `slots`.
    """
    sample = jnp.arange(slots.shape[1])
    return slots.at[:, sample, slot].set(chunk, mode="drop", unique_indices=True)


def _volume(size: tuple[int, int, int]) -> int:
    return size[0] * size[1] * size[2]


def _grid(size: tuple[int, int, int]) -> np.ndarray:
    """Frame, row and column of every token of a chunk, int32 [m, 3], column fastest."""
    return np.stack([axis.reshape(-1) for axis in np.mgrid[tuple(map(slice, size))]], -1).astype(
        np.int32
    )
