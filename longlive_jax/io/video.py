"""Video files: H.264 MP4 is written chunk by chunk; every format that PyAV decodes is read."""

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageOps

from longlive_jax.io.paths import check_writable
from longlive_jax.io.pictures import to_pixels, to_uint8
from longlive_jax.spec import UserError

__all__ = ["BT709", "Mp4Writer", "iter_video", "read_video", "video_fps", "write_video"]

BT709 = 1
"""BT.709's code for primaries, transfer function and matrix in the H.264 headers."""


class Mp4Writer:
    """Appends frames to an H.264 MP4 that stays playable even if the process is killed.

        with Mp4Writer("out/video.mp4") as video:
            video.append(frames)  # [f, h, w, 3], uint8 or float in [-1, 1]

    The file being written is called `video.part.mp4` and consists of self-contained one-second
    fragments, so a killed process loses at most the last two seconds. Leaving the `with` block,
    also by an exception, copies the packets into an ordinary seekable file, which replaces `path`
    atomically. Without frames, nothing is written.

    Args:
      path: file to write; its folder is created.
      fps: frames per second.
      crf: quality of libx264, 0 (lossless) to 51.

    Raises UserError if the folder is not writable.
    """

    def __init__(self, path: str | Path, *, fps: float = 24, crf: int = 16):
        self.path = Path(path)
        self.part = self.path.with_name(f"{self.path.stem}.part.mp4")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames = 0
        self._crf = crf
        self._container: Any = None
        self._stream: Any = None
        check_writable(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Duration written so far, in seconds."""
        return float(self.frames / self.fps)

    def append(self, frames: np.ndarray) -> None:
        """Encodes frames `[f, h, w, 3]`, uint8 or float in [-1, 1].

        Raises ValueError for another shape, a frame size that is odd or differs from the frames
        before, and values that are not finite.
        """
        pixels = to_uint8(frames)
        if pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"frames must be [f, h, w, 3], got {pixels.shape}")
        if not len(pixels):
            return
        if self._container is None:
            self._open(*pixels.shape[1:3])
        size = (self._stream.height, self._stream.width)
        if pixels.shape[1:3] != size:
            raise ValueError(
                f"frames must be {size} like the video so far, got {pixels.shape[1:3]}"
            )
        for image in pixels:
            rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = rgb.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts = self.frames
            frame.time_base = 1 / self.fps
            self._container.mux(self._stream.encode(frame))
            self.frames += 1

    def _open(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"H.264 with 4:2:0 colour needs even sizes, got {height}x{width}")
        # Fragmented MP4: every fragment starts at a keyframe and plays without the rest.
        self._container = av.open(
            str(self.part),
            "w",
            format="mp4",
            options={
                "movflags": "frag_keyframe+empty_moov+default_base_moof",
                "flush_packets": "1",
            },
        )
        stream: Any = self._container.add_stream("libx264", rate=self.fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = max(1, round(self.fps))
        stream.codec_context.time_base = 1 / self.fps
        stream.codec_context.colorspace = BT709
        stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        stream.codec_context.color_range = ColorRange.MPEG
        stream.options = {"crf": str(self._crf), "preset": "veryfast"}
        self._stream = stream

    def close(self) -> None:
        """Flushes the encoder and moves the finished file to `path`."""
        if self._container is None:
            return
        container, self._container = self._container, None
        try:
            container.mux(self._stream.encode(None))
        finally:
            container.close()
        _rewrap(self.part, self.path)


def write_video(path: str | Path, frames: np.ndarray, fps: float = 24) -> None:
    """Writes frames `[f, h, w, 3]`, uint8 or float in [-1, 1], to an H.264 MP4.

    Raises UserError for frames of another shape and a folder that is not writable.
    """
    frames = np.asarray(frames)
    if frames.ndim == 5 and len(frames) == 1:
        frames = frames[0]
    if frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise UserError(f"frames must be [f, h, w, 3], got {frames.shape}; write videos one by one")
    with Mp4Writer(path, fps=fps) as video:
        video.append(frames)


def _rewrap(part: Path, path: Path) -> None:
    """Copies the packets of a fragmented file into a plain one at `path` and deletes `part`."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
    try:
        with (
            av.open(str(part)) as source,
            av.open(str(temporary), "w", options={"movflags": "faststart"}) as target,
        ):
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is None:
                    continue
                packet.stream = stream
                target.mux(packet)
        temporary.replace(path)
        part.unlink()
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; every failure is raised as a UserError."""
    if not Path(path).is_file():
        raise UserError(f"video {path} does not exist; check the path")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream; choose another file")
            yield container, container.streams.video[0]
    except (av.FFmpegError, EOFError) as error:
        raise UserError(f"{path} is not a readable video: {error}") from error


def video_fps(path: str | Path) -> float:
    """Average frames per second of a video file."""
    with _opened(path) as (_, stream):
        return float(stream.average_rate or stream.guessed_rate or 24)


def iter_video(path: str | Path) -> Iterator[np.ndarray]:
    """Yields every frame as uint8 `[h, w, 3]`; memory does not grow with the video's length."""
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for frame in container.decode(stream):
            matrix = Colorspace.ITU709 if frame.colorspace == BT709 else None
            yield frame.reformat(
                format="rgb24", src_colorspace=matrix, dst_color_range=ColorRange.JPEG
            ).to_ndarray()


def read_video(
    path: str | Path, *, fps: float | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """All frames of a video as float32 `[f, h, w, 3]` in [-1, 1].

    Args:
      path: video file.
      fps: frame rate to resample to, by repeating or dropping frames (frame `i` is the source's
        `i * source_fps / fps`, rounded half to even); the video's own if None.
      size: height and width, which the frames are scaled to cover and then cropped to; the video's
        own if None.

    Raises UserError if the video cannot be read or has no frames.
    """
    frames = list(iter_video(path))
    if not frames:
        raise UserError(f"{path} has no frames; choose another file")
    if fps is not None:
        step = video_fps(path) / fps
        count = max(1, round(len(frames) / step))
        index = np.clip(np.rint(np.arange(count) * step).astype(int), 0, len(frames) - 1)
        frames = [frames[i] for i in index]
    if size is not None and frames[0].shape[:2] != size:
        box = (size[1], size[0])
        frames = [
            np.asarray(ImageOps.fit(Image.fromarray(f), box, Image.Resampling.LANCZOS))
            for f in frames
        ]
    return to_pixels(np.stack(frames))
