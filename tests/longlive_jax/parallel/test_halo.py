"""Windows of raw frames against the reference's own table."""

import pytest

from longlive_jax.parallel.halo import equal_windows, windows


@pytest.mark.parametrize(
    ("latents", "want"),
    [
        (96, [(0, 93, 0), (0, 189, 24), (76, 285, 29), (172, 381, 29)]),
        (192, [(0, 189, 0), (76, 381, 29), (268, 573, 29), (460, 765, 29)]),
        (384, [(0, 381, 0), (268, 765, 29), (652, 1149, 29), (1036, 1533, 29)]),
    ],
)
def test_windows_are_the_reference_s(latents, want):
    found = [(w.first, w.last, w.dropped) for w in windows(latents, 4)]
    assert found == want
    for part, w in enumerate(windows(latents, 4)):
        made = (w.frames - 1) // 4 + 1  # 1 + 4n frames give 1 + n latents
        assert made - w.dropped == latents // 4, part


def test_a_halo_costs_what_the_reference_s_does():
    """In raw frames, where the own ones of a device are 96 and 384."""
    assert max(w.frames for w in windows(96, 4)) == 209
    assert max(w.frames for w in windows(384, 4)) == 497
    with pytest.raises(ValueError, match="96 latents do not split"):
        windows(96, 5)


@pytest.mark.parametrize(("latents", "parts"), [(96, 4), (192, 4), (384, 4), (48, 2), (64, 8)])
def test_equal_windows_hold_the_reference_s_and_are_no_longer_than_its_longest(latents, parts):
    cut, equal = windows(latents, parts), equal_windows(latents, parts)
    assert {w.frames for w in equal} == {max(w.frames for w in cut)}
    for part, (theirs, ours) in enumerate(zip(cut, equal, strict=True)):
        assert ours.first <= theirs.first and theirs.last <= ours.last
        assert ours.last <= 1 + 4 * (latents - 1)
        assert ours.first // 4 + ours.dropped == part * latents // parts
