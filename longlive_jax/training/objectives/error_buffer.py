"""Buffers of past prediction errors, bucketed by temporal position and noise level.

Source: paper, appendix C. A buffer is a pytree of fixed shapes; functions take one and return the
next. Where the reference calls a random generator, functions here take a uniform number in [0, 1),
so that a caller that knows the numbers can replay a run.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.diffusion.flow import TIMESTEPS
from longlive_jax.typing import Array, Bool, Float, Int, Shaped

Replacement = Literal["random", "oldest", "nearest"]
"""Which entry of a full bucket a new error replaces; "nearest" is by Euclidean distance."""


@dataclasses.dataclass(frozen=True)
class BufferSpec:
    """Size and layout of a buffer; `buffer_bytes` computes the size of both buffers of a run.

    A buffer holds `groups x rows x columns x slots` errors of one chunk each, allocated once
    at the start. A chunk of the 5B model at 1280x704 (8 x 44 x 80 x 48) is 2.58 MiB in bfloat16.
    With 10 buckets of 4 slots, both buffers together use 9.7 GiB for videos of 64 s (48 rows),
    which is 2.4 GiB per device at mesh.sp = 4, and a quarter of that for videos of 16 s. The
    reference's 50 buckets of 500 slots use 35 GB per device at sp = 4, without distinguishing
    positions.

    Attributes:
      rows: number of temporal positions to distinguish: the number of chunks of a clip, or 1.
      by: definition of a position. "column": a chunk's index in the training sequence, for training
        on full clips; rows are then sharded over sp. "chunk": its index in the video, for windows
        cut from anywhere; all chunks from index `rows - 1` on use the last row.
      buckets: number of noise-level buckets, each an equal part of the table of levels.
      slots: maximum number of errors in a bucket.
      groups: number of independent buffers, each for an equal share of the batch; with 1 all
        samples use the same buffer. Groups are sharded over mesh.data and mesh.fsdp, so that with
        as many groups as batch shards each rank has its own.
      dealt: distribute the buckets over the rows, row r having r, r + rows, ..., instead of
        assigning rows to positions. Errors in another row's bucket are not stored, and lookups use
        the row's nearest bucket. This is how the released reference shards over sp (rows = sp).
      replace: entry that a new error replaces in a full bucket.
      dtype: dtype of the stored errors.
    """

    rows: int = 1
    by: Literal["column", "chunk"] = "column"
    buckets: int = 10
    slots: int = 4
    groups: int = 1
    dealt: bool = False
    replace: Replacement = "random"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("rows", "buckets", "slots", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.buckets > TIMESTEPS:
            raise ValueError(
                f"buckets must be <= {TIMESTEPS}, the number of noise levels, got {self.buckets}"
            )
        if self.dealt and self.by == "chunk":
            raise ValueError("dealt = True needs by = 'column', got by = 'chunk'")
        if self.dealt and self.rows > self.buckets:
            raise ValueError(
                f"{self.buckets} buckets cannot be dealt to {self.rows} rows; use fewer rows"
            )

    @property
    def aligned(self) -> bool:
        """Whether each row serves fixed positions of the training sequence."""
        return self.by == "column"

    @property
    def columns(self) -> int:
        """Number of buckets in a row."""
        return math.ceil(self.buckets / self.stride)

    @property
    def stride(self) -> int:
        """Difference between the indices of a row's consecutive buckets."""
        return self.rows if self.dealt else 1


@flax.struct.dataclass
class Buffer:
    """Stored errors.

    Unless stated otherwise, functions here take a buffer of one group, without the axis `g`.

    Attributes:
      entries: errors of chunks, by group, row, column and slot.
      added: number of errors ever added to each bucket.
    """

    entries: Float[Array, "*g r t s m h w c"]
    added: Int[Array, "*g r t"]

    @property
    def counts(self) -> Int[Array, "*g r t"]:
        """Number of entries now in each bucket."""
        return jnp.minimum(self.added, self.slots)

    @property
    def slots(self) -> int:
        """Maximum number of entries in a bucket."""
        return self.entries.shape[self.added.ndim]


def empty(spec: BufferSpec, chunk_shape: tuple[int, ...]) -> Buffer:
    """An empty buffer with all groups, for errors of shape `chunk_shape` (m, h, w, c)."""
    shape = (spec.groups, spec.rows, spec.columns)
    entries = jnp.zeros((*shape, spec.slots, *chunk_shape), jnp.dtype(spec.dtype))
    return Buffer(entries, jnp.zeros(shape, jnp.int32))


def bucket_of(
    index: Int[Array, "*n"], buckets: int, *, levels: int = TIMESTEPS
) -> Int[Array, "*n"]:
    """The bucket of each noise-level index; indices outside the table are clipped to it."""
    table = np.trunc(np.arange(levels) / (levels / buckets)).astype(np.int32)
    return jnp.asarray(np.minimum(table, buckets - 1))[jnp.clip(index, 0, levels - 1)]


