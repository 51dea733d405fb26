"""Seeded, captioned multi-shot videos of moving shapes, drawn in numpy.

Frames follow the layout of a causal VAE with temporal ratio 4: the first chunk of n latents is
1 + 4 (n - 1) raw frames long, every later one 4 n. A subject keeps what its caption does not
say (size and centre mark) through a shot and whenever it returns: that is the identity that a
generator has to remember.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from longlive_jax.small_world import drawing, words
from longlive_jax.small_world.drawing import HEIGHT, SPEED, WIDTH
from longlive_jax.small_world.words import BACKGROUNDS, COLOURS, MARKS, MOTIONS, SHAPES
from longlive_jax.typing import Float

CHUNK_LATENTS = 4
TEMPORAL_RATIO = 4
GRID = 8
"""Pixels between the places where a subject can be when a chunk begins. So few of them, and the
three sizes, make a world that a small model can learn in an hour; between them things still move
smoothly."""
_LEAST_JUMP = 16.0  # pixels: a cut always moves the subject, or it could not be seen


@dataclasses.dataclass(frozen=True)
class Subject:
    """One actor. Within a video no two share shape and colour, so a caption identifies it.

    radius in pixels and mark (a key of MARKS) are its unspoken identity.
    """

    shape: str
    colour: str
    radius: float
    mark: str


@dataclasses.dataclass(frozen=True)
class Shot:
    """chunks of one subject on one background; x, y: centre in pixels at its first frame."""

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
    """A whole video: its shots in order, with a cut before each but the first."""

    shots: tuple[Shot, ...]

    @property
    def chunks(self) -> int:
        return sum(shot.chunks for shot in self.shots)

    @property
    def captions(self) -> tuple[str, ...]:
        """One caption per shot, without the cut prefix."""
        return tuple(shot.caption for shot in self.shots)


def frame_count(chunks: int, chunk_latents: int = CHUNK_LATENTS) -> int:
    """Raw frames of the first `chunks` chunks (0 for none)."""
    return TEMPORAL_RATIO * chunks * chunk_latents - (TEMPORAL_RATIO - 1) if chunks else 0


def chunk_count(frames: int, chunk_latents: int = CHUNK_LATENTS) -> int:
    """The least number of chunks that holds so many raw frames."""
    return -(-(frames + TEMPORAL_RATIO - 1) // (TEMPORAL_RATIO * chunk_latents))


def frame_bounds(
    spec: VideoSpec, chunk_latents: int = CHUNK_LATENTS
) -> tuple[tuple[int, int], ...]:
    """(first, one past last) raw frame of every shot."""
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
    cast: int = 3,
    chunk_latents: int = CHUNK_LATENTS,
) -> VideoSpec:
    """Draw a video of `chunks` chunks.

    Args:
        rng: the only source of randomness.
        chunks: length of the video; `chunk_count` turns frames into chunks.
        split: "train" or "held_out": every shot's combination comes from it; None: from both.
        shot_chunks: least and most chunks of a shot. A video shorter than the least is one shot.
        shots: exact number of shots; drawn among the possible ones when None.
        cast: most subjects in one video, at least 2; later shots often bring one back.
        chunk_latents: latents of a chunk, so that a cut knows where the last subject has got to.

    Raises:
        ValueError: if no number of shots within the limits adds up to `chunks`.
    """
    words.check_split(split)
    if cast < 2:
        raise ValueError(f"cast {cast} is too small: cuts between subjects need at least 2")
    lengths = _lengths(rng, chunks, shot_chunks, shots)
    made: list[Shot] = []
    known: list[Subject] = []
    at = 0
    for length in lengths:
        last = made[-1] if made else None
        subject, background, motion = _next_scene(rng, last, known, split, cast)
        x, y = _place(rng, motion, opening=last is None)
        if last:
            begin = frame_count(at - last.chunks, chunk_latents)
            ahead = _position(last, frame_count(at, chunk_latents) - begin)
            while _distance(ahead, (x, y)) < _LEAST_JUMP:
                x, y = _place(rng, motion)
        if subject not in known:
            known.append(subject)
        made.append(Shot(subject, background, motion, x, y, length))
        at += length
    return VideoSpec(tuple(made))


def render(
    spec: VideoSpec, chunk_latents: int = CHUNK_LATENTS, *, frames: slice = slice(None)
) -> Float[np.ndarray, "f h w 3"]:
    """Draw a video, or the given range of its frames at the cost of that range alone.

    Returns float32 in [-1, 1], HEIGHT x WIDTH pixels.
    """
    bounds = frame_bounds(spec, chunk_latents)
    index = np.arange(bounds[-1][1])[frames]
    shot = np.searchsorted([stop for _, stop in bounds], index, side="right")
    rows = np.asarray([_row(s, first) for s, (first, _) in zip(spec.shots, bounds, strict=True)])
    return _draw(rows[shot], index)[0]


def vae_clips(
    rng: np.random.Generator, batch: int, frames: int, cut_probability: float = 0.5
) -> tuple[Float[np.ndarray, "b f h w 3"], Float[np.ndarray, "b f h w"]]:
    """Short clips for training a VAE: training combinations, at random phases of their motion.

    A clip has one cut with `cut_probability`, on a frame where a latent begins (1, 5, 9, ...).

    Returns:
        video float32 in [-1, 1]; coverage by the subject, float32 in [0, 1].
    """
    starts = np.arange(1, frames, TEMPORAL_RATIO)
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


# A row holds shape, colour, background, motion, mark (indices), radius, x, y, first frame.


def _row(shot: Shot, first: int) -> tuple[float, ...]:
    subject = shot.subject
    return (
        SHAPES.index(subject.shape),
        list(COLOURS).index(subject.colour),
        list(BACKGROUNDS).index(shot.background),
        list(MOTIONS).index(shot.motion),
        list(MARKS).index(subject.mark),
        subject.radius,
        shot.x,
        shot.y,
        first,
    )


def _draw(rows: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Video and coverage of one row and frame number per frame."""
    shape, colour, background, motion, mark = rows[:, :5].astype(int).T
    radius, x, y, first = rows[:, 5:].T
    step = SPEED * np.asarray(list(MOTIONS.values()))[motion] * (index - first)[:, None]
    outline, dot = drawing.coverage(shape, radius, x + step[:, 0], y + step[:, 1])
    video = drawing.compose(
        outline,
        dot,
        drawing.levels(BACKGROUNDS)[background],
        drawing.levels(COLOURS)[colour],
        drawing.levels(MARKS)[mark],
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
            rng.integers(len(MARKS), size=n),
            rng.uniform(min(drawing.RADII), max(drawing.RADII), n),
            rng.uniform(0, WIDTH, n),
            rng.uniform(0, HEIGHT, n),
            np.zeros(n),
        ]
    )


