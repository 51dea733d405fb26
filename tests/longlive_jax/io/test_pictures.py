"""Conversion between pixels and bytes, conditioning images, and strips."""

import numpy as np
import pytest
from PIL import Image

from longlive_jax.io.pictures import read_image, strip, to_pixels, to_uint8


def test_bytes_survive_a_round_trip():
    values = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(to_pixels(values)), values)
    np.testing.assert_array_equal(
        to_uint8(np.array([-9.0, -1.0, 0.0, 1.0, 9.0])), [0, 0, 128, 255, 255]
    )


def test_images_are_scaled_to_cover_and_cropped_centrally(tmp_path):
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:200] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", (64, 64))
    assert image.shape == (64, 64, 3) and image.dtype == np.float32
    assert image.min() > 0.9  # only the white centre remains


def test_grey_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P"):
        Image.new(mode, (40, 30)).save(tmp_path / f"{mode}.png")
        assert read_image(tmp_path / f"{mode}.png", (32, 32)).shape == (32, 32, 3)


@pytest.mark.parametrize("size", [(64, 96), (704, 1280)])
def test_a_strip_has_one_row_per_shot(tmp_path, size):
    shots = [np.full((9, *size, 3), v, np.float32) for v in (-0.5, 0.5)] + [
        np.zeros((2, *size, 3), np.uint8)
    ]
    strip(tmp_path / "a.png", shots, ["a long caption " * 30, "b", "c"], columns=4)
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width == 4 * 198 + 6
        assert sheet.height > 3 * 100
    with pytest.raises(ValueError, match="one caption per shot, got 1 for 3 shots"):
        strip(tmp_path / "a.png", shots, ["a"])
    with pytest.raises(ValueError, match="at least one frame"):
        strip(tmp_path / "a.png", [shots[0][:0]], ["a"])
