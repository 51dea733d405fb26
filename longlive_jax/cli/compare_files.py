"""The files of `longlive compare`: videos, the strip and the video of all of them, the report."""

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import longlive_jax
from longlive_jax.io.comparison import SideBySide, StripShot, comparison_strip
from longlive_jax.io.frame_spool import FrameSpool
from longlive_jax.io.paths import check_writable
from longlive_jax.io.video import FORMATS, parse_formats
from longlive_jax.sampling.record import GENERATED_MARK, video_record
from longlive_jax.sampling.recorder import (
    Recorder,
    check_files,
    file_name,
    prompt_segments,
    video_path,
)
from longlive_jax.sampling.script import ShotScript
from longlive_jax.sampling.timeline import Timeline
from longlive_jax.spec import UserError

__all__ = ["ComparedVideo", "ComparisonFiles", "check_formats"]

STILLS = 8
"""Pictures of a video in the strip, all shots together, unless there are more shots."""
MAX_COLUMNS = 48
"""Most pictures of a video in the strip; if it has more shots, evenly spaced ones are shown."""
BLOCK = 32
"""Frames that are drawn at once."""


def check_formats(text: str) -> tuple[str, ...]:
    """The formats of a comma-separated list. Raises UserError for unknown ones."""
    return parse_formats(text)


@dataclasses.dataclass
class ComparedVideo:
    """A video while it is sampled, and after.

    Attributes:
      name: label of its model.
      file: name of its files, without ending.
      run: the part of its record that is known beforehand.
      given: settings of its model alone, as text.
      spool: its frames.
      loading: seconds in which the weights were loaded.
      timeline: its script in chunks, once sampling begins.
      times: when sampling began, and when each chunk was finished.
    """

    name: str
    file: str
    run: Mapping[str, Any]
    given: Mapping[str, str]
    spool: FrameSpool
    loading: float
    timeline: Timeline | None = None
    times: list[float] = dataclasses.field(default_factory=list)

    def begin(self, timeline: Timeline) -> None:
        """Starts the clock."""
        self.timeline = timeline
        self.times.append(time.perf_counter())

    def append(self, frames: np.ndarray) -> None:
        """Adds the frames of a chunk `[f, h, w, 3]`, and stops its time."""
        self.times.append(time.perf_counter())
        self.spool.append(frames)

    @property
    def is_complete(self) -> bool:
        """Whether all chunks were sampled."""
        return self.timeline is not None and len(self.times) == 1 + self.timeline.num_chunks

    def seconds(self) -> dict[str, float]:
        """Seconds by part; the first chunk includes compilation."""
        spans = np.diff(self.times)
        parts = {"loading": self.loading, "sampling": float(spans.sum())}
        if len(spans):
            parts["first_chunk"] = float(spans[0])
        if len(spans) > 1:
            parts["later_chunk"] = float(spans[1:].mean())
        return {name: round(value, 3) for name, value in parts.items()}


