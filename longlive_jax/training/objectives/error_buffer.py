"""Past prediction errors in buckets of temporal position and noise level (paper, appendix C).

A buffer is state: arrays of fixed shape, taken and handed back. Where the reference asks a random
generator, functions here take a number in [0, 1), so that whoever knows the numbers can replay.
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
"""What a new error takes the place of in a full bucket; "nearest" is by Euclidean distance."""


@dataclasses.dataclass(frozen=True)
class BufferSpec:
    """Size and layout of a buffer; `bytes_held` says what the two of a run take.

    Both hold `groups x rows x columns x slots` errors of one chunk each, allocated at once, never
    more. A chunk of the 5B model at 1280x704 (8 x 44 x 80 x 48) is 2.58 MiB in bfloat16: with 10
    buckets of 4 slots, videos of 64 s (48 rows) take 9.7 GiB, which is 2.4 GiB a device at
    mesh.sp = 4, and videos of 16 s a quarter of that. The reference's 50 buckets of 500 take 35 GB
    a device at sp = 4 without telling positions apart.

    Attributes:
      rows: temporal positions told apart: as many as a clip has chunks, or 1.
      by: what a position is. "column": a chunk's place in the training sequence, for clips that are
        trained on whole; rows are then split over sp. "chunk": its number in the video, for windows
        cut from anywhere; all from `rows - 1` on share the last row.
      buckets: of noise levels, equally many entries of the table in each.
      slots: errors in a bucket.
      groups: buffers of their own, each for an equal share of a batch; 1: all samples share one.
        They are split over mesh.data and mesh.fsdp, so as many as these give each rank its own.
      dealt: rows share the buckets out, row r having r, r + rows, ..., in place of positions.
        What falls into another row's bucket is not kept, and asked of the nearest bucket there is.
        This is how the reference shards over sp (rows = sp) as released.
      replace: what gives way in a full bucket.
      dtype: of stored errors.
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
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.buckets > TIMESTEPS:
            raise ValueError(f"buckets is {self.buckets}; give at most {TIMESTEPS}, one a level")
        if self.dealt and self.by == "chunk":
            raise ValueError("dealt gives rows no position; use it with by = 'column'")
        if self.dealt and self.rows > self.buckets:
            raise ValueError(
                f"{self.buckets} buckets cannot be dealt to {self.rows} rows; give fewer rows"
            )

    @property
    def aligned(self) -> bool:
        """Whether each row serves chunks of its own places in the training sequence."""
        return self.by == "column"

    @property
    def columns(self) -> int:
        """Buckets of a row."""
        return math.ceil(self.buckets / self.stride)

    @property
    def stride(self) -> int:
        """From a bucket of a row to its next one."""
        return self.rows if self.dealt else 1


@flax.struct.dataclass
class Buffer:
    """Errors of chunks, `entries`, and how many ever came into each bucket, `added`.

    Functions of this module take a buffer of one group, that is, without the axis `g`.
    """

    entries: Float[Array, "*g r t s m h w c"]
    added: Int[Array, "*g r t"]

    @property
    def held(self) -> Int[Array, "*g r t"]:
        """Entries in each bucket."""
        return jnp.minimum(self.added, self.slots)

    @property
    def slots(self) -> int:
        """Entries that a bucket has room for."""
        return self.entries.shape[self.added.ndim]


def empty(spec: BufferSpec, chunk_shape: tuple[int, ...]) -> Buffer:
    """A buffer of all groups without entries, for errors of shape `chunk` (m, h, w, c)."""
    shape = (spec.groups, spec.rows, spec.columns)
    entries = jnp.zeros((*shape, spec.slots, *chunk_shape), jnp.dtype(spec.dtype))
    return Buffer(entries, jnp.zeros(shape, jnp.int32))


def bucket_of(
    index: Int[Array, "*n"], buckets: int, *, levels: int = TIMESTEPS
) -> Int[Array, "*n"]:
    """The bucket of entries `index` of a table of noise levels; outside it, the nearest."""
    table = np.trunc(np.arange(levels) / (levels / buckets)).astype(np.int32)
    return jnp.asarray(np.minimum(table, buckets - 1))[jnp.clip(index, 0, levels - 1)]


