"""Frames of video files at 24 a second, scaled and cropped, and only those that are asked for.

Frame i of a shot is the one on screen a quarter of a frame after i/24 s, by the file's own
timestamps. So variable frame rates come out right, and timestamps rounded to milliseconds do no
harm. The reference takes frame number round(i * rate / 24) with halves to even, which shows the
frames of a 12 fps video 1, 3, 1, 3 times where each is due twice; and it squeezes every picture to
the training size, where here its aspect ratio is kept (pixel shape and rotation included) and what
sticks out is cropped.
"""

import contextlib
import dataclasses
import functools
import math
import stat
from collections.abc import Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from longlive_jax.data.clips.clip_plan import FPS
from longlive_jax.data.clips.dataset import Shot, Unusable
from longlive_jax.io.video import BT709
from longlive_jax.typing import UInt8

__all__ = ["VideoInfo", "check_fits", "frames_of", "probe", "read_frames", "verify"]

GRACE = Fraction(1, 4 * FPS)
"""Seconds by which a frame may begin late and still count as on screen."""

MOST_CROPPED = 16
"""A picture that must be scaled to more than so many times the wanted area is refused."""

SCALING = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file says of its video.

    Attributes:
      seconds: that it lasts.
      rate: frames a second, on average.
      height, width: in pixels as stored.
      stretch: a pixel's width by its height, as it is meant to be shown.
    """

    seconds: Fraction
    rate: Fraction
    height: int
    width: int
    stretch: Fraction


def probe(path: Path) -> VideoInfo:
    """Reads a file's headers (all packets, undecoded, if those do not tell the duration).

    Raises Unusable if it is no video. Answers are remembered until the file changes.
    """
    try:
        held = path.stat()
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        raise Unusable(f"{path.name}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(held.st_mode):
        raise Unusable(f"{path.name}: is no regular file")
    return _probe(path, held.st_size, held.st_mtime_ns)


@functools.lru_cache(maxsize=2**16)
def _probe(path: Path, length: int, _changed: int) -> VideoInfo:
    with _opened(path) as (container, stream):
        rate = Fraction(stream.average_rate or stream.guessed_rate or FPS)
        seconds = Fraction(stream.duration or 0) * stream.time_base
        if seconds <= 0:
            seconds = _last_moment(container, stream)
        elif seconds * FPS > length:
            # More frames than bytes: a still picture, or a damaged header that would be believed.
            _check_length(path, seconds, _last_moment(container, stream))
        size = stream.codec_context.height, stream.codec_context.width
        stretch = Fraction(stream.sample_aspect_ratio or 1)
    if seconds <= 0 or min(size) <= 0:
        raise Unusable(f"{path.name}: has no frames")
    return VideoInfo(seconds, rate, *size, stretch if stretch > 0 else Fraction(1))


def frames_of(shot: Shot) -> int:
    """Length of a shot in frames at 24 a second. Raises Unusable if its file cannot be opened."""
    seconds = probe(shot.file).seconds
    if shot.start >= seconds:
        raise Unusable(
            f"{shot.file.name}: the shot starts at {shot.start:g} s, the video lasts "
            f"{float(seconds):.2f} s"
        )
    end = seconds if shot.end is None else min(seconds, Fraction(shot.end))
    return max(1, math.ceil((end - Fraction(shot.start) - GRACE) * FPS))


def read_frames(
    shot: Shot, frames: Sequence[int], size: tuple[int, int]
) -> UInt8[np.ndarray, "f h w 3"]:
    """Frames of a shot, numbered at 24 a second from its start, in ascending order with repeats.

    Decoding begins at the last key frame before the first one and ends with the last one. `size` is
    (height, width). Raises Unusable if the video cannot be decoded that far.
    """
    info = probe(shot.file)
    images = np.empty((len(frames), *size, 3), np.uint8)
    moments = [Fraction(shot.start) + Fraction(i, FPS) + GRACE for i in frames]
    done = 0
    for frame, until in _shown(shot.file, moments[0]):
        last = done
        while done < len(moments) and moments[done] < until:
            done += 1
        if done > last:
            try:
                images[last:done] = _fitted(frame, size, info.stretch)
            except Unusable as reason:
                raise Unusable(f"{shot.file.name}: {reason}") from reason
        if done == len(moments):
            return images
    raise _short(shot.file, info.seconds, moments[done])


def verify(path: Path, *, decode: bool = False) -> None:
    """Reads a whole file, and decodes it if asked to; Unusable if it is cut short or damaged."""
    if decode:
        seconds = max((until for _, until in _shown(path, Fraction(0))), default=Fraction(0))
    else:
        with _opened(path) as (container, stream):
            seconds = _last_moment(container, stream)
    _check_length(path, probe(path).seconds, seconds)


def check_fits(shot: Shot, size: tuple[int, int]) -> None:
    """Decodes a shot's first frame; Unusable if its shape is too far from (height, width)."""
    info = probe(shot.file)
    for frame, _ in _shown(shot.file, Fraction(shot.start) + GRACE):
        try:
            _scaled(frame, size, info.stretch)
        except Unusable as reason:
            raise Unusable(f"{shot.file.name}: {reason}") from reason
        return
    raise _short(shot.file, info.seconds, Fraction(shot.start))


