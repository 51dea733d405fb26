"""Still pictures: conditioning images are read, strips of frames are written."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps

from longlive_jax.io.fonts import caption_font, wrap
from longlive_jax.spec import UserError
from longlive_jax.typing import UInt8

__all__ = [
    "add_caption",
    "check_image",
    "default_scale",
    "enlarge",
    "picture_cells",
    "read_image",
    "strip",
    "to_pixels",
    "to_uint8",
    "unreadable_note",
]

MARGIN = 6
FONT_SIZE = 15
ENLARGED_EDGE = 384
"""Small videos are enlarged to at most this many pixels along the longer edge."""
TEXT_COLOUR, BACKGROUND = (20, 20, 20), (255, 255, 255)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Converts pixels in [-1, 1] (clipped) to uint8 in [0, 255], rounded; uint8 passes through.

    Raises ValueError if a value is not finite.
    """
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return frames
    frames = frames.astype(np.float32)
    if not np.isfinite(frames).all():
        bad = int((~np.isfinite(frames)).sum())
        raise ValueError(
            f"{bad} of {frames.size} pixel values are not finite: the sampler has diverged; try "
            "dtype float32 or less guidance"
        )
    return np.rint((np.clip(frames, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """Converts uint8 in [0, 255] to float32 in [-1, 1]: the inverse of `to_uint8`."""
    return np.asarray(frames, np.float32) / 127.5 - 1.0


def default_scale(size: tuple[int, int]) -> int:
    """The integer by which frames of `size` (height, width) are enlarged in files for viewing."""
    return max(1, ENLARGED_EDGE // max(size))


def enlarge(frames: UInt8[np.ndarray, "f h w 3"], scale: int) -> UInt8[np.ndarray, "f H W 3"]:
    """Frames with every pixel repeated as a square of `scale` x `scale` pixels."""
    return frames if scale == 1 else frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _open(path: str | Path) -> Image.Image:
    """The decoded picture, upright and in RGB."""
    if not Path(path).is_file():
        raise UserError(f"image {path} does not exist; check the path")
    try:
        with Image.open(path) as image:
            return _to_rgb(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in 8-bit RGB.

    Integers of more than 8 bits and floats are scaled, transparent pixels are composed with white,
    and CMYK is converted by its colour profile if it has one. Raises ValueError for floats that are
    not finite or lie outside [0, 1] and [0, 255].
    """
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_scaled_to_uint8(np.asarray(image))).convert("RGB")
    if image.mode == "CMYK" and image.info.get("icc_profile"):
        source = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        assert converted is not None  # only `inPlace` returns nothing
        return converted
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled_to_uint8(values: np.ndarray) -> np.ndarray:
    """Grey values of 16-bit integers, or of floats in [0, 1] or [0, 255], as uint8."""
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    top = 1.0 if high <= 1 else 255.0
    if np.issubdtype(values.dtype, np.integer):
        top = 65535.0
    if not (low >= 0 and high <= top):  # also false for NaN
        raise ValueError(f"grey values must be in [0, {top:g}], got [{low:g}, {high:g}]")
    return np.rint(values.astype(np.float64) * (255.0 / top)).astype(np.uint8)


def check_image(path: str | Path) -> None:
    """Raises UserError unless `path` is a picture that decodes completely."""
    _open(path)


def read_image(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A picture as float32 `[h, w, 3]` in [-1, 1].

    The picture is scaled to cover `size` (height, width), keeping its aspect ratio, and then
    cropped centrally. Raises UserError if it cannot be read.
    """
    height, width = size
    image = ImageOps.fit(_open(path), (width, height), Image.Resampling.LANCZOS)
    return to_pixels(np.asarray(image))


def strip(
    path: str | Path,
    shots: Sequence[np.ndarray],
    captions: Sequence[str],
    *,
    columns: int = 8,
    cell_width: int = 192,
) -> tuple[str, ...]:
    """Writes a PNG with one row per shot: its caption above evenly spaced frames.

    Args:
      path: file to write.
      shots: frames of each shot, `[f, h, w, 3]`, uint8 or float in [-1, 1].
      captions: caption of each shot.
      columns: frames per row; a shot with fewer frames fills fewer cells.
      cell_width: width of a frame in pixels. Smaller frames are enlarged by an integer factor
        without smoothing, larger ones are reduced.

    Returns a note for each caption with characters that no installed font has.
    Raises ValueError if there are no shots, not one caption per shot, or a shot without frames.
    """
    if not shots or len(shots) != len(captions):
        raise ValueError(f"need one caption per shot, got {len(captions)} for {len(shots)} shots")
    # 1. Frames and wrapped captions, and the height of every row.
    rows = [picture_cells(shot, columns, cell_width) for shot in shots]
    inner = columns * (rows[0][0].width + MARGIN) - MARGIN
    fonts, texts, notes = _captions(captions, inner)
    line = FONT_SIZE + 4
    heights = [
        len(text) * line + row[0].height + 3 * MARGIN for text, row in zip(texts, rows, strict=True)
    ]
    # 2. Draw them row by row.
    sheet = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for text, font, row, height in zip(texts, fonts, rows, heights, strict=True):
        draw.multiline_text((MARGIN, top), "\n".join(text), fill=TEXT_COLOUR, font=font, spacing=4)
        for column, cell in enumerate(row):
            left = MARGIN + column * (cell.width + MARGIN)
            sheet.paste(cell, (left, top + len(text) * line + MARGIN))
        top += height
    sheet.save(path)
    return notes


def _captions(
    captions: Sequence[str], width: int
) -> tuple[list[ImageFont.FreeTypeFont], list[list[str]], tuple[str, ...]]:
    """The font and the wrapped, numbered lines of each caption, and notes on unreadable ones."""
    fonts, texts, notes = [], [], []
    for number, caption in enumerate(captions, 1):
        font, text, missing = caption_font(caption, FONT_SIZE)
        fonts.append(font)
        texts.append(wrap(f"{number}. {text}", font, width))
        if missing:
            notes.append(unreadable_note(f"caption {number}", missing, text))
    return fonts, texts, tuple(notes)


def unreadable_note(what: str, missing: str, text: str) -> str:
    """A note on a text with `missing` characters that is drawn as `text` (`fonts.caption_font`)."""
    return (
        f"{what}: no installed font has {missing[:12]!r}, shown as {text[:12]}...; install one, "
        "such as Noto Sans CJK"
    )


def add_caption(
    frames: UInt8[np.ndarray, "f h w 3"], text: str, *, lines: int = 2
) -> UInt8[np.ndarray, "f H w 3"]:
    """Frames with a caption in a band of `lines` lines below them; a longer one is cut."""
    frames = np.asarray(frames)
    width, line = frames.shape[2], FONT_SIZE + 4
    font, readable, _ = caption_font(text, FONT_SIZE)
    shown_lines = wrap(readable, font, width - 2 * MARGIN)[:lines]
    band = Image.new("RGB", (width, lines * line + 2 * MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(band)
    draw.multiline_text(
        (MARGIN, MARGIN), "\n".join(shown_lines), fill=TEXT_COLOUR, font=font, spacing=4
    )
    bands = np.broadcast_to(np.asarray(band), (len(frames), *band.size[::-1], 3))
    return np.concatenate([frames, bands], axis=1)


def picture_cells(shot: np.ndarray, columns: int, cell_width: int) -> list[Image.Image]:
    """At most `columns` evenly spaced frames of a shot, as the cells of a strip.

    Raises ValueError for anything but frames `[f, h, w, 3]`.
    """
    shot = np.asarray(shot)
    if shot.ndim != 4 or shot.shape[-1] != 3 or not len(shot):
        raise ValueError(f"a shot must be [f, h, w, 3] with at least one frame, got {shot.shape}")
    indices = np.unique(np.rint(np.linspace(0, len(shot) - 1, columns)).astype(int))
    height, width = shot.shape[1:3]
    if width * 2 <= cell_width:
        factor = cell_width // width
        size, filter = (width * factor, height * factor), Image.Resampling.NEAREST
    else:
        size = (cell_width, max(1, round(height * cell_width / width)))
        filter = Image.Resampling.LANCZOS
    return [Image.fromarray(to_uint8(shot[i])).resize(size, filter) for i in indices]
