"""The files of a sampled video: an MP4 written chunk by chunk, a strip of stills, latents."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from longlive_jax.io.paths import check_writable
from longlive_jax.io.pictures import strip
from longlive_jax.io.video import Mp4Writer
from longlive_jax.sampling.stream import Chunk
from longlive_jax.sampling.timeline import Timeline

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


@dataclasses.dataclass
class StripRow:
    """The stills of one segment.

    Attributes:
      caption: its prompt without the cut prefix.
      picks: indices of the raw frames to show.
      stills: the frames picked so far.
    """

    caption: str
    picks: np.ndarray
    stills: list[np.ndarray] = dataclasses.field(default_factory=list)


class VideoFiles:
    """The files of one video of a batch. Every appended chunk survives a crash of the program.

    The strip has a row per segment. Prompts and cuts are those of the chunks, so a steered video is
    captioned with what was generated.
    """

    def __init__(
        self, folder: Path, name: str, timeline: Timeline, video: int, *, stills: int, latents: bool
    ):
        self.path = folder / f"{name}.mp4"
        self.strip_path = folder / ("strip.png" if name == "video" else f"{name}.strip.png")
        self.latents_path = folder / f"{name}.latents.npy"
        self.frames = 0
        self._timeline, self._video = timeline, video
        self._num_chunks = int(timeline.lengths[video])
        self._num_stills = stills
        self._writer = Mp4Writer(self.path, fps=timeline.fps)
        self._latents: list[np.ndarray] | None = [] if latents else None
        self._planned_ends = {
            (a, prompt): end for a, end, prompt in prompt_segments(timeline, video)
        }
        self._prompt: str | None = None
        self._rows: list[StripRow] = []

    def append(self, chunk: Chunk) -> None:
        """Writes this video's frames of the next chunk; padding after its end is dropped."""
        if chunk.index >= self._num_chunks:
            return
        frames = chunk.frames[self._video]
        self._append_stills(chunk, frames)
        if self._latents is not None:
            self._latents.append(np.asarray(chunk.latents[self._video]))
        self._writer.append(frames)
        self.frames += len(frames)

    def close(self) -> None:
        """Finishes all files; without any frames there are none."""
        self._writer.close()
        if self._latents:
            np.save(self.latents_path, np.concatenate(self._latents))
        rows = [row for row in self._rows if row.stills]
        if rows:
            strip(
                self.strip_path, [np.stack(row.stills) for row in rows], [r.caption for r in rows]
            )

    def _append_stills(self, chunk: Chunk, frames: np.ndarray) -> None:
        prompt = chunk.prompt[self._video].removeprefix(self._timeline.prefix)
        if prompt != self._prompt or chunk.cut[self._video]:
            self._prompt = prompt
            self._rows.append(StripRow(prompt, self._picks(chunk, prompt)))
        if len(self._rows) <= STRIP_ROWS:
            offsets = self._rows[-1].picks - chunk.first_frame
            inside = offsets[(offsets >= 0) & (offsets < len(frames))]
            self._rows[-1].stills += [frames[i].copy() for i in inside]

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
    ):
        """Files named after `names` in `folder`.

        `stills` is the number of pictures per segment in the strip, 0 for no strip; `latents` also
        writes the latents. Raises UserError for a folder that cannot be written.
        """
        check_writable(folder)
        self.videos = [
            VideoFiles(folder, name, timeline, i, stills=stills, latents=latents)
            for i, name in enumerate(names)
        ]

    def append(self, chunk: Chunk) -> None:
        """Adds a chunk of every video."""
        for video in self.videos:
            video.append(chunk)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for video in self.videos:
            video.close()
