"""Windows of raw frames against the reference's own table."""

import pytest

from longlive_jax.parallel.halo import frames_encoded, windows


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


def test_exchanged_tails_cost_a_device_its_own_frames():
    assert frames_encoded(96, 4) == {"halo": 209, "tails": 97}
    assert frames_encoded(384, 4) == {"halo": 497, "tails": 385}
    with pytest.raises(ValueError, match="96 latents do not split"):
        windows(96, 5)
