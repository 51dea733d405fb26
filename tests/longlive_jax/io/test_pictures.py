"""Conversion between pixels and bytes, conditioning images, and strips."""

import numpy as np
import pytest
from PIL import Image

from longlive_jax.io.pictures import add_caption, read_image, strip, to_pixels, to_uint8
from longlive_jax.spec import UserError


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


def grey_ramp(dtype, top):
    return np.broadcast_to(np.linspace(0, top, 64), (64, 64)).astype(dtype)


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("16 bits.png", grey_ramp(np.uint16, 65535)),
        ("16 bits.tif", grey_ramp(np.uint16, 65535)),
        ("0 to 1.tif", grey_ramp(np.float32, 1)),
        ("0 to 255.tif", grey_ramp(np.float32, 255)),
    ],
)
def test_a_ramp_of_more_than_8_bits_stays_a_ramp(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    image = to_uint8(read_image(tmp_path / name, (64, 64)))
    ramp = np.linspace(0, 255, 64)
    assert np.abs(image[32].astype(float) - ramp[:, None]).max() <= 1


def test_floats_without_a_known_range_are_refused(tmp_path):
    for i, value in enumerate((-1.0, 300.0, np.nan)):
        Image.fromarray(np.full((8, 8), value, np.float32)).save(tmp_path / f"{i}.tif")
        with pytest.raises(UserError, match=r"not a readable image: grey values must be in \[0, "):
            read_image(tmp_path / f"{i}.tif", (32, 32))


def test_transparent_pixels_are_white(tmp_path):
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 0], pixels[:16, :, 3] = 255, 255  # opaque red above, transparent below
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    image.quantize(4).save(tmp_path / "b.png")
    Image.fromarray(pixels[..., [0, 3]]).save(tmp_path / "c.png")  # grey with alpha
    for name, above in (("a", (255, 0, 0)), ("b", (255, 0, 0)), ("c", (255, 255, 255))):
        read = to_uint8(read_image(tmp_path / f"{name}.png", (32, 32)))
        assert (read[4, 4] == above).all() and (read[28, 28] == 255).all(), name


def test_cmyk_pictures_keep_their_colours(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "a.tif")  # pure red
    assert (to_uint8(read_image(tmp_path / "a.tif", (32, 32)))[16, 16] == (255, 0, 0)).all()


def test_a_strip_notes_captions_that_no_font_can_show(tmp_path):
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    notes = strip(tmp_path / "a.png", [frames] * 2, ["caf\u00e9", "\ue123 is for private use"])
    assert len(notes) == 1 and notes[0].startswith("caption 2: no installed font has")
    assert "\\ue123" in notes[0]


def test_a_caption_is_below_the_frames():
    frames = np.full((3, 64, 128, 3), 7, np.uint8)
    captioned = add_caption(frames, "a red circle moves left on a mint background")
    assert captioned.shape[0] == 3 and captioned.shape[2] == 128
    assert (captioned[:, :64] == 7).all()
    assert captioned[0, 64:].min() < 100 and captioned[0, 64:].max() == 255  # text on white
