"""Shot scripts laid out over chunks: what the sampler needs to know about each chunk.

The first latent frame of a video decodes to one raw frame and each later one to `temporal_stride`,
so the first chunk shows `1 + temporal_stride * (n - 1)` frames and the others `temporal_stride *
n`. Durations are counted as if every chunk had `temporal_stride * n` frames: four seconds mean the
same number of chunks anywhere.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.sampling.script import ShotScript
from longlive_jax.spec import UserError


@dataclasses.dataclass(frozen=True)
class Plan:
    """A batch of videos over `k` chunks; the shorter ones are padded with their last prompt.

    Fields: `prompts[b][k]` as the text encoder gets them, `cuts` bool `[b, k]` (true on the first
    chunk of every shot but the first), `shots` int32 `[b, k]`, `lengths` int32 `[b]` in chunks,
    `notes` remarks for the user, `chunk_frames` latent frames a chunk, `temporal_stride` raw frames
    a latent.
    """

    prompts: tuple[tuple[str, ...], ...]
    cuts: np.ndarray
    shots: np.ndarray
    lengths: np.ndarray
    notes: tuple[str, ...]
    chunk_frames: int
    temporal_stride: int
    fps: float

    @property
    def chunks(self) -> int:
        """Chunks of the longest video."""
        return self.cuts.shape[1]

    def offsets(self, shot_rope_offset: int) -> np.ndarray:
        """Temporal position offset of each chunk, int32 `[b, k]`, in latent frames."""
        return (self.shots * shot_rope_offset).astype(np.int32)

    def distinct(self) -> tuple[tuple[str, ...], np.ndarray]:
        """The different prompts in order of appearance, and int32 `[b, k]` indices into them."""
        numbers: dict[str, int] = {}
        index = [[numbers.setdefault(p, len(numbers)) for p in row] for row in self.prompts]
        return tuple(numbers), np.asarray(index, np.int32)

    def frames(self, chunks: int) -> int:
        """Raw frames in the first `chunks` chunks of a video."""
        return max(0, self.temporal_stride * (self.chunk_frames * chunks - 1) + 1)

    def cut_frames(self, video: int) -> list[int]:
        """Raw frames of one video on which a new shot begins."""
        chunks = np.flatnonzero(self.cuts[video, : self.lengths[video]])
        return [self.frames(int(k)) for k in chunks]


def plan(
    scripts: ShotScript | Sequence[ShotScript],
    *,
    chunk_frames: int,
    temporal_stride: int = 4,
    fps: float = 24.0,
    prefix: str = CUT_PREFIX,
) -> Plan:
    """Lays scripts out over chunks of `chunk_frames` latent frames.

    A duration that is no whole number of chunks is rounded up, and a note says so. `prefix` opens
    the prompt of the first chunk after a cut, unless the script has written it there itself.
    """
    batch = [scripts] if isinstance(scripts, ShotScript) else list(scripts)
    if not batch:
        raise UserError("no script to sample")
    if chunk_frames < 1 or temporal_stride < 1 or fps <= 0:
        raise ValueError(
            f"chunk, stride and fps must be positive, got {chunk_frames}, {temporal_stride}, {fps}"
        )
    chunk_seconds = chunk_frames * temporal_stride / fps
    laid = [_lay_out(script, chunk_seconds, prefix) for script in batch]
    lengths = np.asarray([len(prompts) for prompts, _, _ in laid], np.int32)
    longest = int(lengths.max())
    cuts = np.zeros((len(laid), longest), bool)
    shots = np.zeros((len(laid), longest), np.int32)
    padded = []
    for row, (prompts, starts, numbers) in enumerate(laid):
        missing = longest - len(prompts)
        cuts[row, : len(starts)] = starts
        shots[row] = numbers + numbers[-1:] * missing
        # The prefix belongs to a cut; repeating it would announce cuts that are not there.
        last = batch[row].shots[-1].prompt.removeprefix(prefix)
        padded.append(tuple(prompts + [last] * missing))
    notes = tuple(
        note for script in batch for note in _notes(script, chunk_seconds, len(batch) > 1)
    )
    return Plan(tuple(padded), cuts, shots, lengths, notes, chunk_frames, temporal_stride, fps)


def _lay_out(
    script: ShotScript, chunk_seconds: float, prefix: str
) -> tuple[list[str], list[bool], list[int]]:
    """Prompt, cut flag and shot number of each chunk."""
    prompts: list[str] = []
    cuts: list[bool] = []
    numbers: list[int] = []
    number = 0
    for i, shot in enumerate(script.shots):
        cut = shot.cut and i > 0
        number += cut
        length = shot.length(chunk_seconds)
        first = shot.prompt
        if cut and not first.startswith(prefix):
            first = prefix + first
        prompts += [first] + [shot.prompt.removeprefix(prefix)] * (length - 1)
        cuts += [cut] + [False] * (length - 1)
        numbers += [number] * length
    return prompts, cuts, numbers


def _notes(script: ShotScript, chunk_seconds: float, several: bool) -> list[str]:
    video = f"{script.name}: " if several and script.name else ""
    notes = [video + note for note in script.notes]
    for i, shot in enumerate(script.shots):
        length = shot.length(chunk_seconds)
        if shot.seconds is not None and abs(shot.seconds - length * chunk_seconds) > 1e-3:
            notes.append(
                f"{video}shot {i + 1}: {shot.seconds:g} s rounded up to "
                f"{length * chunk_seconds:.3g} s ({length} chunks of {chunk_seconds:.3g} s)"
            )
    return notes
