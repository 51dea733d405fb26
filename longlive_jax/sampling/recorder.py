"""The files of a sampled video, written chunk by chunk: video, strip, latents, record."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from longlive_jax.io.latents_file import LatentsFile
from longlive_jax.io.paths import check_writable
from longlive_jax.io.pictures import default_scale, enlarge, strip
from longlive_jax.io.video import FORMATS, VideoWriter
from longlive_jax.sampling.record import file_tags
from longlive_jax.sampling.stream import Chunk
from longlive_jax.sampling.timeline import Timeline
from longlive_jax.spec import Failure, UserError

STRIP_ROWS = 60
"""Most segments in a strip; a video of hours has more than a picture can hold."""


def prompt_segments(timeline: Timeline, video: int) -> list[tuple[int, int, str]]:
    """(first chunk, end, prompt) of every stretch of one video with one prompt and no cut."""
    starts: list[tuple[int, str]] = []
    length = int(timeline.lengths[video])
    for chunk in range(length):
        prompt = timeline.prompts[video][chunk].removeprefix(timeline.prefix)
        if not starts or timeline.cuts[video, chunk] or prompt != starts[-1][1]:
            starts.append((chunk, prompt))
    ends = [*(start for start, _ in starts[1:]), length]
    return [(start, end, prompt) for (start, prompt), end in zip(starts, ends, strict=True)]


def file_name(name: str, number: int, many: bool) -> str:
    """`video`, or for one of many videos its number and name (letters, digits, `._-`)."""
    if not many:
        return "video"
    plain = re.sub(r"[^\w.-]+", "_", name).strip("._")[:60]
    return f"{number:03d}-{plain}" if plain else f"{number:03d}"


def video_path(folder: Path, name: str, form: str) -> Path:
    """The file, or for PNG the folder of frames, of the video `name` in a format."""
    return folder / f"{name}{FORMATS[form].suffix or '.frames'}"


def check_files(size: tuple[int, int], formats: Sequence[str], scale: int | None) -> None:
    """Raises UserError if a format cannot have frames of `size` enlarged by `scale`."""
    factor = default_scale(size) if scale is None else scale
    for form in formats:
        try:
            FORMATS[form].check_size(size[0] * factor, size[1] * factor)
        except ValueError as error:
            raise UserError(f"--format={form} --scale={factor}: {error}") from error


@dataclasses.dataclass
class Segment:
    """A stretch of one video with one prompt and no cut.

    Attributes:
      caption: its prompt without the cut prefix.
      cut: whether a new shot begins with it.
      first_frame: its first raw frame.
      end_frame: the frame after the last one written so far.
      picks: indices of the raw frames to show in the strip.
      stills: the frames picked so far.
    """

    caption: str
    cut: bool
    first_frame: int
    end_frame: int
    picks: np.ndarray
    stills: list[np.ndarray] = dataclasses.field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """Its entry in the record."""
        return {
            "prompt": self.caption,
            "cut": self.cut,
            "first_frame": self.first_frame,
            "end_frame": self.end_frame,
        }


def _replace[T](path: Path, write: Callable[[Path], T]) -> T:
    """Writes a file completely before it replaces `path`; returns what `write` does."""
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        result = write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return result


class VideoFiles:
    """The files of one video of a batch. Every appended chunk survives a crash of the program.

    The strip has a row per segment. Prompts and cuts are those of the chunks, so a steered video is
    captioned with what was generated.

    Attributes:
      notes: remarks for the user, such as captions that no font can show.
      writers: writer of each format.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        timeline: Timeline,
        video: int,
        *,
        stills: int,
        latents: bool,
        formats: Sequence[str],
        scale: int | None,
        record: Mapping[str, Any] | None,
    ):
        # 1. Files.
        self.strip_path = folder / ("strip.png" if name == "video" else f"{name}.strip.png")
        self.record_path = folder / f"{name}.json"
        self.latents_path = folder / f"{name}.latents.npy"
        self._record = None if record is None else dict(record)
        self.writers: list[VideoWriter] = [
            FORMATS[form](
                video_path(folder, name, form),
                fps=timeline.fps,
                metadata=None if self._record is None else file_tags(self._record),
            )
            for form in formats
        ]
        self._latents = LatentsFile(self.latents_path) if latents else None
        # 2. Progress.
        self.notes: tuple[str, ...] = ()
        self._written: list[Path] = []
        self._timeline, self._video = timeline, video
        self._num_chunks = int(timeline.lengths[video])
        self._chunks = 0
        self._num_stills, self._scale = stills, scale
        self._size = (0, 0)
        self._planned_ends = {
            (a, prompt): end for a, end, prompt in prompt_segments(timeline, video)
        }
        self._segments: list[Segment] = []

    @property
    def path(self) -> Path:
        """The video in its first format."""
        return self.writers[0].path

    def append(self, chunk: Chunk) -> None:
        """Writes this video's frames of the next chunk; padding after its end is dropped."""
        if chunk.index >= self._num_chunks:
            return
        frames = chunk.frames[self._video]
        if self._scale is None:
            self._scale = default_scale((frames.shape[1], frames.shape[2]))
        self._size = (frames.shape[1] * self._scale, frames.shape[2] * self._scale)
        for writer in self.writers:
            writer.append(enlarge(frames, self._scale))
        self._chunks += 1
        self._append_segment(chunk, frames)
        if self._latents is not None:
            self._latents.append(np.asarray(chunk.latents[self._video]))

    def close(self) -> None:
        """Finishes all files; without any frames there are none.

        Raises the first Failure after trying every file.
        """
        # 1. The record, complete, so that it is also in the tags.
        if self._record is not None and self.frames:
            self._record |= self._outcome()
        errors: list[Failure] = []
        for writer in self.writers:
            if self._record is not None:
                writer.metadata = file_tags(self._record)
            try:
                writer.close()
            except Failure as error:
                errors.append(error)
        # 2. The other files.
        for write in (self._write_record, self._write_strip) if self.frames else ():
            try:
                write()
            except OSError as error:
                reason = error.strerror or error
                errors.append(Failure(f"{self.record_path.parent}: cannot be written ({reason})"))
        if errors:
            raise errors[0]

    def paths(self) -> list[Path]:
        """Every file that was written; a video that could not be finished by its part file."""
        if not self.frames:
            return []
        unfinished = self.unfinished()
        finished = [w.path for w in self.writers if w.part not in unfinished]
        latents = [] if self._latents is None else [self.latents_path]
        return [*finished, *unfinished, *self._written, *latents]

    def unfinished(self) -> list[Path]:
        """The part files of videos that could not be finished."""
        return [w.part for w in self.writers if w.part != w.path and w.part.exists()]

    @property
    def frames(self) -> int:
        """Raw frames written so far."""
        return self.writers[0].frames

    @property
    def seconds(self) -> float:
        """Duration written so far, in seconds."""
        return self.frames / self._timeline.fps

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the video in pixels, enlarged."""
        return self._size

    @property
    def scale(self) -> int:
        """Enlargement of the frames in the video."""
        return self._scale or 1

    def _outcome(self) -> dict[str, Any]:
        """What the record says of the finished video."""
        return {
            "video": {
                "files": [writer.path.name for writer in self.writers],
                "frames": self.frames,
                "fps": float(self._timeline.fps),
                "size": list(self._size),
                "enlarged": self._scale,
                "shots": [segment.values() for segment in self._segments],
            },
            "interrupted": self._chunks < self._num_chunks,
        }

    def _write_record(self) -> None:
        if self._record is not None:
            text = json.dumps(self._record, indent=1) + "\n"
            _replace(self.record_path, lambda path: path.write_text(text))
            self._written.append(self.record_path)

    def _write_strip(self) -> None:
        rows = [row for row in self._segments if row.stills]
        if rows:
            stills = [np.stack(row.stills) for row in rows]
            captions = [row.caption for row in rows]
            self.notes = _replace(self.strip_path, lambda path: strip(path, stills, captions))
            self._written.insert(0, self.strip_path)

    def _append_segment(self, chunk: Chunk, frames: np.ndarray) -> None:
        """Continues the current segment or begins one, and picks its stills."""
        prompt = chunk.prompt[self._video].removeprefix(self._timeline.prefix)
        cut, first = bool(chunk.cut[self._video]), chunk.first_frame
        if not self._segments or prompt != self._segments[-1].caption or cut:
            picks = self._picks(chunk, prompt)
            self._segments.append(Segment(prompt, cut, first, first, picks))
        segment = self._segments[-1]
        segment.end_frame = first + len(frames)
        if len(self._segments) <= STRIP_ROWS:
            offsets = segment.picks - first
            inside = offsets[(offsets >= 0) & (offsets < len(frames))]
            segment.stills += [frames[i].copy() for i in inside]

    def _picks(self, chunk: Chunk, prompt: str) -> np.ndarray:
        """Evenly spaced frames of the segment that begins with `chunk`.

        The segment ends as in the timeline, or with the video if the stream was steered.
        """
        timeline = self._timeline
        end_chunk = self._planned_ends.get((chunk.index, prompt), self._num_chunks)
        later_chunks = end_chunk - chunk.index - 1
        frames = chunk.frames.shape[1]
        frames += later_chunks * timeline.chunk_frames * timeline.temporal_stride
        last = chunk.first_frame + frames - 1
        return np.unique(np.linspace(chunk.first_frame, last, self._num_stills).astype(int))


class Recorder:
    """Writes the files of all videos of a batch; a context manager that always closes them."""

    def __init__(
        self,
        folder: Path,
        timeline: Timeline,
        names: Sequence[str],
        *,
        stills: int = 8,
        latents: bool = False,
        formats: Sequence[str] = ("mp4",),
        scale: int | None = None,
        records: Sequence[Mapping[str, Any]] | None = None,
    ):
        """Files named after `names` in `folder`.

        Args:
          folder: where to write.
          timeline: the scripts in chunks.
          names: name of each video.
          stills: pictures per segment in the strip; 0 for no strip.
          latents: also write the latents, which are never enlarged.
          formats: formats of the videos, keys of `FORMATS`.
          scale: integer factor by which frames are enlarged; None for `default_scale`.
          records: record of each video (`record.video_record`), or None to write none.

        Raises UserError for a folder that cannot be written.
        """
        check_writable(folder)
        self._is_open = True
        self.videos = [
            VideoFiles(
                folder,
                name,
                timeline,
                i,
                stills=stills,
                latents=latents,
                formats=formats,
                scale=scale,
                record=None if records is None else records[i],
            )
            for i, name in enumerate(names)
        ]

    def append(self, chunk: Chunk) -> None:
        """Adds a chunk of every video."""
        for video in self.videos:
            video.append(chunk)

    def close(self) -> None:
        """Finishes the files of every video. Raises the first Failure after trying all."""
        if not self._is_open:
            return
        self._is_open = False
        errors = []
        for video in self.videos:
            try:
                video.close()
            except Failure as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Failure:
            if error is None:  # otherwise the first error is reported
                raise