def _check_length(path: Path, said: Fraction, found: Fraction) -> None:
    if found < said - Fraction(1, FPS):
        raise _short(path, said, found)


def _short(path: Path, said: Fraction, found: Fraction) -> Unusable:
    return Unusable(
        f"{path.name}: cannot be read past {float(found):.2f} s, though its header says "
        f"{float(said):.2f} s; it is cut short or damaged"
    )


def _shown(path: Path, moment: Fraction) -> Iterator[tuple[Any, Fraction]]:
    """Frames on screen from a moment (seconds from the first frame) on, each with its end."""
    shown: Any = None
    with contextlib.closing(_decoded(path, moment)) as decoded:
        for frame, at in decoded:
            if shown is not None and at > moment:
                yield shown, at
            shown, begun = frame, at
    if shown is not None:
        # Rounded timestamps make a file look shorter than it is by up to a frame.
        lasts = Fraction(shown.duration or 0) * (shown.time_base or 0)
        yield shown, begun + max(lasts, Fraction(1, FPS)) + GRACE


def _decoded(path: Path, moment: Fraction) -> Generator[tuple[Any, Fraction]]:
    """Decoded frames and when they begin, from one that begins no later than `moment`."""
    if moment > 1:
        found = _decode(path, moment)
        first = next(found, None)
        if first is not None and first[1] <= moment:
            yield first
            yield from found
            return
        found.close()  # the file's index has led past the moment
    yield from _decode(path, None)


def _decode(path: Path, moment: Fraction | None) -> Generator[tuple[Any, Fraction]]:
    with _opened(path) as (container, stream):
        # Many videos are decoded at once, so none needs several threads; and with one, how far a
        # damaged video can be read does not depend on the machine.
        stream.codec_context.thread_count = 1
        origin, tick = stream.start_time or 0, stream.time_base
        if moment is not None:
            container.seek(origin + math.floor(moment / tick), stream=stream)
        for frame in _frames(container, stream):
            stamp = frame.dts if frame.pts is None else frame.pts
            if stamp is None:
                raise Unusable(f"{path.name}: has frames without a time")
            if frame.is_corrupt:
                return
            yield frame, (stamp - origin) * tick


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames up to the end, or to the first packet of which a part is missing."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            yield from stream.decode(None)
            return
        yield from packet.decode()


def _last_moment(container: Any, stream: Any) -> Fraction:
    """When the last whole packet ends, in seconds from the first frame; 0 without packets."""
    origin, rate = stream.start_time or 0, stream.average_rate or FPS
    usual = round(1 / Fraction(rate) / stream.time_base)
    ends = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            break
        stamp = packet.dts if packet.pts is None else packet.pts
        if stamp is not None and packet.size:
            ends.append(stamp + (packet.duration or usual))
    return (max(ends) - origin) * stream.time_base if ends else Fraction(0)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; every way to fail is Unusable."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unusable(f"{path.name}: has no video in it")
            yield container, container.streams.video[0]
    except (av.FFmpegError, EOFError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise Unusable(f"{path.name}: cannot be decoded ({why})") from error


def _scaled(
    frame: Any, size: tuple[int, int], stretch: Fraction
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """Quarter turns of a frame, `size` as it lies in the file, and the size that covers it."""
    turns = round(frame.rotation / 90) % 4
    height, width = size[::-1] if turns % 2 else size
    shown = frame.width * stretch
    scale = max(Fraction(height, frame.height), width / shown)
    tall, wide = max(height, round(frame.height * scale)), max(width, round(shown * scale))
    if tall * wide > MOST_CROPPED * height * width:
        raise Unusable(
            f"{frame.height}x{frame.width} pixels are too far from the shape of {height}x{width}"
        )
    return turns, (height, width), (tall, wide)


def _fitted(frame: Any, size: tuple[int, int], stretch: Fraction) -> UInt8[np.ndarray, "h w 3"]:
    """A frame upright, scaled to cover `size`, and cropped to it centrally."""
    turns, (height, width), (tall, wide) = _scaled(frame, size, stretch)
    image = frame.reformat(
        width=wide,
        height=tall,
        format="rgb24",
        src_colorspace=Colorspace.ITU709 if frame.colorspace == BT709 else None,
        dst_color_range=ColorRange.JPEG,
        interpolation=SCALING,
        threads=1,
    ).to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.rot90(image[top : top + height, left : left + width], turns)