def _lengths(rng, chunks: int, limits: tuple[int, int], shots: int | None) -> list[int]:
    """Random shot lengths within the limits that add up to chunks."""
    low, high = limits
    if not 1 <= low <= high or chunks < 1:
        raise ValueError(
            f"shots of {low} to {high} chunks in a video of {chunks}: need 1 <= least <= most "
            "and at least one chunk"
        )
    if chunks < low and shots in (None, 1):
        return [chunks]
    possible = [k for k in range(1, chunks + 1) if k * low <= chunks <= k * high]
    if shots is not None:
        possible = [k for k in possible if k == shots]
    if not possible:
        raise ValueError(
            f"{'no number of' if shots is None else shots} shots of {low} to {high} chunks add "
            f"up to {chunks} chunks; widen shot_chunks or change chunks"
        )
    left, lengths = chunks, []
    for after in reversed(range(int(rng.choice(possible)))):
        least, most = max(low, left - after * high), min(high, left - after * low)
        lengths.append(int(rng.integers(least, most + 1)))
        left -= lengths[-1]
    return [lengths[i] for i in rng.permutation(len(lengths))]


def _next_scene(rng, last: Shot | None, known: list, split, cast: int) -> tuple:
    """Subject, background and motion: one of them differs from the last shot, or several."""
    while True:
        if last is None or rng.random() < 0.6:
            subject = _choose_subject(rng, last.subject if last else None, known, cast)
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


def _choose_subject(rng, current: Subject | None, known: list, cast: int) -> Subject:
    """One seen before (not the current one), or a new one with its own shape and colour."""
    others = [s for s in known if s != current]
    if others and (len(known) >= cast or rng.random() < 0.5):
        return others[rng.integers(len(others))]
    taken = {(s.shape, s.colour) for s in known}
    while True:
        shape, colour = _pick(rng, SHAPES), _pick(rng, COLOURS)
        if (shape, colour) not in taken:
            return Subject(shape, colour, _pick(rng, drawing.RADII), _pick(rng, MARKS))


def _place(rng, motion: str, opening: bool = False) -> tuple[float, float]:
    """Centre at a shot's first frame, on the grid.

    A video's first chunk lacks a few frames; its subject is where these would have taken it, so
    that all later chunks begin on the grid too.
    """
    lead = SPEED * (TEMPORAL_RATIO - 1) * opening
    ahead = MOTIONS[motion]
    x, y = (GRID * int(rng.integers(size // GRID)) for size in (WIDTH, HEIGHT))
    return (x + lead * ahead[0]) % WIDTH, (y + lead * ahead[1]) % HEIGHT


def _position(shot: Shot, frames: int) -> tuple[float, float]:
    """Centre so many frames after the shot's first, not folded."""
    ahead = MOTIONS[shot.motion]
    return shot.x + SPEED * frames * ahead[0], shot.y + SPEED * frames * ahead[1]


def _distance(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Length of the shortest way between two places on the torus."""
    across, down = (
        (p - q + size / 2) % size - size / 2
        for p, q, size in zip(a, b, (WIDTH, HEIGHT), strict=True)
    )
    return float(np.hypot(across, down))


def _pick(rng, names):
    return tuple(names)[rng.integers(len(names))]
