"""The key-value cache: slots of whole chunks, and the rule that says which slot is overwritten.

A window of W chunks is the chunk being made, which brings its own keys, and W - 1 slots. A finished
chunk takes the first empty slot; when there is none, the slot of the oldest chunk that is neither a
global sink (one of the first chunks of the video) nor the shot sink (the first chunk of the current
shot). Attention does not care in which order keys arrive, so nothing is ever moved: a cut only
re-binds two scalars a sample, START and LEN of the shot sink, after the cut chunk is remembered.
While the cut chunk itself is made, the sink of the shot before is still in force. (LongLive 2.0,
section 3.2; the reference keeps the same sets by shifting its buffer.)

Keys carry the rotation of their absolute position, or none if positions are relative to the window.
Everything that differs between samples (what each slot holds, where the shot began) is an array,
so samples of a batch may cut at different times.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from longlive_jax.models.wan.attention import DenseLayerKV, LayerKV
from longlive_jax.models.wan.config import DiTConfig
from longlive_jax.models.wan.packed_cache import (
    KVFormat,
    PackedLayerKV,
    empty_packed,
    pack_keys,
    pack_values,
)
from longlive_jax.spec import UserError
from longlive_jax.typing import Array, Bool, Float, Int, Shaped
from pallas_kernels.tokens import EMPTY, Tokens, make


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """What is kept. Static: one compilation each.

    Fields: `window` chunks that attention sees, the current one included; `global_sinks` first
    chunks of the video kept for ever; `shot_sinks` keeps the first chunk of the current shot;
    `clean_recache` forgets all but the global sinks when a cut chunk is remembered;
    `relative_rope` counts temporal positions from the start of the window; `format` says how keys
    and values are stored.
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
                f"a window of {self.window} chunks cannot hold {self.global_sinks} global sinks, "
                f"{int(self.shot_sinks)} shot sinks and the current chunk; use at least {least}"
            )
        if self.relative_rope and self.format.packed and self.format.reader == "mosaic":
            raise UserError(
                "kv_reader=mosaic reads rotated keys, and relative_rope stores unrotated ones; use "
                "kv_reader=auto"
            )

    @property
    def slots(self) -> int:
        """Chunks that are stored."""
        return self.window - 1


