"""From shots to chunks: which frames of which shot a training clip is made of.

Pure functions of the shots' lengths in frames at 24 a second; no file is opened. The rules are the
reference dataset's. For chunks of m latents, the first chunk of a clip takes 1 + 4 (m - 1) raw
frames and every later one 4 m. A chunk never mixes shots: a shot gives chunks as long as it can,
then the next shot that can give one goes on, and what is left at the end of a shot is dropped.

Cuts are said, not only hinted at by the prompt's prefix as in the reference: every chunk has a
flag, and the trainer need not read it out of text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.typing import Bool, Float, Int

__all__ = [
    "FPS",
    "ClipPlan",
    "JoinSpec",
    "Part",
    "Piece",
    "count",
    "plan",
    "raw_frame_slice",
    "starts",
    "windows",
]

FPS = 24
"""Frames a second of every clip, whatever its files have."""

Place = tuple[int, int]
"""A shot's index and a frame in it."""

Part = slice | Sequence[int]
"""Some of a clip's raw frames: a run of them, or their numbers, rising."""


@dataclasses.dataclass(frozen=True)
class JoinSpec:
    """How shots are joined to clips of equal length.

    Attributes:
      chunks: of a clip.
      chunk_frames: latents of a chunk.
      max_chunks_per_shot: after so many, a second of the shot is skipped, which counts as a cut
        (a virtual one); 0 is no limit.
      pad: a sample too short for the clip is used: its last frame is repeated, with its last
        caption, and the repeated latents are masked. Without it such a sample is unusable.
      min_latents: real latents that a padded clip must have.
      single_shot: a clip stays in one shot.
      cut_prefix: opens the prompt of the first chunk after a cut.
      temporal_stride: raw frames of a latent, the first one aside.
    """

    chunks: int = 12
    chunk_frames: int = 8
    max_chunks_per_shot: int = 0
    pad: bool = False
    min_latents: int = 1
    single_shot: bool = False
    cut_prefix: str = CUT_PREFIX
    temporal_stride: int = 4

    def __post_init__(self) -> None:
        least = {
            "chunks": 1,
            "chunk_frames": 1,
            "max_chunks_per_shot": 0,
            "min_latents": 1,
            "temporal_stride": 1,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {bound}")
        if self.min_latents > self.latents:
            raise ValueError(
                f"min_latents is {self.min_latents}; a clip of {self.chunks} chunks of "
                f"{self.chunk_frames} has only {self.latents}"
            )

    @property
    def latents(self) -> int:
        """Latents of a clip."""
        return self.chunks * self.chunk_frames

    @property
    def frames(self) -> int:
        """Raw frames of a clip."""
        return 1 + self.temporal_stride * (self.latents - 1)

    def num_raw_frames(self, chunk_index: int) -> int:
        """Raw frames of a chunk: the first one's first latent is a single frame."""
        return self.temporal_stride * self.chunk_frames - (self.temporal_stride - 1) * (
            chunk_index == 0
        )


@dataclasses.dataclass(frozen=True)
class Piece:
    """The frames of one chunk: `frames` of shot `shot` from `start` on, and the last one repeated.

    Without any frames of its own (`frames` is 0) it repeats frame `start`.
    """

    shot: int
    start: int
    frames: int
    cut: bool


@dataclasses.dataclass(frozen=True)
class ClipPlan:
    """One clip of a sample, a piece a chunk."""

    spec: JoinSpec
    pieces: tuple[Piece, ...]

    def frames(self, part: Part = slice(None)) -> list[Place]:
        """Shot and frame of the raw frames of the clip, or of a part of them."""
        places = []
        for i, piece in enumerate(self.pieces):
            last = piece.start + max(piece.frames - 1, 0)
            wanted = range(piece.start, piece.start + self.spec.num_raw_frames(i))
            places += [(piece.shot, min(at, last)) for at in wanted]
        return places[part] if isinstance(part, slice) else [places[i] for i in part]

    @property
    def mask(self) -> Float[np.ndarray, "f"]:
        """1 for latents all of whose frames are real, 0 for padding."""
        here = np.arange(self.spec.chunk_frames)
        rows = [here < _latents(self.spec, i, piece.frames) for i, piece in enumerate(self.pieces)]
        return np.concatenate(rows).astype(np.float32)

    @property
    def cut(self) -> Bool[np.ndarray, "k"]:
        """Which chunks begin a shot, the clip's first one aside."""
        return np.array([piece.cut for piece in self.pieces])

    @property
    def shot(self) -> Int[np.ndarray, "k"]:
        """Number of cuts, virtual ones included, up to each chunk."""
        return np.cumsum(self.cut).astype(np.int32)

    def prompts(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Every chunk's prompt: its shot's caption, with the prefix after a cut."""
        return tuple(self.spec.cut_prefix * p.cut + captions[p.shot] for p in self.pieces)


def plan(
    lengths: Sequence[int], spec: JoinSpec, rng: np.random.Generator | None = None
) -> ClipPlan:
    """A clip from shots of so many frames, from the beginning or, given `rng`, from anywhere.

    A random clip begins at any of `starts`. If there is none, and without `rng`, it begins with the
    first shot that has enough. Raises Unusable if the shots are too short.
    """
    places = starts(lengths, spec) if rng is not None else []
    if rng is not None and places:
        return ClipPlan(spec, _walk(lengths, spec, places[rng.integers(len(places))]))
    for shot in range(len(lengths)):
        found = _walk(lengths, spec, (shot, 0))
        if len(found) == spec.chunks:
            return ClipPlan(spec, found)
        if not spec.single_shot:
            break
    return _padded(lengths, spec)


def starts(lengths: Sequence[int], spec: JoinSpec) -> list[Place]:
    """Where a clip can begin so that all its chunks are found moving forward.

    As in the reference, at most about 50 places a shot, evenly spaced.
    """
    places = []
    for shot, length in enumerate(lengths):
        last = length - spec.num_raw_frames(0)
        step = max(1, last // 50)
        candidates = [(shot, frame) for frame in range(0, last + 1, step)]
        places += [at for at in candidates if len(_walk(lengths, spec, at)) == spec.chunks]
    return places


def windows(lengths: Sequence[int], spec: JoinSpec, most: int = 0) -> list[ClipPlan]:
    """Clips of a sample one after the other, `most` of them, or (0) as many as it can fill.

    Only the first one may be padded. Raises Unusable if there is not even one.
    """
    found = [plan(lengths, spec)]
    while most == 0 or len(found) < most:
        last = found[-1].pieces[-1]
        if last.frames < spec.num_raw_frames(spec.chunks - 1):
            break
        at = (last.shot, last.start + last.frames)
        pieces = _walk(lengths, spec, at)
        if len(pieces) < spec.chunks and spec.single_shot:
            later = (_walk(lengths, spec, (s, 0)) for s in range(last.shot + 1, len(lengths)))
            pieces = next((p for p in later if len(p) == spec.chunks), ())
        if len(pieces) < spec.chunks:
            break
        found.append(ClipPlan(spec, pieces))
    return found


def count(lengths: Sequence[int], spec: JoinSpec) -> int:
    """Chunks of the longest clip that these shots could fill from their beginning."""
    most = 1 + sum(lengths) // (spec.temporal_stride * spec.chunk_frames)
    longest = dataclasses.replace(spec, chunks=most, min_latents=1)
    shots = range(len(lengths) if spec.single_shot else 1)
    return max([len(_walk(lengths, longest, (shot, 0))) for shot in shots])


def raw_frame_slice(first: int, last: int, *, temporal_stride: int = 4) -> slice:
    """The raw frames that latents [first, last) of a clip stand for."""
    return slice(
        max(0, 1 + temporal_stride * (first - 1)), max(0, 1 + temporal_stride * (last - 1))
    )


def _walk(lengths: Sequence[int], spec: JoinSpec, at: Place) -> tuple[Piece, ...]:
    """Whole chunks from a place on, until the clip is full or the shots are used up."""
    shot, frame = at
    pieces: list[Piece] = []
    taken = 0
    while len(pieces) < spec.chunks:
        need = spec.num_raw_frames(len(pieces))
        cut = bool(spec.max_chunks_per_shot) and taken == spec.max_chunks_per_shot
        if cut:
            frame, taken = frame + FPS, 0
        while frame + need > lengths[shot]:
            shot, frame, taken, cut = shot + 1, 0, 0, bool(pieces)
            if spec.single_shot or shot == len(lengths):
                return tuple(pieces)
        pieces.append(Piece(shot, frame, need, cut))
        frame, taken = frame + need, taken + 1
    return tuple(pieces)


def _latents(spec: JoinSpec, chunk_index: int, frames: int) -> int:
    """Latents that the first `frames` frames of a chunk make up entirely."""
    return (
        frames + (spec.temporal_stride - 1) * (chunk_index == 0 and frames > 0)
    ) // spec.temporal_stride


def _padded(lengths: Sequence[int], spec: JoinSpec) -> ClipPlan:
    """Whole chunks from the beginning, then what is left of their shot, then repeated frames."""
    shots = range(len(lengths)) if spec.single_shot else range(1)
    walks: list[tuple[Piece, ...]] = [_walk(lengths, spec, (shot, 0)) for shot in shots]
    longest = max(walks, key=len)
    pieces = list(longest)
    if not spec.pad:
        listed = ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
        raise Unusable(
            f"too short: fills {len(pieces)} of {spec.chunks} chunks ({spec.num_raw_frames(0)} "
            f"frames, then {spec.num_raw_frames(1)} each) from shots of {listed} frames at {FPS} a "
            "second"
        )
    if pieces:
        shot, at = pieces[-1].shot, pieces[-1].start + pieces[-1].frames
    else:
        shot, at = max(range(len(lengths)), key=lambda i: lengths[i]), 0
    run = next((i for i, piece in enumerate(reversed(pieces)) if piece.cut), len(pieces) - 1) + 1
    due = bool(pieces) and run == spec.max_chunks_per_shot  # a virtual cut
    rest = 0 if due else lengths[shot] - at
    if rest:
        pieces.append(Piece(shot, at, rest, cut=False))
    real = sum(_latents(spec, i, piece.frames) for i, piece in enumerate(pieces))
    if real < spec.min_latents:
        raise Unusable(f"too short: {real} latents, min_latents is {spec.min_latents}")
    last = Piece(shot, lengths[shot] - 1 if rest else at - 1, 0, cut=False)
    pieces += [last] * (spec.chunks - len(pieces))
    return ClipPlan(spec, tuple(pieces))
