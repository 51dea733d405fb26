"""Seeded, captioned multi-shot videos of moving shapes, drawn in numpy.

Frames follow the layout of a causal VAE with temporal stride 4: the first chunk of n latents has
1 + 4 (n - 1) raw frames, every later chunk 4 n. A subject's identity is what its caption does not
mention: its size and the marker at its centre. Both stay the same through a shot and whenever the
subject returns, so a generator must carry them through its context.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from longlive_jax.small_world import drawing, words
from longlive_jax.small_world.drawing import HEIGHT, SPEED, WIDTH
from longlive_jax.small_world.words import BACKGROUNDS, COLOURS, MARKERS, MOTIONS, SHAPES
from longlive_jax.typing import Float

CHUNK_LATENTS = 4
TEMPORAL_STRIDE = 4
GRID = 8
"""Grid spacing in pixels of subject positions at the start of a chunk.

The coarse grid and the three sizes keep the domain small enough for a small model to learn in an
hour. Motion between grid positions is still smooth.
"""
_MIN_JUMP = 16.0  # pixels that a subject moves at a cut, so that every cut is visible


@dataclasses.dataclass(frozen=True)
class Subject:
    """A coloured shape. Shape and colour together are unique within a video.

    Attributes:
      shape: element of SHAPES.
      colour: key of COLOURS.
      radius: size in pixels; not mentioned in captions.
      marker: key of MARKERS, the colour of the centre marker; not mentioned in captions.
    """

    shape: str
    colour: str
    radius: float
    marker: str


@dataclasses.dataclass(frozen=True)
class ShotSpec:
    """One subject moving over one background.

    Attributes:
      subject: the subject.
      background: key of BACKGROUNDS.
      motion: key of MOTIONS.
      x: horizontal centre of the subject in the first frame, in pixels.
      y: vertical centre of the subject in the first frame, in pixels.
      chunks: length.
    """

    subject: Subject
    background: str
    motion: str
    x: float
    y: float
    chunks: int

    @property
    def shape(self) -> str:
        return self.subject.shape

    @property
    def colour(self) -> str:
        return self.subject.colour

    @property
    def caption(self) -> str:
        return words.caption(self)


@dataclasses.dataclass(frozen=True)
class VideoSpec:
    """A video: its shots in order, with a cut before every shot but the first."""

    shots: tuple[ShotSpec, ...]

    @property
    def chunks(self) -> int:
        return sum(shot.chunks for shot in self.shots)

    @property
    def captions(self) -> tuple[str, ...]:
        """One caption per shot, without the cut prefix."""
        return tuple(shot.caption for shot in self.shots)


def frame_count(chunks: int, chunk_latents: int = CHUNK_LATENTS) -> int:
    """Number of raw frames in the first `chunks` chunks; 0 for 0 chunks."""
    return TEMPORAL_STRIDE * chunks * chunk_latents - (TEMPORAL_STRIDE - 1) if chunks else 0


def chunk_count(frames: int, chunk_latents: int = CHUNK_LATENTS) -> int:
    """Smallest number of chunks that holds `frames` raw frames."""
    return -(-(frames + TEMPORAL_STRIDE - 1) // (TEMPORAL_STRIDE * chunk_latents))


def frame_bounds(
    spec: VideoSpec, chunk_latents: int = CHUNK_LATENTS
) -> tuple[tuple[int, int], ...]:
    """Raw-frame range (start, stop) of every shot; `stop` is exclusive."""
    ends = np.cumsum([0, *(shot.chunks for shot in spec.shots)])
    edges = [frame_count(int(end), chunk_latents) for end in ends]
    return tuple(itertools.pairwise(edges))


def sample_spec(
    rng: np.random.Generator,
    *,
    chunks: int,
    split: str | None = "train",
    shot_chunks: tuple[int, int] = (3, 6),
    shots: int | None = None,
    max_subjects: int = 3,
    chunk_latents: int = CHUNK_LATENTS,
) -> VideoSpec:
    """Samples the description of a random video.

    Args:
      rng: the only source of randomness.
      chunks: length of the video; `chunk_count` converts frames to chunks.
      split: "train" or "held_out", the split of every shot's combination; None for both.
      shot_chunks: minimum and maximum chunks per shot; a shorter video is one shot.
      shots: exact number of shots; None draws one of the possible numbers.
      max_subjects: maximum number of distinct subjects, at least 2; subjects often return.
      chunk_latents: latent frames per chunk; they set how far a subject has moved at a cut.

    Raises:
      ValueError: if `split` or `max_subjects` is invalid, or no shots add up to `chunks`.
    """
    words.check_split(split)
    if max_subjects < 2:
        raise ValueError(f"max_subjects must be >= 2 for cuts between subjects, got {max_subjects}")
    shot_lengths = _shot_lengths(rng, chunks, shot_chunks, shots)
    video: list[ShotSpec] = []
    subjects: list[Subject] = []
    at = 0
    for length in shot_lengths:
        last = video[-1] if video else None
        subject, background, motion = _next_scene(rng, last, subjects, split, max_subjects)
        x, y = _start_position(rng, motion, opening=last is None)
        if last:  # resample the position until the cut is visible
            begin = frame_count(at - last.chunks, chunk_latents)
            ahead = _position_after(last, frame_count(at, chunk_latents) - begin)
            while _distance(ahead, (x, y)) < _MIN_JUMP:
                x, y = _start_position(rng, motion)
        if subject not in subjects:
            subjects.append(subject)
        video.append(ShotSpec(subject, background, motion, x, y, length))
        at += length
    return VideoSpec(tuple(video))


def render(
    spec: VideoSpec, chunk_latents: int = CHUNK_LATENTS, *, frames: slice = slice(None)
) -> Float[np.ndarray, "f h w 3"]:
    """Renders a video, or a range of its frames at the cost of that range alone.

    Returns:
      Pixels, float32 in [-1, 1], HEIGHT x WIDTH.
    """
    bounds = frame_bounds(spec, chunk_latents)
    index = np.arange(bounds[-1][1])[frames]
    shot = np.searchsorted([stop for _, stop in bounds], index, side="right")
    rows = np.asarray([_row(s, first) for s, (first, _) in zip(spec.shots, bounds, strict=True)])
    return _draw(rows[shot], index)[0]


def vae_clips(
    rng: np.random.Generator, batch: int, frames: int, cut_probability: float = 0.5
) -> tuple[Float[np.ndarray, "b f h w 3"], Float[np.ndarray, "b f h w"]]:
    """Renders short clips of training combinations, with random sizes and positions, for a VAE.

    With probability `cut_probability` a clip has one cut, at the first frame of a latent (1, 5,
    9, ...).

    Returns:
      Video, float32 in [-1, 1], and the subject's coverage of every pixel, float32 in [0, 1].
    """
    starts = np.arange(1, frames, TEMPORAL_STRIDE)
    has_cut = (rng.random(batch) < cut_probability) & (len(starts) > 0)
    cut = np.where(has_cut, rng.choice(starts, batch) if len(starts) else 0, frames)
    rows = _random_rows(rng, 2 * batch).reshape(batch, 2, -1)
    index = np.broadcast_to(np.arange(frames), (batch, frames))
    second = (index >= cut[:, None]).astype(int)
    rows = rows[np.arange(batch)[:, None], second].reshape(batch * frames, -1)
    video, cover = _draw(rows, index.reshape(-1))
    return (
        video.reshape(batch, frames, HEIGHT, WIDTH, 3),
        cover.reshape(batch, frames, HEIGHT, WIDTH),
    )


# Columns of a row: shape, colour, background, motion, marker (indices), radius, x, y, first frame.


def _row(shot: ShotSpec, first: int) -> tuple[float, ...]:
    subject = shot.subject
    return (
        SHAPES.index(subject.shape),
        list(COLOURS).index(subject.colour),
        list(BACKGROUNDS).index(shot.background),
        list(MOTIONS).index(shot.motion),
        list(MARKERS).index(subject.marker),
        subject.radius,
        shot.x,
        shot.y,
        first,
    )


def _draw(rows: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Video and coverage, given one row and one frame number per frame."""
    shape, colour, background, motion, marker = rows[:, :5].astype(int).T
    radius, x, y, first = rows[:, 5:].T
    step = SPEED * np.asarray(list(MOTIONS.values()))[motion] * (index - first)[:, None]
    outline, dot = drawing.coverage(shape, radius, x + step[:, 0], y + step[:, 1])
    video = drawing.compose(
        outline,
        dot,
        drawing.colour_levels(BACKGROUNDS)[background],
        drawing.colour_levels(COLOURS)[colour],
        drawing.colour_levels(MARKERS)[marker],
    )
    return video, outline