def column_of(
    spec: BufferSpec, row: Int[Array, "*n"], bucket: Int[Array, "*n"]
) -> tuple[Int[Array, "*n"], Bool[Array, "*n"]]:
    """The column of a bucket in a row, and whether the row has that bucket.

    If it has not, the column is that of its nearest bucket; ties go to the higher bucket.
    """
    if not spec.dealt:
        return bucket, jnp.ones(bucket.shape, bool)
    distance = bucket - row
    nearest = (2 * distance + spec.stride) // (2 * spec.stride)
    column = jnp.clip(nearest, 0, (spec.buckets - 1 - row) // spec.stride)
    return column, distance % spec.stride == 0


def sample_bucket(
    buffer: Buffer,
    row: Int[Array, ""],
    column: Int[Array, ""],
    uniform: Array,
    replace: Replacement,
) -> Float[Array, "m h w c"]:
    """An error of one bucket, float32, chosen by `uniform` in [0, 1); zeros if it is empty."""
    count = buffer.counts[row, column]
    return _entry(buffer, row, column, _index(uniform, count), replace)


def sample_row(
    buffer: Buffer, row: Int[Array, ""], uniform: Array, replace: Replacement
) -> Float[Array, "m h w c"]:
    """An error of all buckets of a row, ordered from the noisiest, chosen as in `sample_bucket`."""
    counts = buffer.counts[row]
    ends = jnp.cumsum(counts)
    index = _index(uniform, ends[-1])
    column = jnp.minimum(jnp.sum(index >= ends), len(ends) - 1)
    return _entry(buffer, row, column, index - (ends - counts)[column], replace)


def _index(uniform: Array, count: Array) -> Array:
    """Maps a number in [0, 1) to an index below `count`; -1 if `count` is 0."""
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)


def _entry(buffer: Buffer, row: Array, column: Array, index: Array, replace: Replacement) -> Array:
    """Entry `index` of a bucket, float32; zeros if `index` is negative.

    Entries count in order of arrival, or of slots where these are reused in another order.
    """
    slot = index
    if replace == "oldest":
        replaced = buffer.added[row, column] - buffer.counts[row, column]
        slot = (replaced + index) % buffer.slots
    error = buffer.entries[row, column, jnp.maximum(slot, 0)].astype(jnp.float32)
    return jnp.where(index >= 0, error, 0.0)


def add(
    buffer: Buffer,
    error: Float[Array, "m h w c"],
    row: Int[Array, ""],
    column: Int[Array, ""],
    *,
    uniform: Float[Array, ""],
    keep: Bool[Array, ""],
    replace: Replacement,
) -> Buffer:
    """Adds one error to a bucket if `keep`; `uniform` chooses the entry for random replacement."""
    # 1. Choose a slot: the next free one, or in a full bucket the one to replace.
    count = buffer.added[row, column]
    if replace == "random":
        replaced = _index(uniform, jnp.asarray(buffer.slots))
    elif replace == "oldest":
        replaced = count % buffer.slots
    else:
        entries = buffer.entries[row, column].astype(jnp.float32)
        replaced = jnp.argmin(jnp.sum((entries - error) ** 2, axis=(1, 2, 3, 4))).astype(jnp.int32)
    slot = jnp.where(count < buffer.slots, count, replaced)
    # 2. Write the error. An index out of range writes nothing.
    slot = jnp.where(keep, slot, buffer.slots)
    return Buffer(
        buffer.entries.at[row, column, slot].set(error.astype(buffer.entries.dtype), mode="drop"),
        buffer.added.at[row, column].add(keep.astype(jnp.int32)),
    )


def add_all(
    buffer: Buffer,
    errors: Float[Array, "n m h w c"],
    row: Int[Array, "n"],
    column: Int[Array, "n"],
    *,
    uniform: Float[Array, "n"],
    keep: Bool[Array, "n"],
    replace: Replacement,
) -> Buffer:
    """Applies `add` to each error in turn."""

    def step(buffer: Buffer, item: tuple[Array, ...]) -> tuple[Buffer, None]:
        error, row, column, uniform, keep = item
        return add(buffer, error, row, column, uniform=uniform, keep=keep, replace=replace), None

    return jax.lax.scan(step, buffer, (errors, row, column, uniform, keep))[0]


