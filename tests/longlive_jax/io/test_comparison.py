"""Several videos in one picture: where the frames are, and that every size fits."""

import numpy as np
import pytest
from PIL import Image

from longlive_jax.io import fonts
from longlive_jax.io.comparison import MAX_WIDTH, SideBySide, StripShot, comparison_strip


def flat(value, frames=3, size=(64, 64)):
    """Frames of a colour that text does not have."""
    return np.broadcast_to(np.array([value, 0, 90], np.uint8), (frames, *size, 3)).copy()


def test_videos_are_side_by_side(tmp_path):
    """Frames are enlarged and unchanged, in the order of the labels."""
    sheet = SideBySide(["one", "two", "three"], (64, 64))
    values = [60, 120, 180]
    frames = sheet.draw([flat(value) for value in values], "a caption")
    assert frames.shape == (3, *sheet.size, 3) and frames.dtype == np.uint8
    middle = frames[1, sheet.size[0] // 2, :, 0]
    runs = [int((middle == value).sum()) for value in values]
    assert runs == [384, 384, 384]
    assert np.argmax(middle == 60) < np.argmax(middle == 120) < np.argmax(middle == 180)
    assert (frames[0, -50:, :, 0] < 100).any()  # the caption


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("size", [(64, 64), (704, 1280), (1280, 704), (96, 32)])
def test_every_grid_fits(count, size):
    height, width = SideBySide(["label"] * count, size).size
    assert height % 2 == width % 2 == 0 and width <= MAX_WIDTH and height <= 4000
    assert 0.4 < width / height < 5


def test_wide_frames_are_reduced():
    sheet = SideBySide(["a very long label " * 9] * 16, (704, 1280))
    frames = sheet.draw([flat(9, 1, (704, 1280))] * 16, "")
    assert sheet.size[1] <= MAX_WIDTH and (frames[..., 0] == 9).mean() > 0.8


def test_strip_of_rows_and_moments(tmp_path):
    rows = [np.concatenate([flat(v + i, 1) for i in range(3)]) for v in (100, 200)]
    shots = [StripShot("first " * 20, ("0.1 s", "0.2 s")), StripShot("second", ("0.3 s",))]
    comparison_strip(tmp_path / "strip.png", rows, ["a", "a longer label of two lines"], shots)
    with Image.open(tmp_path / "strip.png") as picture:
        pixels = np.asarray(picture)
    for row, values in ((0, (100, 101, 102)), (1, (200, 201, 202))):
        counts = [int((pixels == [value, 0, 90]).all(axis=-1).sum()) for value in values]
        assert counts == [192 * 192] * 3, row
    first = [np.argwhere((pixels == [value, 0, 90]).all(axis=-1))[0] for value in (100, 101, 200)]
    assert first[0][0] == first[1][0] < first[2][0] and first[0][1] == first[2][1] < first[1][1]


def test_texts_that_no_font_has_are_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(fonts, "_installed_fonts", lambda: ())
    fonts._best_font.cache_clear()
    shots = [StripShot("\u96e8", ("0.1 s",))]
    notes = comparison_strip(tmp_path / "strip.png", [flat(9, 1)], ["a"], shots)
    assert len(notes) == 1 and notes[0].startswith("caption 1: no installed font has '\u96e8'")
