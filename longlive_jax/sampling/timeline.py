"""Shot scripts on a timeline of chunks: the prompt, cut and shot of every chunk.

The first latent frame of a video decodes to one raw frame and every later one to `temporal_stride`,
so the first chunk has `1 + temporal_stride * (n - 1)` frames and every other one `temporal_stride *
n`. All chunks that continue a given video have `temporal_stride * n`. Durations are converted as if
every chunk had `temporal_stride * n` frames: four seconds are the same number of chunks anywhere in
a video.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.sampling.script import MAX_CHUNKS, ShotScript
from longlive_jax.spec import UserError


class ChunkPrompt(NamedTuple):
    """What one chunk of one video shows.

    Attributes:
      prompt: text for the text encoder, with the cut prefix if the chunk begins a shot.
      cut: whether the chunk begins a shot other than the first.
      shot: index of its shot, with those of a continued video before it.
    """

    prompt: str
    cut: bool
    shot: int


@dataclasses.dataclass(frozen=True)
class VideoTimeline:
    """Position of one video in its script; immutable, so that a stream can be snapshotted.

    Attributes:
      prompts: prompt of each scripted chunk.
      cuts: whether each scripted chunk is a cut.
      prefix: opens the prompt of a cut chunk.
      chunk: index of the next chunk.
      shot: index of the current shot.
      steered_prompt: prompt that has replaced the script, or None.
      pending_cut: whether the next chunk is to be a cut, once steered.
    """

    prompts: tuple[str, ...]
    cuts: tuple[bool, ...]
    prefix: str
    chunk: int = 0
    shot: int = 0
    steered_prompt: str | None = None
    pending_cut: bool = False

    def steer(self, prompt: str | None, *, cut: bool) -> "VideoTimeline":
        """Replaces the rest of the script by `prompt`; None keeps the current chunk's prompt."""
        if prompt is None:
            prompt = self.steered_prompt
        if prompt is None:
            current = max(0, min(self.chunk, len(self.prompts)) - 1)
            prompt = self.prompts[current].removeprefix(self.prefix)
        pending_cut = self.pending_cut or cut
        return dataclasses.replace(self, steered_prompt=prompt, pending_cut=pending_cut)

    def advance(self, *, is_first: bool) -> tuple[ChunkPrompt, "VideoTimeline"]:
        """The next chunk, and the timeline after it.

        `is_first` marks the first chunk of a video, which cannot be a cut. After the script's end
        the last prompt repeats.
        """
        cut = False
        if self.steered_prompt is not None:
            cut, prompt = self.pending_cut and not is_first, self.steered_prompt
            prompt = self.prefix + prompt.removeprefix(self.prefix) if cut else prompt
        elif self.chunk < len(self.prompts):
            prompt, cut = self.prompts[self.chunk], self.cuts[self.chunk]
        else:
            prompt = self.prompts[-1].removeprefix(self.prefix)
        after = dataclasses.replace(
            self, chunk=self.chunk + 1, shot=self.shot + cut, pending_cut=False
        )
        return ChunkPrompt(prompt, cut, after.shot), after


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Scripts of a batch of videos over `k` chunks; shorter videos repeat their last prompt.

    Attributes:
      prompts: `[b][k]` prompts for the text encoder.
      cuts: bool `[b, k]`, true on the first chunk of every shot but the video's first.
      shots: int32 `[b, k]`, index of each chunk's shot.
      lengths: int32 `[b]`, chunks of each video without padding.
      notes: remarks for the user.
      chunk_frames: latent frames per chunk.
      temporal_stride: raw frames per latent frame.
      fps: raw frames per second.
      prefix: opens the prompt of a cut chunk.
      past_shots: shots of the video that is continued; 0 for a new video.
    """

    prompts: tuple[tuple[str, ...], ...]
    cuts: np.ndarray
    shots: np.ndarray
    lengths: np.ndarray
    notes: tuple[str, ...]
    chunk_frames: int
    temporal_stride: int
    fps: float
    prefix: str = CUT_PREFIX
    past_shots: int = 0

    @property
    def num_chunks(self) -> int:
        """Chunks of the longest video."""
        return self.cuts.shape[1]

    def shot_rope_offsets(self, shot_rope_offset: int) -> np.ndarray:
        """Temporal position offset of each chunk, int32 `[b, k]`, in latent frames."""
        return (self.shots * shot_rope_offset).astype(np.int32)

    def distinct_prompts(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The distinct prompts in order of appearance, and int32 `[b, k]` indices into them."""
        numbers: dict[str, int] = {}
        index = [[numbers.setdefault(p, len(numbers)) for p in row] for row in self.prompts]
        return tuple(numbers), np.asarray(index, np.int32)

    def num_frames(self, chunks: int) -> int:
        """Raw frames in the first `chunks` chunks, without those of a continued video."""
        missing = 0 if self.past_shots else self.temporal_stride - 1
        return max(0, self.temporal_stride * self.chunk_frames * chunks - missing)

    def cut_frames(self, video: int) -> list[int]:
        """First raw frame of every shot but the video's first, in one video.

        Frames count from the first generated one; a continued video can have a cut at 0.
        """
        chunks = np.flatnonzero(self.cuts[video, : self.lengths[video]])
        return [self.num_frames(int(k)) for k in chunks]

    def videos(self) -> tuple[VideoTimeline, ...]:
        """Every video at its beginning."""
        return tuple(
            VideoTimeline(
                prompts, tuple(map(bool, cuts)), self.prefix, shot=max(0, self.past_shots - 1)
            )
            for prompts, cuts in zip(self.prompts, self.cuts, strict=True)
        )


