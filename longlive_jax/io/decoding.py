"""Reads frames of video files by their timestamps, upright, scaled and cropped.

Frame i of a video at a wanted rate is the frame that the file's timestamps put on screen a quarter
of a frame after i / rate seconds. Variable frame rates are therefore handled exactly, and
timestamps rounded to milliseconds do no harm. The aspect ratio is preserved, pixel shape and
rotation included; each frame is scaled to cover the wanted size by itself, so the size may change
within a file, and is then cropped at the centre. Only the requested frames are converted, and
decoding begins at the key frame before the first of them.
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

from longlive_jax.io.pictures import to_pixels
from longlive_jax.spec import UserError
from longlive_jax.typing import Float, UInt8

__all__ = [
    "BT709",
    "Unusable",
    "VideoInfo",
    "check_fit",
    "frame_count",
    "grace",
    "probe",
    "read_at",
    "read_frames",
    "read_video",
    "verify",
    "video_fps",
]

BT709 = 1
"""BT.709's code for primaries, transfer function and matrix in the H.264 headers."""

FRAME = Fraction(1, 24)
"""Duration in seconds of a frame whose file does not state one; a shorter file is incomplete."""

MAX_AREA_RATIO = 16
"""Limit on a scaled frame's area before cropping, as a multiple of the target area."""

SCALING = Interpolation.LANCZOS | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


