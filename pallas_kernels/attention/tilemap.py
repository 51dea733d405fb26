"""Which tiles of keys a tile of queries has to visit, from token columns.

A row of tiles is stored as a few ranges, each either full (every pair is visible: no mask) or
partial, so memory grows with the number of tiles and not with its square.
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

from pallas_kernels.tokens import COLUMNS, EMPTY, Tokens, visible

MOST_RANGES = 64
"""Ranges a row gets if columns are traced; a row that needs more ends in one long partial range.
In Balanced order a row needs up to three for every device of the sequence."""
ROWS_AT_ONCE = 64
"""Rows of a map that are made together: enough to be quick, few enough to need little memory."""

Rows = Literal["query", "key"]
"""What the rows of a map are tiles of; its columns are tiles of the other."""


@flax.struct.dataclass
class TileMap:
    """Ranges `start:stop` of tiles for every row of tiles, in order and apart.

    Unused ranges are empty. `count` is the number of tiles in all ranges of a row.
    """

    start: Int[Array, "b rows ranges"]
    stop: Int[Array, "b rows ranges"]
    full: Int[Array, "b rows ranges"]
    count: Int[Array, "b rows"]


def tile_map(
    q: Tokens,
    k: Tokens,
    *,
    q_tile: int,
    k_tile: int,
    rows: Rows,
    ranges: int | None = None,
) -> TileMap:
    """The map of query tiles over key tiles, or of key tiles over query tiles, as `rows` says.

    Tokens must fill whole tiles (`pad_tokens`). No range leaves out a visible pair and no full one
    holds an invisible pair; only a tile of more than two kinds of tokens may be visited in vain.
    Known columns get as many ranges as they need (or `ranges`), traced ones `MOST_RANGES`.
    """
    if not known(q, k):
        return _tile_map(q, k, q_tile, k_tile, rows, ranges or MOST_RANGES)
    with at_once():
        return _tile_map(q, k, q_tile, k_tile, rows, ranges)


@functools.partial(jax.jit, static_argnames=("q_tile", "k_tile"))
def tile_kinds(
    q: Tokens, k: Tokens, *, q_tile: int, k_tile: int
) -> Int[Array, "b q_tiles k_tiles"]:
    """Of every pair of tiles: 0 if no pair of tokens is visible, 2 if all are, else 1 (which a tile
    of more than two kinds of tokens gets in any case). Tokens must fill whole tiles."""
    queries, keys = _tiles(q, q_tile), _tiles(k, k_tile)
    rows = _by_rows(lambda tile: _kinds(queries, keys, "query", tile), queries.simple.shape[1])
    return jnp.swapaxes(rows, 0, 1)


def known(*tokens: Tokens) -> bool:
    """Whether all columns have values while tracing."""
    columns = (getattr(part, name) for part in tokens for name in COLUMNS)
    return not any(isinstance(column, jax.core.Tracer) for column in columns)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Computes with known values while tracing, on a device that is here: the program may be for
    one that is not."""
    with jax.ensure_compile_time_eval(), jax.default_device(jax.local_devices()[0]):
        yield


def density(tiles: TileMap, columns: int) -> float:
    """The share of all pairs of tiles that is visited; rows have `columns` tiles."""
    return float(tiles.count.sum()) / (tiles.count.size * columns)


def pad_tokens(tokens: Tokens, tile: int) -> Tokens:
    """Columns `[b, l']` with `l'` a multiple of `tile`; padding sees nothing and is not seen."""
    rest = -len(tokens) % tile

    def padded(name: str) -> Array:
        column = jnp.atleast_2d(getattr(tokens, name))
        fill = EMPTY if name == "chunk" else 0
        return jnp.pad(column, ((0, 0), (0, rest)), constant_values=fill)

    columns: list[Any] = [padded(name) for name in COLUMNS]
    return Tokens(jnp.zeros((*columns[0].shape, 3), jnp.int32), *columns)


