"""Writers of video files that take one chunk after the other: the common part, MP4 and WebM."""

import contextlib
import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Self

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from longlive_jax.io.decoding import BT709
from longlive_jax.io.paths import check_writable
from longlive_jax.io.pictures import to_uint8
from longlive_jax.spec import Failure

__all__ = ["Mp4Writer", "Tags", "VideoWriter", "WebmWriter"]

type Tags = Mapping[str, str]


class VideoWriter:
    """Appends frames to a video file; a context manager that always finishes it.

        with Mp4Writer("out/video.mp4") as video:
            video.append(frames)  # [f, h, w, 3], uint8 or float in [-1, 1]

    The file being written is called `video.part.SUFFIX` and can be played even if the process is
    killed. Leaving the `with` block, also by an exception, finishes it and replaces `path`
    atomically. Without frames, nothing is written. Memory does not grow with the length.

    Attributes:
      path: the finished file.
      part: the file while it is written.
      fps: frames per second.
      frames: frames appended so far.
      metadata: tags of the file, such as title, comment and description. What they are when the
        file is finished counts; those at the first frame are in the part file.
    """

    suffix: ClassVar[str]
    max_edge: ClassVar[int] = 16384

    def __init__(self, path: str | Path, *, fps: float = 24, metadata: Tags | None = None):
        """Creates the folder of `path`. Raises UserError if it is not writable."""
        self.path = Path(path)
        self.part = self.path.with_name(f"{self.path.stem}.part{self.suffix}")
        self.fps = Fraction(fps).limit_denominator(1001)
        self.frames = 0
        self.metadata = dict(metadata or {})
        self._size: tuple[int, int] | None = None
        self._is_open = False
        check_writable(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def seconds(self) -> float:
        """Duration written so far, in seconds."""
        return float(self.frames / self.fps)

    def append(self, frames: np.ndarray) -> None:
        """Encodes frames `[f, h, w, 3]`, uint8 or float in [-1, 1].

        Raises ValueError for another shape, a frame size that the format cannot have or that
        differs from the frames before, and values that are not finite. Raises Failure if the file
        cannot be written, for example because the disk is full; the part file is left.
        """
        # 1. Checks.
        pixels = to_uint8(frames)
        if pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"frames must be [f, h, w, 3], got {pixels.shape}")
        if not len(pixels):
            return
        size = (pixels.shape[1], pixels.shape[2])
        if self._size is None:
            self.check_size(*size)
            self._size = size
        if size != self._size:
            raise ValueError(f"frames must be {self._size} like the video so far, got {size}")
        # 2. Encode.
        try:
            if not self._is_open:
                self._open(*size)
                self._is_open = True
            self._encode(pixels)
        except (OSError, av.FFmpegError) as error:
            self._is_open = False
            self._close_part()
            raise self._failure(error) from error

    def close(self) -> None:
        """Finishes the file and moves it to `path`. Raises Failure if it cannot be written."""
        if not self._is_open:
            return
        self._is_open = False
        if not self.frames:  # interrupted while the first one was encoded
            self._close_part()
            if self.part != self.path:
                self.part.unlink(missing_ok=True)
            return
        try:
            self._finish()
        except (OSError, av.FFmpegError) as error:
            raise self._failure(error) from error

    def _close_part(self) -> None:
        """Closes the part file after an error, which is reported rather than those of closing."""
        with contextlib.suppress(OSError, av.FFmpegError):
            self._abandon()

    def _failure(self, error: Exception) -> Failure:
        reason = getattr(error, "strerror", None) or error
        return Failure(
            f"{self.path}: cannot be written ({reason}); {self.part} has what was written until "
            "then. Free some space or choose another folder"
        )

    @classmethod
    def check_size(cls, height: int, width: int) -> None:
        """Raises ValueError for a frame size that the format cannot have."""
        if max(height, width) > cls.max_edge:
            raise ValueError(
                f"{cls.suffix or '.png'} frames have at most {cls.max_edge} pixels along an edge, "
                f"got {height}x{width}"
            )

    def _open(self, height: int, width: int) -> None:
        """Creates the part file, before the first frame."""
        raise NotImplementedError

    def _encode(self, frames: np.ndarray) -> None:
        """Writes uint8 frames `[f, h, w, 3]` and counts them in `frames`."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Completes the part file and moves it to `path`."""
        raise NotImplementedError

    def _abandon(self) -> None:
        """Closes the part file as it is."""
        raise NotImplementedError