class Unusable(ValueError):
    """Raised if a video, or the sample of a dataset with it, cannot be used; one line."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """Properties of a file's video stream.

    Attributes:
      seconds: duration.
      rate: average frame rate, in frames per second.
      height: stored height in pixels.
      width: stored width in pixels.
      stretch: sample aspect ratio: the displayed width of a pixel divided by its height.
    """

    seconds: Fraction
    rate: Fraction
    height: int
    width: int
    stretch: Fraction


def probe(path: Path) -> VideoInfo:
    """Reads a file's headers, and all packets if the headers do not state the duration.

    Nothing is decoded. Results are cached until the file changes. Raises Unusable if the file is
    not a video.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: not a legal file name
        raise Unusable(f"{path.name}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise Unusable(f"{path.name}: is not a regular file")
    return _probe(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=2**16)
def _probe(path: Path, num_bytes: int, _modified: int) -> VideoInfo:
    with _open_video(path) as (container, stream):
        rate = Fraction(stream.average_rate or stream.guessed_rate or 24)
        seconds = Fraction(stream.duration or 0) * stream.time_base
        if seconds <= 0:
            seconds = _end_of_packets(container, stream)
        elif seconds > num_bytes * FRAME:
            # More frames than bytes: either a still picture or a damaged header.
            _check_length(path, seconds, _end_of_packets(container, stream))
        size = stream.codec_context.height, stream.codec_context.width
        stretch = Fraction(stream.sample_aspect_ratio or 1)
    if seconds <= 0 or min(size) <= 0:
        raise Unusable(f"{path.name}: has no frames")
    return VideoInfo(seconds, rate, *size, stretch if stretch > 0 else Fraction(1))


def grace(fps: Fraction | float) -> Fraction:
    """Seconds by which a frame may begin late and still count as on screen: a quarter of one."""
    return 1 / (4 * Fraction(fps))


def frame_count(seconds: Fraction, fps: Fraction | float) -> int:
    """Frames at `fps` in a video that lasts `seconds`; at least 1."""
    return max(1, math.ceil((seconds - grace(fps)) * Fraction(fps)))


def read_at(
    path: Path, times: Sequence[Fraction], size: tuple[int, int], *, keep_chroma: bool = False
) -> UInt8[np.ndarray, "f h w 3"]:
    """Reads the frames on screen at some times, decoding only from the key frame before them.

    Raises Unusable if the video cannot be decoded as far as the last time.

    Args:
      path: the video file.
      times: seconds after the first frame, ascending; repeats are allowed.
      size: (height, width) of the result in pixels.
      keep_chroma: whether frames that are not scaled repeat their chroma samples, which is closest
        to a video that `Mp4Writer` wrote, instead of interpolating between them.
    """
    info = probe(path)
    images = np.empty((len(times), *size, 3), np.uint8)
    done = 0
    for frame, until in _frames_on_screen(path, times[0]):
        last = done
        while done < len(times) and times[done] < until:
            done += 1
        if done > last:
            try:
                images[last:done] = _resized(frame, size, info.stretch, keep_chroma)
            except Unusable as reason:
                raise Unusable(f"{path.name}: {reason}") from reason
        if done == len(times):
            return images
    raise _truncated(path, info.seconds, times[done])


def read_frames(
    path: str | Path, *, fps: float | None = None, size: tuple[int, int] | None = None
) -> UInt8[np.ndarray, "f h w 3"]:
    """All frames of a video, uint8 at the wanted size; nothing else is held in memory.

    Args:
      path: video file.
      fps: frame rate to resample to, by repeating or dropping frames; the file's average if None.
      size: height and width, which the frames are scaled to cover and then cropped to; those of
        the first frame, upright, if None.

    Raises UserError if the video cannot be read, is cut short, or has no frames.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"video {path} does not exist; check the path")
    try:
        info = probe(path)
        rate = info.rate if fps is None else Fraction(fps).limit_denominator(1001)
        count = frame_count(info.seconds, rate)
        times = [Fraction(i) / rate + grace(rate) for i in range(count)]
        size = _upright_size(path, info) if size is None else size
        return read_at(path, times, size, keep_chroma=True)
    except Unusable as reason:
        raise UserError(f"{path} is not a readable video: {reason}") from reason


def read_video(
    path: str | Path, *, fps: float | None = None, size: tuple[int, int] | None = None
) -> Float[np.ndarray, "f h w 3"]:
    """The frames of `read_frames` as float32 in [-1, 1]."""
    return to_pixels(read_frames(path, fps=fps, size=size))


def video_fps(path: str | Path) -> float:
    """Average frames per second of a video file. Raises UserError if it cannot be read."""
    try:
        return float(probe(Path(path)).rate)
    except Unusable as reason:
        raise UserError(f"{path} is not a readable video: {reason}") from reason


def _upright_size(path: Path, info: VideoInfo) -> tuple[int, int]:
    """Height and width at which the first frame is displayed."""
    with contextlib.closing(_decode(path, None)) as frames:
        first = next(frames, None)
    if first is None:
        raise Unusable(f"{path.name}: has no frames")
    height, width = first[0].height, round(first[0].width * info.stretch)
    return (width, height) if round(first[0].rotation / 90) % 2 else (height, width)


def verify(path: Path, *, decode: bool = False) -> None:
    """Reads a file to its end, and with `decode` decodes every frame.

    Raises Unusable if it is cut short or damaged.
    """
    if decode:
        ends = (until for _, until in _frames_on_screen(path, Fraction(0)))
        seconds = max(ends, default=Fraction(0))
    else:
        with _open_video(path) as (container, stream):
            seconds = _end_of_packets(container, stream)
    _check_length(path, probe(path).seconds, seconds)


def check_fit(path: Path, time: Fraction, size: tuple[int, int]) -> None:
    """Decodes the frame on screen at `time` seconds.

    Raises Unusable if its aspect ratio is too far from that of `size` (height, width).
    """
    info = probe(path)
    for frame, _ in _frames_on_screen(path, time):
        try:
            _cover_size(frame, size, info.stretch)
        except Unusable as reason:
            raise Unusable(f"{path.name}: {reason}") from reason
        return
    raise _truncated(path, info.seconds, time)


def _check_length(path: Path, declared: Fraction, actual: Fraction) -> None:
    """Raises Unusable if a file ends more than one frame before its declared end, in seconds."""
    if actual < declared - FRAME:
        raise _truncated(path, declared, actual)


def _truncated(path: Path, declared: Fraction, actual: Fraction) -> Unusable:
    return Unusable(
        f"{path.name}: cannot be read past {float(actual):.2f} s, but its header says "
        f"{float(declared):.2f} s; it is cut short or damaged"
    )


def _frames_on_screen(path: Path, time: Fraction) -> Iterator[tuple[Any, Fraction]]:
    """Frames on screen at `time` (seconds after the first frame) or later, each with its end."""
    current: Any = None
    with contextlib.closing(_decode_from(path, time)) as decoded:
        for frame, at in decoded:
            if current is not None and at > time:
                yield current, at
            current, begin = frame, at
    if current is not None:
        # Rounded timestamps make a file look up to one frame shorter than it is.
        duration = Fraction(current.duration or 0) * (current.time_base or 0)
        yield current, begin + max(duration, FRAME) + FRAME / 4


def _decode_from(path: Path, time: Fraction) -> Generator[tuple[Any, Fraction]]:
    """Decoded frames, each with its beginning in seconds; the first begins no later than `time`."""
    if time > 1:
        frames = _decode(path, time)
        first = next(frames, None)
        if first is not None and first[1] <= time:
            yield first
            yield from frames
            return
        frames.close()  # the file's index points past `time`
    yield from _decode(path, None)


def _decode(path: Path, time: Fraction | None) -> Generator[tuple[Any, Fraction]]:
    """Decoded frames, each with its beginning, from the key frame before `time` or from the first.

    The file's index decides which key frame that is, and may be wrong.
    """
    with _open_video(path) as (container, stream):
        # Many videos are decoded at once, so one thread each is enough. It also makes how far a
        # damaged video can be read independent of the machine.
        stream.codec_context.thread_count = 1
        origin, tick = stream.start_time or 0, stream.time_base
        if time is not None:
            container.seek(origin + math.floor(time / tick), stream=stream)
        for frame in _frames(container, stream):
            timestamp = frame.dts if frame.pts is None else frame.pts
            if timestamp is None:
                raise Unusable(f"{path.name}: has frames without a timestamp")
            if frame.is_corrupt:
                return
            yield frame, (timestamp - origin) * tick


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames up to the end of the file, or up to the first incomplete packet."""
    for packet in container.demux(stream):
        if packet.is_corrupt:
            yield from stream.decode(None)
            return
        yield from packet.decode()


def _end_of_packets(container: Any, stream: Any) -> Fraction:
    """End of the last complete packet, in seconds after the first frame; 0 without packets."""
    origin, rate = stream.start_time or 0, stream.average_rate or 24
    default_duration = round(1 / Fraction(rate) / stream.time_base)
    ends = []
    for packet in container.demux(stream):
        if packet.is_corrupt:
            break
        timestamp = packet.dts if packet.pts is None else packet.pts
        if timestamp is not None and packet.size:
            ends.append(timestamp + (packet.duration or default_duration))
    return (max(ends) - origin) * stream.time_base if ends else Fraction(0)


@contextlib.contextmanager
def _open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream. Raises Unusable for any failure to read it."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unusable(f"{path.name}: has no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise Unusable(f"{path.name}: has a video stream of an unknown codec")
            yield container, stream
    except (av.FFmpegError, EOFError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise Unusable(f"{path.name}: cannot be decoded ({why})") from error


def _cover_size(
    frame: Any, size: tuple[int, int], stretch: Fraction
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """The scale at which a frame covers `size` (height, width).

    Returns the frame's rotation in quarter turns, `size` in the orientation of the file, and the
    (height, width) to scale to. Raises Unusable if nearly all of the scaled frame would be cropped.
    """
    turns = round(frame.rotation / 90) % 4
    height, width = size[::-1] if turns % 2 else size
    display_width = frame.width * stretch
    scale = max(Fraction(height, frame.height), width / display_width)
    tall, wide = max(height, round(frame.height * scale)), max(width, round(display_width * scale))
    if tall * wide > MAX_AREA_RATIO * height * width:
        raise Unusable(
            f"the shape of {frame.height}x{frame.width} pixels is too far from {height}x{width}"
        )
    return turns, (height, width), (tall, wide)


def _resized(
    frame: Any, size: tuple[int, int], stretch: Fraction, keep_chroma: bool
) -> UInt8[np.ndarray, "h w 3"]:
    """A frame upright, scaled to cover `size` (height, width), and cropped to it at the centre."""
    turns, (height, width), (tall, wide) = _cover_size(frame, size, stretch)
    is_unscaled = (tall, wide) == (frame.height, frame.width)
    image = frame.reformat(
        width=wide,
        height=tall,
        format="rgb24",
        src_colorspace=Colorspace.ITU709 if frame.colorspace == BT709 else None,
        dst_color_range=ColorRange.JPEG,
        interpolation=None if keep_chroma and is_unscaled else SCALING,
        threads=1,
    ).to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.rot90(image[top : top + height, left : left + width], turns)