@flax.struct.dataclass
class _Tiles:
    """First and last token of every tile, and whether all its tokens are like one of the two."""

    ends: Tokens  # columns [b, 2 tiles]
    simple: Bool[Array, "b tiles"]


def _tile_map(q: Tokens, k: Tokens, q_tile: int, k_tile: int, rows: Rows, ranges: int | None):
    queries, keys = _tiles(q, q_tile), _tiles(k, k_tile)
    own, others = (queries, keys) if rows == "query" else (keys, queries)
    if ranges is None:
        ranges = max(1, int(_needed(own, others, rows)))
    return _collect(own, others, rows, ranges)


@functools.partial(jax.jit, static_argnames="size")
def _tiles(tokens: Tokens, size: int) -> _Tiles:
    def split(name: str) -> Array:
        column = jnp.atleast_2d(getattr(tokens, name))
        return column.reshape(column.shape[0], -1, size)

    columns = jnp.stack([split(name).astype(jnp.int32) for name in COLUMNS])
    ends = columns[..., jnp.array([0, -1])]
    like = [(columns == ends[..., i : i + 1]).all(0) for i in range(2)]
    flat = ends.reshape(*ends.shape[:2], -1)
    rows: dict[str, Any] = dict(zip(COLUMNS, flat, strict=True))
    rows["noisy"] = rows["noisy"].astype(bool)
    return _Tiles(Tokens(jnp.zeros((*flat.shape[1:], 3)), **rows), (like[0] | like[1]).all(-1))


def _kinds(own: _Tiles, others: _Tiles, rows: Rows, tile: Array) -> Int[Array, "b others"]:
    """For one tile and every other: 0 no visible pair, 1 perhaps some, 2 all."""
    mine = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, 2 * tile, 2, 1), own.ends)
    if rows == "query":
        pairs = visible(mine, others.ends).swapaxes(1, 2)
    else:
        pairs = visible(others.ends, mine)
    pairs = pairs.reshape(pairs.shape[0], -1, 4)  # of [b, 2 others, 2]
    kinds = pairs.any(-1).astype(jnp.int32) + pairs.all(-1)
    simple = lax.dynamic_slice_in_dim(own.simple, tile, 1, 1) & others.simple
    return jnp.where(simple, kinds, 1)


@functools.partial(jax.jit, static_argnames="rows")
def _needed(own: _Tiles, others: _Tiles, rows: Rows) -> Int[Array, ""]:
    """The most ranges of any row."""

    def needed(tile: Array) -> Array:
        return _begins(_kinds(own, others, rows, tile)).sum(-1).max()

    return _by_rows(needed, own.simple.shape[1]).max()


@functools.partial(jax.jit, static_argnames=("rows", "ranges"))
def _collect(own: _Tiles, others: _Tiles, rows: Rows, ranges: int) -> TileMap:
    def made(tile: Array) -> tuple[Array, ...]:
        return _ranges(_kinds(own, others, rows, tile), ranges)

    parts = _by_rows(made, own.simple.shape[1])
    return TileMap(*(jnp.swapaxes(x, 0, 1) for x in parts))


def _by_rows(function: Callable[[Array], Any], rows: int) -> Any:
    """`function` of every row's number, stacked; the last row fills up the last time around."""
    size = min(rows, ROWS_AT_ONCE)
    times = -(-rows // size)
    numbers = jnp.minimum(jnp.arange(times * size), rows - 1).reshape(times, size)
    found = lax.map(jax.vmap(function), numbers)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], found)


def _begins(kinds: Int[Array, "b n"]) -> Bool[Array, "b n"]:
    before = jnp.pad(kinds, ((0, 0), (1, 0)))[:, :-1]
    return (kinds > 0) & (kinds != before)


def _ranges(kinds: Int[Array, "b n"], most: int) -> tuple[Array, ...]:
    """start, stop, full [b, most] and count [b]; the last range takes all that do not fit."""
    n = kinds.shape[1]
    begins, ends = _begins(kinds), _begins(kinds[:, ::-1])[:, ::-1]
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