@functools.cache
def _training_scenes() -> np.ndarray:
    """Shape, colour, background and motion indices of every training combination."""
    tables = [list(t) for t in (SHAPES, COLOURS, BACKGROUNDS, MOTIONS)]
    return np.asarray(
        [
            [table.index(word) for table, word in zip(tables, dataclasses.astuple(s), strict=True)]
            for s in words.all_scenes("train")
        ]
    )


def _random_rows(rng: np.random.Generator, n: int) -> np.ndarray:
    scenes = _training_scenes()
    return np.column_stack(
        [
            scenes[rng.integers(len(scenes), size=n)],
            rng.integers(len(MARKERS), size=n),
            rng.uniform(min(drawing.RADII), max(drawing.RADII), n),
            rng.uniform(0, WIDTH, n),
            rng.uniform(0, HEIGHT, n),
            np.zeros(n),
        ]
    )


def _shot_lengths(rng, chunks: int, limits: tuple[int, int], shots: int | None) -> list[int]:
    """Random shot lengths within the limits that add up to `chunks`."""
    low, high = limits
    if not 1 <= low <= high or chunks < 1:
        raise ValueError(
            f"shot_chunks must satisfy 1 <= min <= max, got ({low}, {high}); chunks must be >= 1, "
            f"got {chunks}"
        )
    if chunks < low and shots in (None, 1):
        return [chunks]
    possible = [k for k in range(1, chunks + 1) if k * low <= chunks <= k * high]
    if shots is not None:
        possible = [k for k in possible if k == shots]
    if not possible:
        raise ValueError(
            f"{'no number of' if shots is None else shots} shots of {low} to {high} chunks can add "
            f"up to {chunks} chunks; widen shot_chunks or change chunks"
        )
    remaining, lengths = chunks, []
    for after in reversed(range(int(rng.choice(possible)))):
        shortest, longest = max(low, remaining - after * high), min(high, remaining - after * low)
        lengths.append(int(rng.integers(shortest, longest + 1)))
        remaining -= lengths[-1]
    return [lengths[i] for i in rng.permutation(len(lengths))]