@struct.dataclass
class KVCache:
    """Keys and values of past chunks, and what they are.

    `slot_chunk` is the chunk in each slot or -1, `start` the temporal position of its first frame;
    `sink_start` and `sink_length` are the shot sink in chunks; `num_chunks` is the number of chunks
    made so far, which is also the index of the next one. `size` is (frames, rows, columns) of a
    chunk in tokens. `k` and `v` are `[layers, b, slots, m, n, d]`: arrays, or `Packed` in NVFP4.
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
    def past(self) -> LayerKV:
        """What the model attends, layer by layer."""
        if self.policy.format.packed:
            return PackedLayerKV(self.k, self.v, self.policy.format)
        return DenseLayerKV(self.k, self.v)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values on the device."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((self.k, self.v)))

    @property
    def bytes_per_token(self) -> float:
        """Bytes that one token of one sample takes in all layers."""
        _, b, slots, tokens, _, _ = self.k.shape
        return self.nbytes / (b * slots * tokens)

    @property
    def compression(self) -> float:
        """How many times more bytes the same keys and values take in bfloat16."""
        return 2 * (self.k.size + self.v.size) / self.nbytes

    def tokens(self, queries: Tokens | None = None, /) -> Tokens:
        """What the stored keys are, `[b, slots * m]` in slot order; nobody sees an empty slot."""
        start = self._ordered() if self.policy.relative_rope else self.start
        pos = start[..., None, None] * _FRAME + _grid(self.size)
        chunk = jnp.repeat(self.slot_chunk, _volume(self.size), axis=-1)
        return make(pos.reshape(*chunk.shape, 3), chunk, False)

    def upcoming(self, shot_rope_offset: Int[Array, "b"] | int = 0, *, noisy: bool) -> Tokens:
        """The tokens of the next chunk, `[b, m]`: being denoised, or finished and to be remembered.

        `shot_rope_offset` frames are added to its absolute temporal position (the phase of its
        shot); it has no effect on positions relative to the window.
        """
        pos = self._next_start(shot_rope_offset)[:, None, None] * _FRAME + _grid(self.size)
        chunk = jnp.broadcast_to(self.num_chunks[:, None], pos.shape[:-1])
        return make(pos, chunk, noisy, uniform_mask=True)

    def before_write(self, cut: Bool[Array, "b"]) -> "KVCache":
        """The cache against which the finished next chunk is remembered; `cut` begins a shot."""
        if not self.policy.clean_recache:
            return self
        drop = cut[:, None] & (self.slot_chunk >= self.policy.global_sinks)
        return dataclasses.replace(self, slot_chunk=jnp.where(drop, EMPTY, self.slot_chunk))

    def pack(
        self, k: Float[Array, "*layers b m n d"], v: Float[Array, "*layers b m n d"]
    ) -> tuple[Any, Any]:
        """Keys and values of a chunk as they are stored, of one layer or of all."""
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
        """`insert` of keys and values that are yet to be packed."""
        return self.insert(self.pack(k, v), cut=cut, shot_rope_offset=shot_rope_offset)

    def insert(
        self,
        packed: tuple[Any, Any],
        *,
        cut: Bool[Array, "b"],
        shot_rope_offset: Int[Array, "b"] | int = 0,
    ) -> "KVCache":
        """Stores the finished next chunk; if it begins a shot it becomes the shot sink.

        `packed` is what `pack` gives, of all layers. In place when the cache is donated. If sinks
        fill every slot, the chunk is not stored.
        """
        bound = self.set_shot_sink(cut | (self.num_chunks == 0))
        at = bound.free_slot()
        written = jnp.arange(self.slot_chunk.shape[1]) == at[:, None]
        start = self._next_start(shot_rope_offset)[:, None]
        k, v = jax.tree.map(lambda x, new: _put(x, new, at), (self.k, self.v), packed)
        return dataclasses.replace(
            bound,
            k=k,
            v=v,
            slot_chunk=jnp.where(written, self.num_chunks[:, None], self.slot_chunk),
            start=jnp.where(written, start, self.start),
            num_chunks=self.num_chunks + 1,
        )

    def set_shot_sink(self, cut: Bool[Array, "b"]) -> "KVCache":
        """Points the shot sink at the next chunk where a shot begins; releases the one before."""
        if not self.policy.shot_sinks:
            return self
        return dataclasses.replace(
            self,
            sink_start=jnp.where(cut, self.num_chunks, self.sink_start),
            sink_length=jnp.where(cut, 1, self.sink_length),
        )

    def free_slot(self) -> Int[Array, "b"]:
        """The slot to overwrite in every sample; the number of slots if all are protected."""
        slots = self.slot_chunk.shape[1]
        first, length = self.sink_start[:, None], self.sink_length[:, None]
        protected = self.slot_chunk < self.policy.global_sinks
        protected |= (self.slot_chunk >= first) & (self.slot_chunk < first + length)
        never = jnp.iinfo(jnp.int32).max
        age = jnp.where(protected, never, self.slot_chunk)
        age = jnp.where(self.slot_chunk == EMPTY, jnp.arange(slots) - slots, age)
        slot = jnp.argmin(age, axis=-1)
        return jnp.where(jnp.min(age, axis=-1) == never, slots, slot).astype(jnp.int32)

    def _next_start(self, shot_rope_offset: Int[Array, "b"] | int) -> Int[Array, "b"]:
        """Temporal position of the next chunk: absolute, or behind what the window holds."""
        frames = self.size[0]
        if self.policy.relative_rope:
            return jnp.sum(self.slot_chunk != EMPTY, axis=-1, dtype=jnp.int32) * frames
        return self.num_chunks * frames + jnp.broadcast_to(shot_rope_offset, self.num_chunks.shape)

    def _ordered(self) -> Int[Array, "b slots"]:
        """Window-relative positions: the kept chunks side by side, in order of age."""
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
) -> KVCache:
    """A cache that has seen nothing, for chunks of `size` (frames, rows, columns) in tokens.

    It takes 2 * layers * slots * tokens * dim values a sample, in `dtype` (default: the model's) or
    packed, as the policy's format says. Raises UserError for heads that cannot be packed.
    """
    shape = (cfg.layers, batch, policy.slots, _volume(size), cfg.heads, cfg.head_dim)
    dtype = cfg.dtype if dtype is None else dtype
    policy.format.check(cfg.head_dim)
    k: Any = jnp.zeros(shape, dtype)
    v: Any = jnp.zeros(shape, dtype)
    if policy.format.packed:
        k, v = empty_packed(shape, policy.format)
    nothing = jnp.full((batch, policy.slots), EMPTY, jnp.int32)

    # Distinct buffers: a donated argument may not appear twice.
    return KVCache(
        k=k,
        v=v,
        slot_chunk=nothing,
        start=jnp.zeros((batch, policy.slots), jnp.int32),
        sink_start=jnp.full(batch, EMPTY, jnp.int32),
        sink_length=jnp.zeros(batch, jnp.int32),
        num_chunks=jnp.zeros(batch, jnp.int32),
        size=size,
        policy=policy,
    )


def _put(
    store: Shaped[Array, "layers b slots *rest"],
    new: Shaped[Array, "layers b *rest"],
    at: Int[Array, "b"],
) -> Shaped[Array, "layers b slots *rest"]:
    """`new` in slot `at` of every sample; slots beyond the last are not written.

    One scatter over (sample, slot), which XLA does in place; vmapped updates would copy the store.
    """
    sample = jnp.arange(store.shape[1])
    return store.at[:, sample, at].set(new, mode="drop", unique_indices=True)


def _volume(size: tuple[int, int, int]) -> int:
    return size[0] * size[1] * size[2]


def _grid(size: tuple[int, int, int]) -> np.ndarray:
    """Frame, row and column of the tokens of a chunk, int32 [m, 3], column fastest."""
    return np.stack([axis.reshape(-1) for axis in np.mgrid[tuple(map(slice, size))]], -1).astype(
        np.int32
    )
