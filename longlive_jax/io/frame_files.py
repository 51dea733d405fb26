"""GIFs and folders of PNG frames, written chunk by chunk."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from longlive_jax.io.video_writer import Tags, VideoWriter
from longlive_jax.typing import UInt8

__all__ = ["GIF_FPS", "GifWriter", "PngWriter"]

GIF_FPS = 12.5
"""Highest frame rate of a GIF; of faster videos every second (third, ...) frame is written."""

PALETTE_FRAMES = 8
"""Frames from which the palette of a chunk is made."""


class GifWriter(VideoWriter):
    """A GIF that loops for ever, with a palette for each chunk appended.

    Its tags are a comment at the end of the file. A killed process leaves a part file without that
    end, which players accept. `frames` counts the frames appended, of which at most `GIF_FPS` a
    second are in the file. `colours` is the size of a palette.
    """

    suffix = ".gif"

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float = 24,
        metadata: Tags | None = None,
        colours: int = 255,
    ):
        super().__init__(path, fps=fps, metadata=metadata)
        self._colours = colours
        self._every = math.ceil(self.fps / Fraction(GIF_FPS))

    def _open(self, height: int, width: int) -> None:
        self._container: Any = av.open(
            str(self.part), "w", format="gif", options={"loop": "0", "flush_packets": "1"}
        )
        stream = self._container.add_stream("gif", rate=self.fps / self._every)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        stream.codec_context.time_base = Fraction(1, 100)
        self._stream = stream

    def _encode(self, frames: np.ndarray) -> None:
        used = np.flatnonzero((self.frames + np.arange(len(frames))) % self._every == 0)
        if len(used):
            palette = _palette(frames[used], self._colours)
            argb = _argb(palette)
        for i in used:
            indices = np.asarray(
                Image.fromarray(frames[i]).quantize(palette=palette, dither=Image.Dither.NONE)
            )
            image: Any = (indices, argb)
            frame = av.VideoFrame.from_ndarray(image, format="pal8")
            frame.pts = round((self.frames + int(i)) * 100 / self.fps)
            frame.time_base = Fraction(1, 100)
            self._container.mux(self._stream.encode(frame))
        self.frames += len(frames)

    def _finish(self) -> None:
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()
        comment = "\n".join(f"{name}: {text}" for name, text in self.metadata.items())
        _add_comment(self.part, comment)
        self.part.replace(self.path)

    def _abandon(self) -> None:
        self._container.close()


def _palette(frames: UInt8[np.ndarray, "f h w 3"], colours: int) -> Image.Image:
    """A picture whose palette suits a few of the frames.

    Colours count by the square root of their pixels, so that small parts of the picture keep
    theirs beside a large background.
    """
    picks = np.unique(np.linspace(0, len(frames) - 1, PALETTE_FRAMES).astype(int))
    levels = frames[picks, ::2, ::2].reshape(-1, 3) & 0xF8 | 4  # 32 levels a channel
    distinct, counts = np.unique(levels, axis=0, return_counts=True)
    weighted = distinct.repeat(np.ceil(np.sqrt(counts)).astype(int), axis=0)
    return Image.fromarray(weighted[None]).quantize(
        colours, method=Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE
    )


def _argb(palette: Image.Image) -> np.ndarray:
    """The palette of a picture as uint8 `[256, 4]`: opacity, red, green, blue."""
    colours = np.full((256, 4), 255, np.uint8)
    rgb = np.asarray(palette.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colours[: len(rgb), 1:] = rgb
    return colours


def _add_comment(path: Path, comment: str) -> None:
    """Inserts a comment block before the end of a GIF; other than ASCII is escaped."""
    text = comment.encode("ascii", "backslashreplace")
    blocks = b"".join(
        bytes([len(part)]) + part for part in (text[i : i + 255] for i in range(0, len(text), 255))
    )
    with path.open("r+b") as file:
        file.seek(-1, 2)
        if file.read(1) != b";":
            raise OSError(f"{path.name} has no end")
        file.seek(-1, 2)
        file.write(b"\x21\xfe" + blocks + b"\x00;" if text else b";")


class PngWriter(VideoWriter):
    """A folder `000000.png`, `000001.png`, ..., each with the tags as text chunks.

    Frames are finished as they are appended. Numbered pictures of an earlier video in the folder
    are removed at the first frame.
    """

    suffix = ""

    def __init__(self, path: str | Path, *, fps: float = 24, metadata: Tags | None = None):
        super().__init__(path, fps=fps, metadata=metadata)
        self.part = self.path

    def _open(self, height: int, width: int) -> None:
        self.path.mkdir(exist_ok=True)
        for path in self.path.glob("[0-9]" * 6 + ".png"):
            path.unlink()
        self._info = PngInfo()
        for name, text in self.metadata.items():
            self._info.add_itxt(name.capitalize(), text)

    def _encode(self, frames: np.ndarray) -> None:
        for frame in frames:
            path = self.path / f"{self.frames:06d}.png"
            try:
                Image.fromarray(frame).save(path, pnginfo=self._info)
            except OSError:
                path.unlink(missing_ok=True)  # an incomplete picture
                raise
            self.frames += 1

    def _finish(self) -> None:
        """Nothing is left to do: every frame is complete."""

    def _abandon(self) -> None:
        """Keeps the frames written so far."""