def column_of(
    spec: BufferSpec, row: Int[Array, "*n"], bucket: Int[Array, "*n"]
) -> tuple[Int[Array, "*n"], Bool[Array, "*n"]]:
    """Where a row keeps a bucket, and whether it does; else the nearest that it has, the higher
    of two equally near."""
    if not spec.dealt:
        return bucket, jnp.ones(bucket.shape, bool)
    away = bucket - row
    nearest = (2 * away + spec.stride) // (2 * spec.stride)
    return jnp.clip(nearest, 0, (spec.buckets - 1 - row) // spec.stride), away % spec.stride == 0


def matched(
    buffer: Buffer, row: Int[Array, ""], column: Int[Array, ""], share: Array, replace: Replacement
) -> Float[Array, "m h w c"]:
    """The error that lies `share` of the way through a bucket, float32; zeros if it is empty."""
    count = buffer.held[row, column]
    return _taken(buffer, row, column, _nth(share, count), replace)


def pooled(
    buffer: Buffer, row: Int[Array, ""], share: Array, replace: Replacement
) -> Float[Array, "m h w c"]:
    """The error that lies `share` of the way through all buckets of a row, noisiest first."""
    counts = buffer.held[row]
    ends = jnp.cumsum(counts)
    nth = _nth(share, ends[-1])
    column = jnp.minimum(jnp.sum(nth >= ends), len(ends) - 1)
    return _taken(buffer, row, column, nth - (ends - counts)[column], replace)


def _nth(share: Array, count: Array) -> Array:
    """Which of `count` things a number in [0, 1) means; below 0 if there are none."""
    return jnp.minimum((share * count).astype(jnp.int32), count - 1)


def _taken(buffer: Buffer, row: Array, column: Array, nth: Array, replace: Replacement) -> Array:
    """Entry `nth` of a bucket in the order of arrival (or of slots, where places are reused)."""
    slot = nth
    if replace == "oldest":
        before = buffer.added[row, column] - buffer.held[row, column]
        slot = (before + nth) % buffer.slots
    error = buffer.entries[row, column, jnp.maximum(slot, 0)].astype(jnp.float32)
    return jnp.where(nth >= 0, error, 0.0)


def add(
    buffer: Buffer,
    error: Float[Array, "m h w c"],
    row: Int[Array, ""],
    column: Int[Array, ""],
    *,
    share: Float[Array, ""],
    keep: Bool[Array, ""],
    replace: Replacement,
) -> Buffer:
    """The buffer with one error more if `keep`; `share` says what gives way at random."""
    count = buffer.added[row, column]
    if replace == "random":
        reused = _nth(share, jnp.asarray(buffer.slots))
    elif replace == "oldest":
        reused = count % buffer.slots
    else:
        old = buffer.entries[row, column].astype(jnp.float32)
        reused = jnp.argmin(jnp.sum((old - error) ** 2, axis=(1, 2, 3, 4))).astype(jnp.int32)
    slot = jnp.where(count < buffer.slots, count, reused)
    slot = jnp.where(keep, slot, buffer.slots)  # out of range: nothing is written
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
    share: Float[Array, "n"],
    keep: Bool[Array, "n"],
    replace: Replacement,
) -> Buffer:
    """`add` of one error after the other."""

    def step(buffer: Buffer, item: tuple[Array, ...]) -> tuple[Buffer, None]:
        error, row, column, share, keep = item
        return add(buffer, error, row, column, share=share, keep=keep, replace=replace), None

    return jax.lax.scan(step, buffer, (errors, row, column, share, keep))[0]