def rows_of(spec: BufferSpec, chunks: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """The buffer row of each chunk of a sequence, given the chunks' indices in the video.

    Raises ValueError as `check_rows` does.
    """
    count = chunks.shape[1]
    if not spec.aligned:
        return jnp.clip(chunks, 0, spec.rows - 1)
    check_rows(spec, count)
    return jnp.broadcast_to(jnp.arange(count) * spec.rows // count, chunks.shape)


def check_rows(spec: BufferSpec, count: int) -> None:
    """Raises ValueError if the number of rows does not divide the `count` chunks of a sequence."""
    if count % spec.rows:
        raise ValueError(
            f"{count} chunks of a sequence do not fill the error buffer's {spec.rows} rows evenly; "
            f"set recycling.buffer.rows to {count} or to 1"
        )


def check_groups(spec: BufferSpec, samples: int) -> None:
    """Raises ValueError if the number of groups does not divide the samples of a batch."""
    if samples % spec.groups:
        raise ValueError(
            f"{samples} samples do not split into recycling.buffer.groups = {spec.groups}; choose "
            "a divisor"
        )


def sample_batch(
    sample: Callable[..., Array], buffer: Buffer, spec: BufferSpec, *items: Shaped[Array, "b n"]
) -> Float[Array, "b n m h w c"]:
    """Samples an error for each chunk of a batch from a buffer of all groups.

    `sample(buffer, row, ...)` returns one error; `items` are the row and its further arguments for
    each chunk.
    """

    def sample_all(group: Buffer, *items: Array) -> Array:
        return jax.vmap(sample, (None, *[0] * len(items)))(group, *items)

    items_by_group = (_split_groups(x, spec) for x in items)
    errors = jax.vmap(_vmap_rows(sample_all, spec))(buffer, *items_by_group)
    return _merge_groups(errors, items[0].shape[0], spec)


def add_batch(
    buffer: Buffer,
    spec: BufferSpec,
    row: Int[Array, "b n"],
    column: Int[Array, "b n"],
    errors: Float[Array, "b n m h w c"],
    *,
    uniform: Float[Array, "b n"],
    keep: Bool[Array, "b n"],
    across_groups: Bool[Array, ""],
) -> Buffer:
    """Adds the errors of a batch to a buffer of all groups, sample by sample.

    The arguments are those of `add_all`. Each group stores the errors of its own samples, or, if
    `across_groups`, those of all samples. A mask selects them, because a branch would copy the
    buffer.
    """
    # 1. Mask the errors that each group stores.
    samples, groups = row.shape[0], jnp.arange(spec.groups)
    own = jnp.arange(samples) * spec.groups // samples == groups[:, None]
    keep_by_group = keep & (own | across_groups)[:, :, None]

    # 2. Offer all errors to every group.
    def run(group: Buffer, row: Array, column: Array, errors: Array, uniform: Array, keep: Array):
        return add_all(group, errors, row, column, uniform=uniform, keep=keep, replace=spec.replace)

    single = dataclasses.replace(spec, groups=1)
    arrays = (row, column, errors.astype(spec.dtype), uniform)
    items = (_split_groups(x, single)[0] for x in arrays)
    keep_items = jax.vmap(lambda x: _split_groups(x, single)[0])(keep_by_group)
    axes = (0, None, None, None, None, 0)
    updated = jax.vmap(_vmap_rows(run, spec), axes)(buffer, *items, keep_items)
    return jax.tree.map(lambda x: x[:, :, 0], updated) if spec.aligned else updated


def _vmap_rows(run: Callable[..., Any], spec: BufferSpec) -> Callable[..., Any]:
    """`run(buffer, row, ...)`, mapped over the rows if they are aligned.

    Each call then gets a buffer of one row, so that a device needs no other device's rows.
    """

    def run_row(buffer: Buffer, row: Array, *rest: Array) -> Any:
        single = jax.tree.map(lambda x: x[None], buffer)
        return run(single, jnp.zeros_like(row), *rest)

    return jax.vmap(run_row) if spec.aligned else run


def _split_groups(x: Array, spec: BufferSpec) -> Array:
    """Reshapes [b, n, ...] to [g, items, ...], or to [g, r, items, ...] if rows are aligned.

    Items are ordered by sample, then by chunk.
    """
    b, n, *rest = x.shape
    check_groups(spec, b)
    if not spec.aligned:
        return x.reshape(spec.groups, -1, *rest)
    split = x.reshape(spec.groups, b // spec.groups, spec.rows, n // spec.rows, *rest)
    return jnp.moveaxis(split, 2, 1).reshape(spec.groups, spec.rows, -1, *rest)


def _merge_groups(x: Array, samples: int, spec: BufferSpec) -> Array:
    """The inverse of `_split_groups`."""
    if spec.aligned:
        rest = x.shape[3:]
        split = x.reshape(spec.groups, spec.rows, samples // spec.groups, -1, *rest)
        x = jnp.moveaxis(split, 1, 2)
        return x.reshape(samples, -1, *rest)
    return x.reshape(samples, -1, *x.shape[2:])