class StreamWriter(VideoWriter):
    """A video that PyAV encodes in 4:2:0 colour, one frame after the other."""

    muxer: ClassVar[str]
    part_options: ClassVar[dict[str, str]] = {}
    final_options: ClassVar[dict[str, str]] = {}
    tag_names: ClassVar[dict[str, str]] = {}
    """Names of the tags in this container, where they differ."""

    def _open(self, height: int, width: int) -> None:
        self._container: Any = av.open(
            str(self.part), "w", format=self.muxer, options=self.part_options
        )
        self._container.metadata.update(self._tags())
        stream = self._add_stream()
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = max(1, round(self.fps))
        stream.codec_context.time_base = 1 / self.fps
        stream.codec_context.colorspace = BT709
        stream.codec_context.color_primaries = BT709
        stream.codec_context.color_trc = BT709
        stream.codec_context.color_range = ColorRange.MPEG
        self._stream = stream

    def _add_stream(self) -> Any:
        """The container's video stream with its codec and options."""
        raise NotImplementedError

    def _encode(self, frames: np.ndarray) -> None:
        for image in frames:
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

    def _finish(self) -> None:
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()
        self._rewrap()

    def _abandon(self) -> None:
        self._container.close()

    def _rewrap(self) -> None:
        """Copies the packets of the part file into a seekable one at `path`, with its tags."""
        temporary = self.path.with_name(f".{self.path.stem}.{os.getpid()}{self.suffix}")
        try:
            with (
                av.open(str(self.part)) as source,
                av.open(
                    str(temporary), "w", format=self.muxer, options=self.final_options
                ) as target,
            ):
                target.metadata.update(self._tags())
                stream = target.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is None:
                        continue
                    packet.stream = stream
                    target.mux(packet)
            temporary.replace(self.path)
            self.part.unlink()
        finally:
            temporary.unlink(missing_ok=True)

    def _tags(self) -> dict[str, str]:
        return {self.tag_names.get(name, name): text for name, text in self.metadata.items()}


class Mp4Writer(StreamWriter):
    """An H.264 MP4. The part file consists of self-contained fragments of one second.

    A killed process therefore loses at most the last two seconds. `crf` is the quality of libx264,
    0 (lossless) to 51.
    """

    suffix = ".mp4"
    muxer = "mp4"
    # Every fragment starts at a key frame and plays without the rest.
    part_options: ClassVar = {
        "movflags": "frag_keyframe+empty_moov+default_base_moof",
        "flush_packets": "1",
    }
    final_options: ClassVar = {"movflags": "faststart"}
    tag_names: ClassVar = {"encoder": "encoding_tool"}

    def __init__(
        self, path: str | Path, *, fps: float = 24, crf: int = 16, metadata: Tags | None = None
    ):
        super().__init__(path, fps=fps, metadata=metadata)
        self._crf = crf

    @classmethod
    def check_size(cls, height: int, width: int) -> None:
        """Raises ValueError for odd and for too large sizes."""
        super().check_size(height, width)
        if height % 2 or width % 2:
            raise ValueError(
                f"H.264 with 4:2:0 colour needs even sizes, got {height}x{width}; crop the frames "
                "or write .webm or .gif"
            )

    def _add_stream(self) -> Any:
        stream: Any = self._container.add_stream("libx264", rate=self.fps)
        stream.options = {"crf": str(self._crf), "preset": "veryfast"}
        return stream

    def _abandon(self) -> None:
        try:
            super()._abandon()
        finally:
            _drop_incomplete_fragment(self.part)


def _drop_incomplete_fragment(path: Path) -> None:
    """Cuts a fragmented MP4 after its last complete fragment, so that it decodes to its end."""
    total = path.stat().st_size
    with path.open("r+b") as file:
        at = end = 0
        while at + 16 <= total:
            file.seek(at)
            header = file.read(16)
            size, kind = int.from_bytes(header[:4]), header[4:8]
            size = int.from_bytes(header[8:]) if size == 1 else size
            if size < 8 or at + size > total:
                break
            at += size
            end = at if kind in (b"moov", b"mdat") else end  # not after a fragment's header
        file.truncate(end)


class WebmWriter(StreamWriter):
    """A VP9 WebM; a killed process loses at most the last two seconds."""

    suffix = ".webm"
    muxer = "webm"
    part_options: ClassVar = {"cluster_time_limit": "1000", "flush_packets": "1"}
    tag_names: ClassVar = {"encoder": "ENCODED_BY"}  # ENCODER is the muxer's own

    def _add_stream(self) -> Any:
        stream: Any = self._container.add_stream("libvpx-vp9", rate=self.fps)
        stream.bit_rate = 0  # constant quality
        stream.options = {"crf": "24", "deadline": "realtime", "cpu-used": "6", "row-mt": "1"}
        stream.options |= {"lag-in-frames": "0"}
        return stream