def _next_scene(rng, last: ShotSpec | None, subjects: list, split, max_subjects: int) -> tuple:
    """Random subject, background and motion; at least one of them differs from the last shot."""
    while True:
        if last is None or rng.random() < 0.6:
            subject = _choose_subject(rng, last.subject if last else None, subjects, max_subjects)
        else:
            subject = last.subject
        background, motion = (last.background, last.motion) if last else (None, None)
        if background is None or rng.random() < 0.5:
            background = _pick(rng, BACKGROUNDS)
        if motion is None or rng.random() < 0.6:
            motion = _pick(rng, MOTIONS)
        scene = words.Scene(subject.shape, subject.colour, background, motion)
        changed = last is None or words.caption(scene) != last.caption
        if changed and words.in_split(scene, split):
            return subject, background, motion


def _choose_subject(rng, current: Subject | None, subjects: list, max_subjects: int) -> Subject:
    """An earlier subject other than the current one, or a new one with unused shape and colour."""
    others = [s for s in subjects if s != current]
    if others and (len(subjects) >= max_subjects or rng.random() < 0.5):
        return others[rng.integers(len(others))]
    used = {(s.shape, s.colour) for s in subjects}
    while True:
        shape, colour = _pick(rng, SHAPES), _pick(rng, COLOURS)
        if (shape, colour) not in used:
            return Subject(shape, colour, _pick(rng, drawing.RADII), _pick(rng, MARKERS))


def _start_position(rng, motion: str, opening: bool = False) -> tuple[float, float]:
    """Random grid position of the centre in a shot's first frame.

    The first chunk of a video is TEMPORAL_STRIDE - 1 frames shorter than the others. In an opening
    shot the position is advanced by these frames, so that all later chunks also start on the grid.
    """
    lead = SPEED * (TEMPORAL_STRIDE - 1) * opening
    ahead = MOTIONS[motion]
    x, y = (GRID * int(rng.integers(size // GRID)) for size in (WIDTH, HEIGHT))
    return (x + lead * ahead[0]) % WIDTH, (y + lead * ahead[1]) % HEIGHT


def _position_after(shot: ShotSpec, frames: int) -> tuple[float, float]:
    """Centre `frames` frames after the first frame of the shot, not wrapped around."""
    ahead = MOTIONS[shot.motion]
    return shot.x + SPEED * frames * ahead[0], shot.y + SPEED * frames * ahead[1]


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Shortest distance between two positions on the torus."""
    across, down = (
        (p - q + size / 2) % size - size / 2
        for p, q, size in zip(a, b, (WIDTH, HEIGHT), strict=True)
    )
    return float(np.hypot(across, down))


def _pick(rng, names):
    return tuple(names)[rng.integers(len(names))]