def rows_of(spec: BufferSpec, chunks: Int[Array, "b n"]) -> Int[Array, "b n"]:
    """The row for every chunk of a sequence, given their numbers in the video.

    Raises ValueError if they do not fill the rows evenly.
    """
    count = chunks.shape[1]
    if not spec.aligned:
        return jnp.clip(chunks, 0, spec.rows - 1)
    check_rows(spec, count)
    return jnp.broadcast_to(jnp.arange(count) * spec.rows // count, chunks.shape)


def check_rows(spec: BufferSpec, count: int) -> None:
    """ValueError if the chunks of a sequence do not fill the rows evenly."""
    if count % spec.rows:
        raise ValueError(
            f"{count} chunks of a sequence do not fill the error buffer's {spec.rows} rows evenly; "
            f"set recycling.buffer.rows to {count} or to 1"
        )


def check_groups(spec: BufferSpec, samples: int) -> None:
    """ValueError if the samples of a batch do not split into groups."""
    if samples % spec.groups:
        raise ValueError(
            f"{samples} samples do not split into recycling.buffer.groups = {spec.groups}; choose "
            "a divisor"
        )


def drawn(
    one: Callable[..., Array], buffer: Buffer, spec: BufferSpec, *items: Shaped[Array, "b n"]
) -> Float[Array, "b n m h w c"]:
    """`one(buffer, row, ...)`, an error, for the row and what else there is of every chunk."""

    def several(lane: Buffer, *rest: Array) -> Array:
        return jax.vmap(one, (None, *[0] * len(rest)))(lane, *rest)

    errors = jax.vmap(_by_row(several, spec))(buffer, *(_lanes(x, spec) for x in items))
    return _flat(errors, items[0].shape[0], spec)


def stored(
    buffer: Buffer,
    spec: BufferSpec,
    row: Int[Array, "b n"],
    column: Int[Array, "b n"],
    errors: Float[Array, "b n m h w c"],
    *,
    share: Float[Array, "b n"],
    keep: Bool[Array, "b n"],
    among: Bool[Array, ""],
) -> Buffer:
    """The buffer with the errors of a batch, sample by sample; arguments as of `add_all`.

    Each group takes those of its own samples, and those of all while samples are shared `among`
    groups. A mask decides, and not a branch, which would copy the buffer.
    """
    samples, groups = row.shape[0], jnp.arange(spec.groups)
    own = jnp.arange(samples) * spec.groups // samples == groups[:, None]
    wanted = keep & (own | among)[:, :, None]
    one = dataclasses.replace(spec, groups=1)

    def run(lane: Buffer, row: Array, column: Array, errors: Array, share: Array, keep: Array):
        return add_all(lane, errors, row, column, share=share, keep=keep, replace=spec.replace)

    items = (_lanes(x, one)[0] for x in (row, column, errors.astype(spec.dtype), share))
    kept = jax.vmap(lambda x: _lanes(x, one)[0])(wanted)
    axes = (0, None, None, None, None, 0)
    found = jax.vmap(_by_row(run, spec), axes)(buffer, *items, kept)
    return jax.tree.map(lambda x: x[:, :, 0], found) if spec.aligned else found


def _by_row(run: Callable[..., Any], spec: BufferSpec) -> Callable[..., Any]:
    """`run(buffer, row, ...)` for all rows at once if they are aligned: each call is then given a
    buffer of one row, and a device needs no other's."""

    def of_row(buffer: Buffer, row: Array, *rest: Array) -> Any:
        lane = jax.tree.map(lambda x: x[None], buffer)
        return run(lane, jnp.zeros_like(row), *rest)

    return jax.vmap(of_row) if spec.aligned else run


def _lanes(x: Array, spec: BufferSpec) -> Array:
    """[b, n, ...] as [g, items, ...], or [g, r, items, ...] where rows are aligned.

    Items are in the order of samples, and of chunks within a sample.
    """
    b, n, *rest = x.shape
    check_groups(spec, b)
    if not spec.aligned:
        return x.reshape(spec.groups, -1, *rest)
    split = x.reshape(spec.groups, b // spec.groups, spec.rows, n // spec.rows, *rest)
    return jnp.moveaxis(split, 2, 1).reshape(spec.groups, spec.rows, -1, *rest)


def _flat(x: Array, samples: int, spec: BufferSpec) -> Array:
    """The inverse of `_lanes`."""
    if spec.aligned:
        rest = x.shape[3:]
        split = x.reshape(spec.groups, spec.rows, samples // spec.groups, -1, *rest)
        x = jnp.moveaxis(split, 1, 2)
        return x.reshape(samples, -1, *rest)
    return x.reshape(samples, -1, *x.shape[2:])