class ComparisonFiles:
    """Writes the files of a comparison to a folder.

    Attributes:
      report_path: the report.
      notes: remarks for the user, once the strip is written.
    """

    def __init__(
        self,
        out: Path,
        script: ShotScript,
        names: Sequence[str],
        size: tuple[int, int],
        *,
        formats: Sequence[str],
        scale: int | None,
        stills: int | None,
    ):
        """Files for videos of `size` (height, width), named after the models `names`.

        Raises UserError for a folder that cannot be written, and for a size that a format cannot
        have.
        """
        check_files(size, formats, scale)
        self._side_by_side = SideBySide(names, size, scale=scale)
        for form in formats:
            try:
                FORMATS[form].check_size(*self._side_by_side.size)
            except ValueError as error:
                raise UserError(f"--format={form}: {error}; compare fewer models") from error
        self._out, self._script, self._size = check_writable(out), script, size
        self._files = {name: file_name(name, i, many=True) for i, name in enumerate(names, 1)}
        self._formats, self._scale, self._stills = tuple(formats), scale, stills
        self.report_path = out / "report.json"
        self.notes: tuple[str, ...] = ()

    def begin(
        self, name: str, run: Mapping[str, Any], given: Mapping[str, str], loading: float
    ) -> ComparedVideo:
        """The video of a model; its `spool` has to be closed."""
        return ComparedVideo(name, self._files[name], run, given, FrameSpool(self._out), loading)

    def recorder(self, video: ComparedVideo, timeline: Timeline, notes: Sequence[str]) -> Recorder:
        """The recorder of a video's own files."""
        record = video_record(video.run, self._script, self._size, notes=notes)
        return Recorder(
            self._out,
            timeline,
            [video.file],
            stills=0,
            formats=self._formats,
            scale=self._scale,
            records=[record],
        )

    def write(self, videos: Sequence[ComparedVideo]) -> Iterator[Path]:
        """Writes the strip and the video of all videos, which are complete; yields the paths."""
        timeline = videos[0].timeline
        assert timeline is not None
        segments = prompt_segments(timeline, 0)
        # 1. The strip.
        moments = _moments(timeline, segments, self._stills)
        rows = [video.spool.read([f for _, frames in moments for f in frames]) for video in videos]
        shots = [
            StripShot(caption, tuple(f"{frame / timeline.fps:.1f} s" for frame in frames))
            for caption, frames in moments
        ]
        path = self._out / "strip.png"
        self.notes = comparison_strip(path, rows, [video.name for video in videos], shots)
        yield path
        # 2. The video, in every format.
        for form in self._formats:
            path = video_path(self._out, "compare", form)
            with FORMATS[form](path, fps=timeline.fps, metadata=self._tags(videos)) as writer:
                for start, end, caption in segments:
                    first, last = timeline.num_frames(start), timeline.num_frames(end)
                    for at in range(first, last, BLOCK):
                        frames = range(at, min(at + BLOCK, last))
                        parts = [video.spool.read(frames) for video in videos]
                        writer.append(self._side_by_side.draw(parts, caption))
            yield path

    def write_report(self, videos: Sequence[ComparedVideo]) -> None:
        """Writes the report on the videos that were begun."""
        if not videos:
            return
        first = videos[0]
        values = {
            "script": video_record({}, self._script, self._size)["script"],
            **{name: first.run[name] for name in ("versions", "device", "command", "source")},
            "models": [self._model_values(video, first) for video in videos],
        }
        self.report_path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def _model_values(self, video: ComparedVideo, first: ComparedVideo) -> dict[str, Any]:
        """What the report says of one video, which is compared with the first one."""
        values = {
            "name": video.name,
            "checkpoint": video.run["checkpoint"],
            "adapters": video.run["adapters"],
            "given": dict(video.given),
            "settings": video.run["settings"],
            "files": [video_path(self._out, video.file, form).name for form in self._formats],
            "frames": video.spool.frames,
            "interrupted": not video.is_complete,
            "seconds": video.seconds(),
        }
        if video is not first and video.is_complete and first.is_complete:
            values["psnr_to_first"] = _psnr(video.spool, first.spool)
        return values

    def _tags(self, videos: Sequence[ComparedVideo]) -> dict[str, str]:
        """Tags of the video of all videos."""
        return {
            "title": " | ".join(video.name for video in videos),
            "encoder": f"longlive-jax {longlive_jax.__version__}",
            "description": GENERATED_MARK,
        }


def _moments(
    timeline: Timeline, segments: Sequence[tuple[int, int, str]], stills: int | None
) -> list[tuple[str, list[int]]]:
    """(caption, frames) of the shots of a strip, with `stills` frames per shot."""
    if len(segments) > MAX_COLUMNS:
        chosen = np.linspace(0, len(segments) - 1, MAX_COLUMNS).astype(int)
        segments = [segments[i] for i in chosen]
    most = max(1, MAX_COLUMNS // len(segments))
    count = max(1, STILLS // len(segments)) if stills is None else min(stills, most)
    moments = []
    for start, end, caption in segments:
        first, last = timeline.num_frames(start), timeline.num_frames(end)
        # The middles of equal parts: the first frame after a cut and the last before say less.
        frames = first + (np.arange(count) + 0.5) * (last - first) / count
        moments.append((caption, np.unique(frames.astype(int)).tolist()))
    return moments


def _psnr(spool: FrameSpool, other: FrameSpool) -> float | None:
    """Peak signal-to-noise ratio in dB between two videos; None if they are equal."""
    squares = []
    for at in range(0, spool.frames, BLOCK):
        frames = range(at, min(at + BLOCK, spool.frames))
        difference = spool.read(frames).astype(np.float32) - other.read(frames)
        squares.append(float(np.square(difference).sum(dtype=np.float64)))
    mean = sum(squares) / (spool.frames * difference[0].size)
    return None if mean == 0 else round(float(10 * np.log10(255**2 / mean)), 2)
