"""Halo windows of raw frames against the reference's own table."""

import pytest

from longlive_jax.parallel.halo import equal_windows, halo_windows


@pytest.mark.parametrize(
    ("latents", "want"),
    [
        (96, [(0, 93, 0), (0, 189, 24), (76, 285, 29), (172, 381, 29)]),
        (192, [(0, 189, 0), (76, 381, 29), (268, 573, 29), (460, 765, 29)]),
        (384, [(0, 381, 0), (268, 765, 29), (652, 1149, 29), (1036, 1533, 29)]),
    ],
)
def test_windows_equal_the_reference(latents, want):
    got = [(w.first, w.last, w.dropped) for w in halo_windows(latents, 4)]
    assert got == want
    for shard, w in enumerate(halo_windows(latents, 4)):
        encoded = (w.frames - 1) // 4 + 1  # 1 + 4n frames give 1 + n latents
        assert encoded - w.dropped == latents // 4, shard


def test_a_halo_costs_as_much_as_the_reference():
    """In raw frames; without a halo a device would encode 96 and 384."""
    assert max(w.frames for w in halo_windows(96, 4)) == 209
    assert max(w.frames for w in halo_windows(384, 4)) == 497
    with pytest.raises(ValueError, match="96 latents do not split"):
        halo_windows(96, 5)


@pytest.mark.parametrize(("latents", "num_shards"), [(96, 4), (192, 4), (384, 4), (48, 2), (64, 8)])
def test_equal_windows_contain_the_exact_ones_at_the_longest_length(latents, num_shards):
    exact, equal = halo_windows(latents, num_shards), equal_windows(latents, num_shards)
    assert {w.frames for w in equal} == {max(w.frames for w in exact)}
    for shard, (inner, outer) in enumerate(zip(exact, equal, strict=True)):
        assert outer.first <= inner.first and inner.last <= outer.last
        assert outer.last <= 1 + 4 * (latents - 1)
        assert outer.first // 4 + outer.dropped == shard * latents // num_shards
