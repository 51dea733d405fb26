"""Tile maps against the mask itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.layout import grid, teacher_forcing, windowed
from pallas_kernels.attention.tilemap import TileMap, density, pad_tokens, tile_map
from pallas_kernels.tokens import Tokens, concat, visible
from tests.pallas_kernels import hlo

CUTS = np.array([False, False, True, False, False, True, False, False])


def interleaved(ranks):
    """Balanced order: the clean and the noisy tokens of each rank's frames, rank after rank."""
    parts = []
    for rank in range(ranks):
        for noisy in (False, True):
            parts.append(grid(2, 2, 3, chunk_frames=1, start=2 * rank, noisy=noisy))
    return concat(*parts)


LAYOUTS = {
    "teacher forcing": lambda: teacher_forcing(8, 4, 4, chunk_frames=2),
    "ranks": lambda: interleaved(4),
    "block-causal": lambda: grid(8, 3, 5, chunk_frames=2),
    "one chunk": lambda: grid(4, 3, 5, chunk_frames=4),
    "window and sinks": lambda: windowed(
        teacher_forcing(8, 5, 5, chunk_frames=1), jnp.asarray(CUTS), window=4, global_sinks=1
    ),
    "cuts differ": lambda: windowed(
        teacher_forcing(8, 5, 5, chunk_frames=1),
        jnp.stack([jnp.asarray(CUTS), jnp.zeros(8, bool)]), window=4, global_sinks=1,
    ),
}  # fmt: skip


def tile_maps(q: Tokens, k: Tokens, **sizes: int) -> list[TileMap]:
    """The map of query tiles and the map of key tiles."""
    return [tile_map(q, k, rows=rows, **sizes) for rows in ("query", "key")]


def dense(tokens: Tokens, q_tile: int, k_tile: int) -> np.ndarray:
    """Kinds of all pairs of tiles [b, q tiles, k tiles]: 0 masked, 1 mixed, 2 fully visible."""
    mask = np.asarray(visible(pad_tokens(tokens, q_tile), pad_tokens(tokens, k_tile)))
    b, length, keys = mask.shape
    mask = mask.reshape(b, length // q_tile, q_tile, keys // k_tile, k_tile)
    return mask.any((2, 4)).astype(int) + mask.all((2, 4))


def spread(tiles: TileMap, columns: int) -> np.ndarray:
    """The kinds of a map as [b, rows, columns]."""
    tiles = jax.tree.map(np.asarray, tiles)
    kinds = np.zeros((*tiles.count.shape, columns), int)
    for index in np.ndindex(*tiles.start.shape):
        start, stop, full = (int(x[index]) for x in (tiles.start, tiles.stop, tiles.full))
        assert (kinds[index[:2]][start:stop] == 0).all(), "ranges overlap"
        kinds[index[:2]][start:stop] = 1 + full
    np.testing.assert_array_equal((kinds > 0).sum(-1), tiles.count)
    return kinds


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("q_tile", "k_tile"), [(8, 8), (16, 4)])
def test_ranges_are_the_tiles_of_the_mask(layout, q_tile, k_tile):
    tokens = LAYOUTS[layout]()
    q, k = pad_tokens(tokens, q_tile), pad_tokens(tokens, k_tile)
    by_query, by_key = tile_maps(q, k, q_tile=q_tile, k_tile=k_tile)
    want = dense(tokens, q_tile, k_tile)
    for got in (spread(by_query, want.shape[2]), spread(by_key, want.shape[1]).swapaxes(1, 2)):
        np.testing.assert_array_equal(got == 2, (want == 2) & (got == 2))  # full tiles are full
        assert (got[want > 0] > 0).all()  # every tile with a visible pair is covered
        if max(q_tile, k_tile) <= 8 and layout != "ranks":  # at most two kinds of tokens per tile
            np.testing.assert_array_equal(got, want)


def test_rows_are_ordered_by_falling_number_of_tiles():
    tokens = pad_tokens(LAYOUTS["cuts differ"](), 8)
    for tiles in tile_maps(tokens, tokens, q_tile=8, k_tile=8):
        counts, order = np.asarray(tiles.count), np.asarray(tiles.order)
        assert counts.shape[0] == 2 and len(np.unique(counts)) > 2
        for count, rows in zip(counts, order, strict=True):
            np.testing.assert_array_equal(np.sort(rows), np.arange(len(rows)))
            assert (np.diff(count[rows]) <= 0).all()


def test_traced_columns_give_the_same_map():
    tokens = LAYOUTS["window and sinks"]()
    q = pad_tokens(tokens, 8)
    known = tile_maps(q, q, q_tile=8, k_tile=8)
    traced = jax.jit(lambda t: tile_maps(t, t, q_tile=8, k_tile=8))(q)
    columns = q.chunk_index.shape[1] // 8
    for a, b in zip(known, traced, strict=True):
        np.testing.assert_array_equal(spread(a, columns), spread(b, columns))


def test_rows_are_computed_64_at_a_time():
    """150 rows take three iterations, whose arrays cover 64 rows."""
    tokens = grid(150, 2, 4, chunk_frames=1)
    q, columns = pad_tokens(tokens, 8), 150

    def run(t):
        return tile_maps(t, t, q_tile=8, k_tile=8)

    jitted = jax.jit(run)
    for known, traced in zip(run(q), jitted(q), strict=True):
        np.testing.assert_array_equal(spread(traced, columns), spread(known, columns))
    want = dense(tokens, 8, 8)
    np.testing.assert_array_equal(spread(run(q)[0], columns), want)
    program = jitted.lower(q).compile().as_text()
    assert hlo.loop_lengths(program) == [3, 3]
    assert hlo.largest_array(program) <= 64 * columns * 4  # both ends of 64 tiles and of all


def test_traced_columns_of_many_ranks_lose_nothing():
    tokens = pad_tokens(interleaved(16), 4)
    known = tile_map(tokens, tokens, q_tile=4, k_tile=4, rows="query")
    traced = jax.jit(lambda t: tile_map(t, t, q_tile=4, k_tile=4, rows="query"))(tokens)
    assert known.start.shape[-1] > 16
    np.testing.assert_array_equal(known.count, traced.count)


def test_the_last_range_covers_the_rest_if_there_are_too_many():
    tokens = interleaved(4)
    q = pad_tokens(tokens, 6)
    few = tile_map(q, q, q_tile=6, k_tile=6, rows="query", ranges=2)
    all_of_them = tile_map(q, q, q_tile=6, k_tile=6, rows="query")
    assert all_of_them.start.shape[-1] > 2
    got, want = (spread(x, q.chunk_index.shape[1] // 6) for x in (few, all_of_them))
    assert (got[want > 0] > 0).all() and (want[got == 2] == 2).all()


def test_a_minute_of_video_needs_memory_for_its_tiles_only():
    tokens = teacher_forcing(384, 22, 40, chunk_frames=8)
    assert len(tokens) == 675_840
    by_query, by_key = tile_maps(tokens, tokens, q_tile=128, k_tile=128)
    tiles = len(tokens) // 128
    for part in (by_query, by_key):
        assert sum(x.size for x in jax.tree.leaves(part)) <= 25 * tiles
    assert 0.2 < density(by_query, tiles) < 0.3
    assert int(by_query.count.sum()) == int(by_key.count.sum())
