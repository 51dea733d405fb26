"""Video files: formats by name, a video written in one call, and the readers."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.io.decoding import BT709, read_frames, read_video, video_fps
from longlive_jax.io.frame_files import GifWriter, PngWriter
from longlive_jax.io.video_writer import Mp4Writer, Tags, VideoWriter, WebmWriter
from longlive_jax.spec import UserError, nearest

__all__ = [
    "BT709",
    "FORMATS",
    "GifWriter",
    "Mp4Writer",
    "PngWriter",
    "VideoWriter",
    "WebmWriter",
    "parse_formats",
    "read_frames",
    "read_video",
    "video_fps",
    "write_video",
]

FORMATS: dict[str, type[VideoWriter]] = {
    "mp4": Mp4Writer,
    "webm": WebmWriter,
    "gif": GifWriter,
    "png": PngWriter,
}
"""Writer of each format, by its name on the command line."""

CHUNK = 32
"""Frames converted at once."""


def parse_formats(text: str) -> tuple[str, ...]:
    """The formats of a comma-separated list, without repeats. Raises UserError for unknown ones."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    for name in names:
        if name not in FORMATS:
            raise UserError(f"unknown format {name!r}{nearest(name, FORMATS)}")
    return names


def write_video(
    path: str | os.PathLike, frames: Any, fps: float = 24, metadata: Tags | None = None
) -> Path:
    """Writes a video in the format of the path's suffix: .mp4 (H.264), .webm (VP9) or .gif.

        write_video("out/video.mp4", pipe.sample("a red circle moves left on a mint background"))

    Args:
      path: file to write; its folder is created, and an existing file is replaced.
      frames: uint8, or floats in [-1, 1]; `[f, h, w, 3]`, or `[1, f, h, w, 3]` as from
        `Pipeline.sample`.
      fps: frames per second. A GIF has at most 12.5, so it may leave out frames.
      metadata: tags of the file by name, such as title, comment and description.

    Returns:
      The path.

    Raises TypeError or UserError naming the argument that is wrong, and Failure if the file cannot
    be written.
    """
    # 1. Arguments.
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a string or a Path, got {type(path).__name__}")
    path = Path(path)
    writers = {writer.suffix: writer for writer in FORMATS.values() if writer.suffix}
    if path.suffix.lower() not in writers:
        *endings, last = writers
        raise UserError(f"path must end in {', '.join(endings)} or {last}, got {str(path)!r}")
    if not isinstance(fps, int | float | np.number) or isinstance(fps, bool):
        raise TypeError(f"fps must be a number, got {type(fps).__name__}")
    if not (math.isfinite(fps) and 0.1 <= fps <= 1000):
        raise UserError(f"fps must be in [0.1, 1000], got {fps}")
    video = _check_frames(frames)
    writer = writers[path.suffix.lower()](path, fps=float(fps), metadata=metadata)
    try:
        writer.check_size(*video.shape[1:3])
    except ValueError as error:
        raise UserError(f"frames: {error}") from error
    # 2. Chunk by chunk, so that conversions need little memory.
    with writer:
        for start in range(0, len(video), CHUNK):
            writer.append(video[start : start + CHUNK])
    return path


def _check_frames(frames: Any) -> np.ndarray:
    """Frames `[f, h, w, 3]`; TypeError or UserError for anything that is not a video."""
    video = np.asarray(frames)
    if video.dtype != np.uint8 and not np.issubdtype(video.dtype, np.floating):
        raise TypeError(f"frames must be uint8, or floats in [-1, 1], got {video.dtype}")
    if video.ndim == 5 and len(video) != 1:
        raise UserError(f"frames has {len(video)} videos; write frames[0] and so on, one by one")
    if video.ndim == 5:
        video = video[0]
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UserError(f"frames must be [f, h, w, 3] with at least one frame, got {video.shape}")
    if video.dtype != np.uint8:
        largest = float(np.abs(video).max())
        if not math.isfinite(largest):
            raise UserError("frames must be finite, got NaN or infinity")
        if largest > 1.5:
            raise UserError(
                f"frames are floats up to {largest:g}; they must be in [-1, 1], or uint8"
            )
    return video
