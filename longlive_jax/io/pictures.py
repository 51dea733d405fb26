"""Still pictures: conditioning images in, strips of frames out."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from longlive_jax.spec import UserError

MARGIN = 6
FONT_SIZE = 15
INK, PAPER = (20, 20, 20), (255, 255, 255)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Pixels in [-1, 1] (clipped) to uint8 [0, 255], rounded; uint8 passes through.

    Raises ValueError for anything that is not finite: such a pixel has no colour.
    """
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return frames
    frames = frames.astype(np.float32)
    if not np.isfinite(frames).all():
        raise ValueError("frames hold values that are not finite; the sampler has diverged")
    return np.rint((np.clip(frames, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] to float32 in [-1, 1]; the inverse of `to_uint8`."""
    return np.asarray(frames, np.float32) / 127.5 - 1.0


def _open(path: str | Path) -> Image.Image:
    """The decoded picture, upright and in RGB."""
    if not Path(path).is_file():
        raise UserError(f"image {path} does not exist")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no readable image: {error}") from error


def check_image(path: str | Path) -> None:
    """UserError unless `path` is a picture that decodes to its end."""
    _open(path)


def read_image(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A picture as float32 `[h, w, 3]` in [-1, 1].

    It is scaled to cover `size` (height, width) with its aspect ratio kept, then cropped centrally.
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
    """Writes a PNG with one row a shot: its caption above `columns` frames spread evenly over it.

    `shots[i]` is `[f, h, w, 3]`, uint8 or float in [-1, 1]; a shot with fewer frames fills fewer
    cells. Small frames are enlarged by a whole factor without smoothing, large ones reduced.
    """
    if not shots or len(shots) != len(captions):
        raise ValueError(f"{len(shots)} shots and {len(captions)} captions; need one each")
    rows = [_cells(shot, columns, cell_width) for shot in shots]
    inner = columns * (rows[0][0].width + MARGIN) - MARGIN
    font = ImageFont.load_default(FONT_SIZE)
    per_line = max(20, int(inner / font.getlength("n")))
    texts = [textwrap.wrap(f"{i + 1}. {caption}", per_line) for i, caption in enumerate(captions)]
    line = FONT_SIZE + 4
    heights = [
        len(text) * line + row[0].height + 3 * MARGIN for text, row in zip(texts, rows, strict=True)
    ]
    sheet = Image.new("RGB", (inner + 2 * MARGIN, sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for text, row, height in zip(texts, rows, heights, strict=True):
        draw.multiline_text((MARGIN, top), "\n".join(text), fill=INK, font=font, spacing=4)
        for column, cell in enumerate(row):
            left = MARGIN + column * (cell.width + MARGIN)
            sheet.paste(cell, (left, top + len(text) * line + MARGIN))
        top += height
    sheet.save(path)


def _cells(shot: np.ndarray, columns: int, cell_width: int) -> list[Image.Image]:
    shot = np.asarray(shot)
    if shot.ndim != 4 or shot.shape[-1] != 3 or not len(shot):
        raise ValueError(f"a shot is [f, h, w, 3] with at least one frame, got {shot.shape}")
    picks = np.unique(np.rint(np.linspace(0, len(shot) - 1, columns)).astype(int))
    height, width = shot.shape[1:3]
    if width * 2 <= cell_width:
        factor = cell_width // width
        size, filter = (width * factor, height * factor), Image.Resampling.NEAREST
    else:
        size = (cell_width, max(1, round(height * cell_width / width)))
        filter = Image.Resampling.LANCZOS
    return [Image.fromarray(to_uint8(shot[i])).resize(size, filter) for i in picks]
