"""Tile maps: the key tiles that each query tile has to visit, computed from token columns.

Each row of tiles is stored as a few ranges. A range is either full (all pairs are visible, no mask
needed) or partial. Memory therefore grows with the number of tiles, not with its square.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.tokens import EMPTY, VISIBILITY_COLUMNS, Tokens, visible

MAX_RANGES = 64
"""Ranges per row for traced columns; a row that needs more ends in one long partial range.
In Balanced order a row needs up to three per device of the sequence axis."""
ROWS_AT_ONCE = 64
"""Rows of a map that are computed together: a trade-off between speed and memory."""

Rows = Literal["query", "key"]
"""Whether the rows of a map are query tiles or key tiles; its columns are tiles of the other."""


@flax.struct.dataclass
class TileMap:
    """Ordered, disjoint ranges of tiles for every row of tiles; unused ranges are empty.

    Attributes:
      start: first tile of each range.
      stop: end of each range, exclusive.
      full: 1 if all pairs of a range are visible, else 0.
      count: number of tiles in all ranges of a row.
      order: rows by falling count. Thread blocks take rows in this order, so that the last ones to
        run are the shortest.
    """

    start: Int[Array, "b rows ranges"]
    stop: Int[Array, "b rows ranges"]
    full: Int[Array, "b rows ranges"]
    count: Int[Array, "b rows"]
    order: Int[Array, "b rows"]


def tile_map(
    q: Tokens,
    k: Tokens,
    *,
    q_tile: int,
    k_tile: int,
    rows: Rows,
    ranges: int | None = None,
) -> TileMap:
    """Builds the map of query tiles over key tiles (`rows="query"`) or the reverse (`"key"`).

    Tokens must fill whole tiles (`pad_tokens`). Ranges cover every visible pair, and full ranges
    contain no masked pair; only a tile with more than two kinds of tokens may be visited although
    it is fully masked. Concrete columns get as many ranges as they need (or `ranges`), traced
    columns get `MAX_RANGES`.
    """
    if not is_concrete(q, k):
        return _tile_map(q, k, q_tile, k_tile, rows, ranges or MAX_RANGES)
    with concrete_evaluation():
        return _tile_map(q, k, q_tile, k_tile, rows, ranges)


@functools.partial(jax.jit, static_argnames=("q_tile", "k_tile"))
def tile_kinds(
    q: Tokens, k: Tokens, *, q_tile: int, k_tile: int
) -> Int[Array, "b q_tiles k_tiles"]:
    """Classifies every pair of tiles: 0 fully masked, 2 fully visible, 1 mixed.

    A tile with more than two kinds of tokens is always 1. Tokens must fill whole tiles.
    """
    queries, keys = _tiles(q, q_tile), _tiles(k, k_tile)
    rows = _map_rows(lambda tile: _row_kinds(queries, keys, "query", tile), queries.simple.shape[1])
    return jnp.swapaxes(rows, 0, 1)


def is_concrete(*tokens: Tokens) -> bool:
    """Whether all columns have concrete values at trace time."""
    columns = (getattr(part, name) for part in tokens for name in VISIBILITY_COLUMNS)
    return not any(isinstance(column, jax.core.Tracer) for column in columns)


@contextlib.contextmanager
def concrete_evaluation() -> Iterator[None]:
    """Evaluates concrete values during tracing, on a local device.

    The traced program may be for a device that is not present.
    """
    with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices()[0]):
        yield


def density(tiles: TileMap, columns: int) -> float:
    """The fraction of all pairs of tiles that is visited; rows have `columns` tiles."""
    return float(tiles.count.sum()) / (tiles.count.size * columns)


def pad_tokens(tokens: Tokens, tile: int) -> Tokens:
    """Pads columns to `[b, l']` with `l'` a multiple of `tile`; padding is fully masked."""
    rest = -len(tokens) % tile

    def padded(name: str) -> Array:
        column = jnp.atleast_2d(getattr(tokens, name))
        fill = EMPTY if name == "chunk_index" else 0
        return jnp.pad(column, ((0, 0), (0, rest)), constant_values=fill)

    columns: list[Any] = [padded(name) for name in VISIBILITY_COLUMNS]
    return Tokens(jnp.zeros((*columns[0].shape, 3), jnp.int32), *columns)


@flax.struct.dataclass
class _Tiles:
    """The first and last token of every tile, and whether all its tokens equal one of the two."""

    ends: Tokens  # columns [b, 2 tiles]
    simple: Bool[Array, "b tiles"]


def _tile_map(q: Tokens, k: Tokens, q_tile: int, k_tile: int, rows: Rows, ranges: int | None):
    queries, keys = _tiles(q, q_tile), _tiles(k, k_tile)
    own, others = (queries, keys) if rows == "query" else (keys, queries)
    if ranges is None:
        ranges = max(1, int(_count_ranges(own, others, rows)))
    return _collect(own, others, rows, ranges)


@functools.partial(jax.jit, static_argnames="size")
def _tiles(tokens: Tokens, size: int) -> _Tiles:
    def split(name: str) -> Array:
        column = jnp.atleast_2d(getattr(tokens, name))
        return column.reshape(column.shape[0], -1, size)

    columns = jnp.stack([split(name).astype(jnp.int32) for name in VISIBILITY_COLUMNS])
    ends = columns[..., jnp.array([0, -1])]
    like = [(columns == ends[..., i : i + 1]).all(0) for i in range(2)]
    flat = ends.reshape(*ends.shape[:2], -1)
    rows: dict[str, Any] = dict(zip(VISIBILITY_COLUMNS, flat, strict=True))
    rows["noisy"] = rows["noisy"].astype(bool)
    return _Tiles(Tokens(jnp.zeros((*flat.shape[1:], 3)), **rows), (like[0] | like[1]).all(-1))


def _row_kinds(own: _Tiles, others: _Tiles, rows: Rows, tile: Array) -> Int[Array, "b others"]:
    """Kinds of one tile against all others: 0 fully masked, 1 possibly mixed, 2 fully visible."""
    own_ends = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, 2 * tile, 2, 1), own.ends)
    if rows == "query":
        pairs = visible(own_ends, others.ends).swapaxes(1, 2)
    else:
        pairs = visible(others.ends, own_ends)
    pairs = pairs.reshape(pairs.shape[0], -1, 4)  # of [b, 2 others, 2]
    kinds = pairs.any(-1).astype(jnp.int32) + pairs.all(-1)
    simple = lax.dynamic_slice_in_dim(own.simple, tile, 1, 1) & others.simple
    return jnp.where(simple, kinds, 1)


@functools.partial(jax.jit, static_argnames="rows")
def _count_ranges(own: _Tiles, others: _Tiles, rows: Rows) -> Int[Array, ""]:
    """The maximum number of ranges in a row."""

    def needed(tile: Array) -> Array:
        return _range_starts(_row_kinds(own, others, rows, tile)).sum(-1).max()

    return _map_rows(needed, own.simple.shape[1]).max()


@functools.partial(jax.jit, static_argnames=("rows", "ranges"))
def _collect(own: _Tiles, others: _Tiles, rows: Rows, ranges: int) -> TileMap:
    def tile_ranges(tile: Array) -> tuple[Array, ...]:
        return _ranges(_row_kinds(own, others, rows, tile), ranges)

    parts = _map_rows(tile_ranges, own.simple.shape[1])
    start, stop, full, count = (jnp.swapaxes(x, 0, 1) for x in parts)
    order = jnp.argsort(-count, axis=-1, stable=True).astype(jnp.int32)
    return TileMap(start, stop, full, count, order)


def _map_rows(function: Callable[[Array], Any], rows: int) -> Any:
    """Maps `function` over row numbers, `ROWS_AT_ONCE` at a time, and stacks the results.

    The last batch is filled up with repeats of the last row.
    """
    size = min(rows, ROWS_AT_ONCE)
    times = -(-rows // size)
    numbers = jnp.minimum(jnp.arange(times * size), rows - 1).reshape(times, size)
    stacked = lax.map(jax.vmap(function), numbers)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], stacked)


def _range_starts(kinds: Int[Array, "b n"]) -> Bool[Array, "b n"]:
    before = jnp.pad(kinds, ((0, 0), (1, 0)))[:, :-1]
    return (kinds > 0) & (kinds != before)


def _ranges(kinds: Int[Array, "b n"], most: int) -> tuple[Array, ...]:
    """start, stop, full [b, most] and count [b]; the last range covers all that do not fit."""
    n = kinds.shape[1]
    begins, ends = _range_starts(kinds), _range_starts(kinds[:, ::-1])[:, ::-1]
    first = jax.vmap(lambda x: jnp.nonzero(x, size=most, fill_value=n)[0])
    start, last = first(begins), first(ends)
    stop = jnp.where(start < n, last + 1, n)
    full = jnp.take_along_axis(jnp.pad(kinds, ((0, 0), (0, 1))), start, axis=1) == 2
    too_many = begins.sum(-1) > most
    at_end = n - jnp.argmax(kinds[:, ::-1] > 0, axis=1)
    stop = stop.at[:, -1].set(jnp.where(too_many, at_end, stop[:, -1]))
    full = full.at[:, -1].set(full[:, -1] & ~too_many)
    columns = (x.astype(jnp.int32) for x in (start, stop, full, (stop - start).sum(-1)))
    return tuple(columns)
