"""Still pictures: conditioning images are read, strips of frames are written."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from longlive_jax.spec import UserError

__all__ = ["check_image", "read_image", "strip", "to_pixels", "to_uint8"]

MARGIN = 6
FONT_SIZE = 15
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


def _open(path: str | Path) -> Image.Image:
    """The decoded picture, upright and in RGB."""
    if not Path(path).is_file():
        raise UserError(f"image {path} does not exist; check the path")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image: {error}") from error


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
) -> None:
    """Writes a PNG with one row per shot: its caption above evenly spaced frames.

    Args:
      path: file to write.
      shots: frames of each shot, `[f, h, w, 3]`, uint8 or float in [-1, 1].
      captions: caption of each shot.
      columns: frames per row; a shot with fewer frames fills fewer cells.
      cell_width: width of a frame in pixels. Smaller frames are enlarged by an integer factor
        without smoothing, larger ones are reduced.

    Raises ValueError if there are no shots, not one caption per shot, or a shot without frames.
    """
    if not shots or len(shots) != len(captions):
        raise ValueError(f"need one caption per shot, got {len(captions)} for {len(shots)} shots")
    # 1. Frames and wrapped captions, and the height of every row.
    rows = [_cells(shot, columns, cell_width) for shot in shots]
    inner = columns * (rows[0][0].width + MARGIN) - MARGIN
    font = ImageFont.load_default(FONT_SIZE)
    per_line = max(20, int(inner / font.getlength("n")))
    texts = [textwrap.wrap(f"{i + 1}. {caption}", per_line) for i, caption in enumerate(captions)]
    line = FONT_SIZE + 4
    heights = [
        len(text) * line + row[0].height + 3 * MARGIN for text, row in zip(texts, rows, strict=True)
    ]
    # 2. Draw them row by row.
    sheet = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for text, row, height in zip(texts, rows, heights, strict=True):
        draw.multiline_text((MARGIN, top), "\n".join(text), fill=TEXT_COLOUR, font=font, spacing=4)
        for column, cell in enumerate(row):
            left = MARGIN + column * (cell.width + MARGIN)
            sheet.paste(cell, (left, top + len(text) * line + MARGIN))
        top += height
    sheet.save(path)


def _cells(shot: np.ndarray, columns: int, cell_width: int) -> list[Image.Image]:
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
