"""Frames of the shots of a dataset at 24 fps, and whether its files can be read.

The reference takes frame number round(i * rate / 24), with halves rounded to even: it shows the
frames of a 12 fps video 1, 3, 1, 3 times, where each is due twice. It also stretches every frame to
the training size. Here frames follow the timestamps and keep their aspect ratio (`io.decoding`).
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from longlive_jax.data.clips.clip_plan import FPS
from longlive_jax.data.clips.dataset import SourceShot, Unusable
from longlive_jax.io.decoding import (
    VideoInfo,
    check_fit,
    frame_count,
    grace,
    probe,
    read_at,
    verify,
)
from longlive_jax.typing import UInt8

__all__ = ["VideoInfo", "check_first_frame", "probe", "read_frames", "shot_length", "verify"]


def shot_length(shot: SourceShot) -> int:
    """Length of a shot in frames at 24 fps. Raises Unusable if its file cannot be opened."""
    seconds = probe(shot.file).seconds
    if shot.start >= seconds:
        raise Unusable(
            f"{shot.file.name}: the shot starts at {shot.start:g} s, but the video lasts "
            f"{float(seconds):.2f} s"
        )
    end = seconds if shot.end is None else min(seconds, Fraction(shot.end))
    return frame_count(end - Fraction(shot.start), FPS)


def read_frames(
    shot: SourceShot, frames: Sequence[int], size: tuple[int, int]
) -> UInt8[np.ndarray, "f h w 3"]:
    """Reads frames of a shot, decoding only from the key frame before the first to the last one.

    Raises Unusable if the video cannot be decoded as far as the last frame.

    Args:
      shot: the shot.
      frames: frame indices at 24 fps from the shot's start, ascending; repeats are allowed.
      size: (height, width) of the result in pixels.
    """
    times = [Fraction(shot.start) + Fraction(i, FPS) + grace(FPS) for i in frames]
    return read_at(shot.file, times, size)


def check_first_frame(shot: SourceShot, size: tuple[int, int]) -> None:
    """Decodes a shot's first frame.

    Raises Unusable if its aspect ratio is too far from that of `size` (height, width).
    """
    check_fit(shot.file, Fraction(shot.start) + grace(FPS), size)
