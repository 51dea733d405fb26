"""The chunks in the cache, as literal tables, and their slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import layout
from longlive_jax.models.wan.cache import CachePolicy, empty_cache
from longlive_jax.models.wan.config import DiTConfig

CONFIG = DiTConfig(
    dim=24, ffn_dim=8, freq_dim=8, text_dim=8, heads=2, layers=2, in_channels=4, out_channels=4
)
SIZE = (2, 1, 2)

TRACES = {
    # cuts -> chunk -> chunks attended while it is denoised; window 4, one global sink
    (): {0: "0", 1: "0 1", 2: "0 1 2", 3: "0 1 2 3", 4: "0 2 3 4", 5: "0 3 4 5", 7: "0 5 6 7"},
    (5,): {5: "0 3 4 5", 6: "0 4 5 6", 7: "0 5 6 7", 8: "0 5 7 8", 9: "0 5 8 9", 10: "0 5 9 10"},
    (2, 6): {4: "0 2 3 4", 5: "0 2 4 5", 6: "0 2 5 6", 7: "0 5 6 7", 8: "0 6 7 8", 9: "0 6 8 9"},
    (4, 5): {5: "0 3 4 5", 6: "0 4 5 6", 7: "0 5 6 7", 8: "0 5 7 8"},
}


def attended(policy, cuts, chunks=11):
    """The chunks attended while each chunk is denoised, sample by sample, from the cache itself."""
    batch = len(cuts)
    cache = empty_cache(CONFIG, batch, SIZE, policy)
    kv = jnp.zeros((CONFIG.layers, batch, 4, CONFIG.heads, CONFIG.head_dim))
    write = jax.jit(
        lambda cache, cut: cache.before_write(cut).write(kv, kv, cut=cut), donate_argnums=0
    )
    windows = []
    for chunk in range(chunks):
        windows.append(
            [sorted({*row[row >= 0].tolist(), chunk}) for row in np.asarray(cache.slot_chunk)]
        )
        cache = write(cache, jnp.array([chunk in sample for sample in cuts]))
    return list(zip(*windows, strict=True))


def numbers(text):
    return [int(word) for word in text.split()]


def test_attended_sets_equal_the_reference():
    """All four traces in one batch, whose samples cut at different times."""
    for sample, (cuts, want) in zip(
        attended(CachePolicy(), list(TRACES)), TRACES.items(), strict=True
    ):
        assert {chunk: sample[chunk] for chunk in want} == {
            c: numbers(t) for c, t in want.items()
        }, cuts


@pytest.mark.parametrize(
    ("policy", "want"),
    [
        ({"global_sinks": 0, "shot_sinks": False}, {3: "0 1 2 3", 4: "1 2 3 4", 7: "4 5 6 7"}),
        ({"global_sinks": 1, "shot_sinks": False}, {4: "0 2 3 4", 6: "0 4 5 6", 8: "0 6 7 8"}),
        (
            {"global_sinks": 0},
            {4: "0 2 3 4", 5: "0 3 4 5", 6: "3 4 5 6", 8: "5 6 7 8", 9: "5 7 8 9"},
        ),
        ({"global_sinks": 2}, {4: "0 1 3 4", 5: "0 1 4 5", 6: "0 1 5 6", 7: "0 1 5 7"}),
        ({"window": 3}, {4: "0 3 4", 5: "0 4 5", 6: "0 5 6", 7: "0 5 7"}),
        ({"clean_recache": True}, {5: "0 3 4 5", 6: "0 5 6", 7: "0 5 6 7", 8: "0 5 7 8"}),
    ],
)
def test_policies_with_a_cut_at_5(policy, want):
    (sample,) = attended(CachePolicy(**policy), [(5,)])
    assert {chunk: sample[chunk] for chunk in want} == {c: numbers(t) for c, t in want.items()}


@pytest.mark.parametrize("global_sinks", [0, 1, 2])
@pytest.mark.parametrize("shot_sinks", [False, True])
def test_cache_and_layout_agree(global_sinks, shot_sinks):
    """The masks of training and the cache of sampling have the same chunks."""
    rng = np.random.default_rng(0)
    cuts = rng.random((8, 24)) < 0.25
    cuts[:, 0] = True
    policy = CachePolicy(window=5, global_sinks=global_sinks, shot_sinks=shot_sinks)
    window_start, sink = layout.windows(
        jnp.asarray(cuts), window=5, global_sinks=global_sinks, shot_sink=shot_sinks
    )
    got = attended(policy, [set(np.flatnonzero(row[1:]) + 1) for row in cuts], chunks=24)
    for b, sample in enumerate(got):
        for chunk, window in enumerate(sample):
            want = [
                c
                for c in range(chunk + 1)
                if c >= window_start[b, chunk] or c == sink[b, chunk] or c < global_sinks
            ]
            assert window == want, (b, chunk)


def test_slots_fill_in_order_and_keep_their_position():
    cache = empty_cache(CONFIG, 1, SIZE, CachePolicy())
    kv = jnp.ones((CONFIG.layers, 1, 4, CONFIG.heads, CONFIG.head_dim))
    for chunk in range(5):
        frames = cache.upcoming(10, noisy=True).pos[0, ::2, 0]
        np.testing.assert_array_equal(frames, [2 * chunk + 10, 2 * chunk + 11])
        cache = cache.write((chunk + 1.0) * kv, kv, cut=jnp.array([False]), shot_rope_offset=10)
    np.testing.assert_array_equal(cache.slot_chunk, [[0, 3, 4]])
    np.testing.assert_array_equal(cache.k[1, 0, :, 0, 0, 0], [1, 4, 5])
    np.testing.assert_array_equal(cache.tokens().pos[0, ::4, 0], [10, 16, 18])
    np.testing.assert_array_equal(cache.tokens().chunk_index[0, ::4], [0, 3, 4])


def test_relative_positions_are_those_of_the_window():
    cache = empty_cache(CONFIG, 1, SIZE, CachePolicy(relative_rope=True))
    kv = jnp.zeros((CONFIG.layers, 1, 4, CONFIG.heads, CONFIG.head_dim))
    for _ in range(6):
        cache = cache.write(kv, kv, cut=jnp.array([False]), shot_rope_offset=99)
    slot_chunk = np.asarray(cache.slot_chunk)[0]
    order = np.argsort(np.argsort(slot_chunk))
    np.testing.assert_array_equal(cache.tokens().pos[0, ::4, 0], 2 * order)
    assert int(cache.upcoming(noisy=True).pos[0, 0, 0]) == 2 * len(slot_chunk)


def test_a_full_set_of_sinks_drops_the_chunk():
    cache = empty_cache(CONFIG, 1, SIZE, CachePolicy(window=3, global_sinks=2, shot_sinks=False))
    kv = jnp.ones((CONFIG.layers, 1, 4, CONFIG.heads, CONFIG.head_dim))
    for chunk in range(4):
        cache = cache.write((chunk + 1.0) * kv, kv, cut=jnp.array([False]))
    np.testing.assert_array_equal(cache.slot_chunk, [[0, 1]])
    np.testing.assert_array_equal(cache.k[0, 0, :, 0, 0, 0], [1, 2])


def test_writing_happens_in_place():
    cache = empty_cache(CONFIG, 3, SIZE, CachePolicy(window=9))
    kv = jnp.zeros((CONFIG.layers, 3, 4, CONFIG.heads, CONFIG.head_dim))
    write = jax.jit(lambda c, kv, cut: c.write(kv, kv, cut=cut), donate_argnums=0)
    compiled = write.lower(cache, kv, jnp.zeros(3, bool)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes
    assert memory.temp_size_in_bytes < cache.k.nbytes
    pointer = cache.k.unsafe_buffer_pointer()
    assert write(cache, kv, jnp.zeros(3, bool)).k.unsafe_buffer_pointer() == pointer


def test_a_window_too_small_for_its_sinks_is_refused():
    with pytest.raises(ValueError, match=r"window must be >= 4 .*, got 3"):
        CachePolicy(window=3, global_sinks=2, shot_sinks=True)
