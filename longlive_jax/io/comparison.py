"""Pictures of several videos of equal length: side by side, and as a strip with a row for each."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longlive_jax.io.fonts import caption_font, wrap
from longlive_jax.io.pictures import (
    BACKGROUND,
    FONT_SIZE,
    MARGIN,
    TEXT_COLOUR,
    default_scale,
    enlarge,
    picture_cells,
    unreadable_note,
)
from longlive_jax.typing import UInt8

__all__ = ["SideBySide", "StripShot", "comparison_strip"]

LINE = FONT_SIZE + 4
LABEL_WIDTH = 150
"""Widest column of labels in a strip, in pixels."""
MAX_LABEL_LINES = 3
"""Most lines of a label above a video."""
MAX_WIDTH = 3840
"""Widest side-by-side video in pixels; wider ones are reduced."""
ASPECT = 16 / 9
"""Aspect ratio that the grid of a side-by-side video is chosen to be nearest to."""


@dataclasses.dataclass(frozen=True)
class StripShot:
    """The columns of a shot in a strip.

    Attributes:
      caption: text above them.
      times: text above each column.
    """

    caption: str
    times: tuple[str, ...]


def comparison_strip(
    path: str | Path,
    rows: Sequence[UInt8[np.ndarray, "k h w 3"]],
    labels: Sequence[str],
    shots: Sequence[StripShot],
    *,
    cell_width: int = 192,
) -> tuple[str, ...]:
    """Writes a PNG with a row per video and a column per moment, under the captions of the shots.

    Args:
      path: file to write.
      rows: frames of every video at the moments of all shots, in order.
      labels: name of each video.
      shots: captions and times of the columns.
      cell_width: width of a frame in pixels, as in `pictures.strip`.

    Returns a note for each label and caption with characters that no installed font has.
    """
    # 1. Cells and texts.
    cells = [picture_cells(row, len(row), cell_width) for row in rows]
    width, height = cells[0][0].size
    names = [_lines(label, LABEL_WIDTH) for label in labels]
    left = 2 * MARGIN + max(math.ceil(_width(line)) for lines in names for line in lines)
    spans = [len(shot.times) * (width + MARGIN) - MARGIN for shot in shots]
    texts = [f"{i}. {shot.caption}" for i, shot in enumerate(shots, 1)]
    captions = [_lines(text, span) for text, span in zip(texts, spans, strict=True)]
    head = LINE * (1 + max(map(len, captions))) + 2 * MARGIN
    step = max(height, LINE * max(map(len, names))) + MARGIN
    # 2. Captions and times.
    total = sum(spans) + MARGIN * len(spans)
    sheet = Image.new("RGB", (left + total, head + step * len(rows)), BACKGROUND)
    draw, at = ImageDraw.Draw(sheet), left
    for shot, lines, span in zip(shots, captions, spans, strict=True):
        _write_head(draw, (at, head), shot, lines, width)
        at += span + MARGIN
    # 3. One row per video.
    for i, (row, name) in enumerate(zip(cells, names, strict=True)):
        top = head + i * step
        _write(draw, (MARGIN, top + (step - MARGIN - LINE * len(name)) // 2), name)
        for column, cell in enumerate(row):
            sheet.paste(cell, (left + column * (width + MARGIN), top))
    sheet.save(path)
    return _notes(labels, shots)


def _write_head(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    shot: StripShot,
    caption: Sequence[str],
    width: int,
) -> None:
    """Writes caption and times of a shot above `at`, the top left of its first cell."""
    left, top = at
    _write(draw, (left, MARGIN), caption)
    for i, time in enumerate(shot.times):
        _write(draw, (left + i * (width + MARGIN), top - LINE - MARGIN // 2), [time])


def _notes(labels: Sequence[str], shots: Sequence[StripShot]) -> tuple[str, ...]:
    """Notes on texts with characters that no installed font has."""
    texts = [(f"label {label!r}", label) for label in labels]
    texts += [(f"caption {i}", shot.caption) for i, shot in enumerate(shots, 1)]
    drawn = [(what, *caption_font(text, FONT_SIZE)[1:]) for what, text in texts]
    return tuple(
        unreadable_note(what, missing, readable) for what, readable, missing in drawn if missing
    )


class SideBySide:
    """Draws the frames of several videos in a grid, each under its label, above one caption.

    Attributes:
      size: (height, width) of a drawn frame; even, as H.264 needs.
    """

    def __init__(self, labels: Sequence[str], size: tuple[int, int], *, scale: int | None = None):
        """A grid for videos of `size` (height, width), enlarged by the integer `scale`.

        Without it, small frames are enlarged as in other videos. Frames are reduced where the
        grid would be wider than `MAX_WIDTH`.
        """
        self._scale = default_scale(size) if scale is None else scale
        height, width = size[0] * self._scale, size[1] * self._scale
        self._columns = _columns(len(labels), height, width)
        rows = -(-len(labels) // self._columns)
        # 1. Reduce what would be too wide.
        widest = (MAX_WIDTH - MARGIN) // self._columns - MARGIN
        if width > widest:
            height, width = max(1, round(height * widest / width)), widest
        self._cell = (height, width)
        # 2. Labels above the cells, a caption of two lines below.
        names = [_lines(label, width)[:MAX_LABEL_LINES] for label in labels]
        self._label = LINE * max(map(len, names))
        self._step = (height + self._label + MARGIN, width + MARGIN)
        total = rows * self._step[0] + 2 * LINE + 2 * MARGIN
        across = self._columns * self._step[1] + MARGIN
        self.size = (total + total % 2, across + across % 2)
        self._sheet = Image.new("RGB", self.size[::-1], BACKGROUND)
        draw = ImageDraw.Draw(self._sheet)
        for i, lines in enumerate(names):
            top, left = self._place(i)
            _write(draw, (left, top - LINE * len(lines)), lines)

    def draw(
        self, videos: Sequence[UInt8[np.ndarray, "f h w 3"]], caption: str
    ) -> UInt8[np.ndarray, "f H W 3"]:
        """The frames of all videos, one picture per frame."""
        sheet = self._sheet.copy()
        lines = _lines(caption, self.size[1] - 2 * MARGIN)[:2]
        _write(ImageDraw.Draw(sheet), (MARGIN, self.size[0] - 2 * LINE - MARGIN), lines)
        frames = np.repeat(np.asarray(sheet)[None], len(videos[0]), axis=0)
        height, width = self._cell
        for i, video in enumerate(videos):
            top, left = self._place(i)
            frames[:, top : top + height, left : left + width] = self._resized(video)
        return frames

    def _place(self, index: int) -> tuple[int, int]:
        """Top and left of a cell."""
        row, column = divmod(index, self._columns)
        return row * self._step[0] + self._label + MARGIN // 2, column * self._step[1] + MARGIN

    def _resized(self, video: np.ndarray) -> np.ndarray:
        height, width = self._cell
        if (video.shape[1] * self._scale, video.shape[2] * self._scale) == self._cell:
            return enlarge(video, self._scale)
        method = Image.Resampling.LANCZOS
        pictures = (Image.fromarray(frame).resize((width, height), method) for frame in video)
        return np.stack([np.asarray(picture) for picture in pictures])


def _columns(count: int, height: int, width: int) -> int:
    """Columns of a grid of `count` cells that is nearest to `ASPECT`, with few empty cells."""

    def distance(columns: int) -> float:
        rows = -(-count // columns)
        aspect = columns * (width + MARGIN) / (rows * (height + LINE + MARGIN))
        return abs(math.log(aspect / ASPECT)) + 0.5 * math.log(rows * columns / count)

    return min(range(1, count + 1), key=distance)


def _lines(text: str, width: float) -> list[str]:
    """The wrapped lines of a text; characters that no font has are escaped."""
    font, readable, _ = caption_font(text, FONT_SIZE)
    return wrap(readable, font, width)


def _font(lines: Sequence[str]) -> ImageFont.FreeTypeFont:
    return caption_font("".join(lines), FONT_SIZE)[0]


def _width(line: str) -> float:
    return _font([line]).getlength(line)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str]) -> None:
    draw.multiline_text(at, "\n".join(lines), fill=TEXT_COLOUR, font=_font(lines), spacing=4)