def make_timeline(
    scripts: ShotScript | Sequence[ShotScript],
    *,
    chunk_frames: int,
    temporal_stride: int = 4,
    fps: float = 24.0,
    prefix: str = CUT_PREFIX,
    past_shots: int = 0,
) -> Timeline:
    """The timeline of a batch of scripts, in chunks of `chunk_frames` latent frames.

    A duration that is not a multiple of a chunk is rounded up, with a note. `prefix` opens the
    prompt of the first chunk after a cut, unless the script's prompt has it already. With
    `past_shots`, the scripts continue a video of that many shots. Raises UserError for no scripts
    and for videos of too many chunks, ValueError for sizes that are not positive.
    """
    batch = [scripts] if isinstance(scripts, ShotScript) else list(scripts)
    if not batch:
        raise UserError("no script to sample")
    if chunk_frames < 1 or temporal_stride < 1 or fps <= 0:
        raise ValueError(
            "chunk_frames, temporal_stride and fps must be positive, got "
            f"{chunk_frames}, {temporal_stride}, {fps}"
        )
    # 1. Chunks of every video.
    chunk_seconds = chunk_frames * temporal_stride / fps
    videos = [_chunk_prompts(script, chunk_seconds, prefix, past_shots) for script in batch]
    lengths = np.asarray([len(video) for video in videos], np.int32)
    # 2. Pad to the longest. The prefix belongs to a cut, so a repeated prompt goes without it.
    for video in videos:
        last = ChunkPrompt(video[-1].prompt.removeprefix(prefix), False, video[-1].shot)
        video += [last] * (int(lengths.max()) - len(video))
    notes = [note for script in batch for note in _notes(script, chunk_seconds, len(batch) > 1)]
    return Timeline(
        prompts=tuple(tuple(chunk.prompt for chunk in video) for video in videos),
        cuts=np.asarray([[chunk.cut for chunk in video] for video in videos], bool),
        shots=np.asarray([[chunk.shot for chunk in video] for video in videos], np.int32),
        lengths=lengths,
        notes=tuple(notes),
        chunk_frames=chunk_frames,
        temporal_stride=temporal_stride,
        fps=fps,
        prefix=prefix,
        past_shots=past_shots,
    )


def _check_length(script: ShotScript, chunk_seconds: float) -> None:
    """UserError for a video that is too long for its timeline."""
    chunks = sum(shot.length(chunk_seconds) for shot in script.shots)
    if chunks > MAX_CHUNKS:
        name = f"{script.name}: " if script.name else ""
        raise UserError(
            f"{name}the shots have {chunks} chunks of {chunk_seconds:.3g} s; must be <= "
            f"{MAX_CHUNKS} in all, use an endless stream"
        )


def _chunk_prompts(
    script: ShotScript, chunk_seconds: float, prefix: str, past_shots: int
) -> list[ChunkPrompt]:
    """Prompt, cut and shot of each chunk of one script; UserError if there are too many."""
    _check_length(script, chunk_seconds)
    chunks: list[ChunkPrompt] = []
    number = max(0, past_shots - 1)
    for i, shot in enumerate(script.shots):
        cut = script.is_cut(i, continues=past_shots > 0)
        number += cut
        first = shot.prompt
        if cut and not first.startswith(prefix):
            first = prefix + first
        rest = ChunkPrompt(shot.prompt.removeprefix(prefix), False, number)
        chunks.append(ChunkPrompt(first, cut, number))
        chunks += [rest] * (shot.length(chunk_seconds) - 1)
    return chunks


def _notes(script: ShotScript, chunk_seconds: float, is_batch: bool) -> list[str]:
    """Remarks on one script; in a batch they begin with the video's name."""
    video = f"{script.name}: " if is_batch and script.name else ""
    notes = [video + note for note in script.notes]
    for i, shot in enumerate(script.shots):
        length = shot.length(chunk_seconds)
        if shot.seconds is not None and abs(shot.seconds - length * chunk_seconds) > 1e-3:
            notes.append(
                f"{video}shot {i + 1}: {shot.seconds:g} s rounded up to "
                f"{length * chunk_seconds:.3g} s ({length} chunks of {chunk_seconds:.3g} s)"
            )
    return notes
