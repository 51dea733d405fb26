"""Joining rules: which frames of which shots make up each chunk of a training clip.

Pure functions of the shots' lengths in frames at 24 fps; no file is opened. The rules are those of
the reference's dataset. With chunks of m latent frames, the first chunk of a clip takes
1 + 4 (m - 1) raw frames and every later one 4 m. A chunk never mixes shots: a shot provides as many
chunks as fit, the clip continues with the next shot that is long enough for a chunk, and the rest
of each shot is dropped.

The reference marks a cut only by a prefix in the prompt. Here every chunk also has a flag, so that
the trainer need not parse text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longlive_jax.captions import CUT_PREFIX
from longlive_jax.data.clips.dataset import Unusable
from longlive_jax.spec import check_minimums
from longlive_jax.typing import Bool, Float, Int

__all__ = [
    "FPS",
    "ClipPlan",
    "FrameSelection",
    "JoinSpec",
    "Piece",
    "clip_starts",
    "count_chunks",
    "plan_clip",
    "plan_clips",
    "raw_frame_slice",
]

FPS = 24
"""Frame rate of every clip; files with other rates are resampled."""

ShotFrame = tuple[int, int]
"""(shot index, frame index within the shot)."""

FrameSelection = slice | Sequence[int]
"""A selection of a clip's raw frames: a slice, or ascending indices."""


@dataclasses.dataclass(frozen=True)
class JoinSpec:
    """How shots are joined into clips of equal length.

    The field names are stored in the manifests of encoded clips (`store.RENAMED_FIELDS`).

    Attributes:
      chunks: chunks per clip.
      chunk_frames: latent frames per chunk.
      max_chunks_per_shot: chunks after which one second of the shot is skipped, which counts as a
        (virtual) cut; 0 for no limit.
      pad: whether to use samples that are too short, by repeating the last frame with the last
        caption; the repeated latents are masked. Otherwise such a sample is unusable.
      min_latents: minimum real (unpadded) latent frames of a padded clip.
      single_shot: whether a clip stays within one shot.
      cut_prefix: text before the prompt of the first chunk after a cut.
      temporal_stride: raw frames per latent frame, except for the first one.
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
        check_minimums(
            self, chunks=1, chunk_frames=1, max_chunks_per_shot=0, min_latents=1, temporal_stride=1
        )
        if self.min_latents > self.latents:
            raise ValueError(
                f"min_latents must be <= {self.latents}, the latent frames of a clip of "
                f"{self.chunks} chunks of {self.chunk_frames}, got {self.min_latents}"
            )

    @property
    def latents(self) -> int:
        """Latent frames per clip."""
        return self.chunks * self.chunk_frames

    @property
    def frames(self) -> int:
        """Raw frames per clip."""
        return 1 + self.temporal_stride * (self.latents - 1)

    def num_raw_frames(self, chunk_index: int) -> int:
        """Raw frames of a chunk; the first latent of the first chunk is a single frame."""
        return self.temporal_stride * self.chunk_frames - (self.temporal_stride - 1) * (
            chunk_index == 0
        )


@dataclasses.dataclass(frozen=True)
class Piece:
    """The raw frames of one chunk; missing frames repeat the last one.

    The `repr` is hashed into the dataset digest of every store (`encoding_plan`): the class name
    and the names and order of the fields must stay, or existing stores can no longer be resumed.

    Attributes:
      shot: index of the shot.
      start: first frame within the shot.
      frames: number of real frames from `start` on; 0 to repeat frame `start` throughout.
      cut: whether the chunk follows a cut.
    """

    shot: int
    start: int
    frames: int
    cut: bool


@dataclasses.dataclass(frozen=True)
class ClipPlan:
    """One clip of a sample.

    Attributes:
      spec: the joining rules.
      pieces: the frames of every chunk.
    """

    spec: JoinSpec
    pieces: tuple[Piece, ...]

    def frames(self, selection: FrameSelection = slice(None)) -> list[ShotFrame]:
        """Shot and frame index of the clip's raw frames, or of a selection of them."""
        positions: list[ShotFrame] = []
        for i, piece in enumerate(self.pieces):
            last = piece.start + max(piece.frames - 1, 0)
            wanted = range(piece.start, piece.start + self.spec.num_raw_frames(i))
            positions += [(piece.shot, min(frame, last)) for frame in wanted]
        if isinstance(selection, slice):
            return positions[selection]
        return [positions[i] for i in selection]

    @property
    def mask(self) -> Float[np.ndarray, "f"]:
        """1 for latents whose frames are all real, 0 for padding; float32."""
        offsets = np.arange(self.spec.chunk_frames)
        rows = [
            offsets < _num_latents(self.spec, i, piece.frames)
            for i, piece in enumerate(self.pieces)
        ]
        return np.concatenate(rows).astype(np.float32)

    @property
    def cut(self) -> Bool[np.ndarray, "k"]:
        """Chunks that begin a shot, except the first chunk of the clip."""
        return np.array([piece.cut for piece in self.pieces])

    @property
    def shot(self) -> Int[np.ndarray, "k"]:
        """Number of cuts, virtual ones included, up to each chunk; int32."""
        return np.cumsum(self.cut).astype(np.int32)

    def prompts(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Each chunk's prompt: its shot's caption, with the prefix after a cut."""
        return tuple(self.spec.cut_prefix * p.cut + captions[p.shot] for p in self.pieces)


def plan_clip(
    lengths: Sequence[int], spec: JoinSpec, rng: np.random.Generator | None = None
) -> ClipPlan:
    """Plans one clip from shots of these lengths in frames.

    With `rng`, the clip begins at a random one of `clip_starts`. Without it, or if there are none,
    it begins at the first shot, or with `single_shot` at the first shot that is long enough. Raises
    Unusable if the shots are too short.
    """
    starts = clip_starts(lengths, spec) if rng is not None else []
    if rng is not None and starts:
        return ClipPlan(spec, _join_chunks(lengths, spec, starts[rng.integers(len(starts))]))
    for shot in range(len(lengths)):
        pieces = _join_chunks(lengths, spec, (shot, 0))
        if len(pieces) == spec.chunks:
            return ClipPlan(spec, pieces)
        if not spec.single_shot:
            break
    return _plan_padded(lengths, spec)


def clip_starts(lengths: Sequence[int], spec: JoinSpec) -> list[ShotFrame]:
    """Positions from which the following frames fill a clip.

    As in the reference, there are at most about 50 per shot, evenly spaced.
    """
    starts: list[ShotFrame] = []
    for shot, length in enumerate(lengths):
        last = length - spec.num_raw_frames(0)
        step = max(1, last // 50)
        candidates = [(shot, frame) for frame in range(0, last + 1, step)]
        starts += [at for at in candidates if len(_join_chunks(lengths, spec, at)) == spec.chunks]
    return starts


def plan_clips(lengths: Sequence[int], spec: JoinSpec, limit: int = 0) -> list[ClipPlan]:
    """Plans consecutive clips of a sample: at most `limit`, or with 0 as many as fit.

    Only the first clip may be padded. Raises Unusable if no clip fits.
    """
    clips = [plan_clip(lengths, spec)]
    while limit == 0 or len(clips) < limit:
        # 1. Stop after a padded clip.
        last = clips[-1].pieces[-1]
        if last.frames < spec.num_raw_frames(spec.chunks - 1):
            break
        # 2. Continue after the last frame, or with `single_shot` in the next shot that fits.
        at = (last.shot, last.start + last.frames)
        pieces = _join_chunks(lengths, spec, at)
        if len(pieces) < spec.chunks and spec.single_shot:
            later = (
                _join_chunks(lengths, spec, (s, 0)) for s in range(last.shot + 1, len(lengths))
            )
            pieces = next((p for p in later if len(p) == spec.chunks), ())
        if len(pieces) < spec.chunks:
            break
        clips.append(ClipPlan(spec, pieces))
    return clips


def count_chunks(lengths: Sequence[int], spec: JoinSpec) -> int:
    """Chunks of the longest clip that these shots fill from their beginning."""
    most = 1 + sum(lengths) // (spec.temporal_stride * spec.chunk_frames)
    longest = dataclasses.replace(spec, chunks=most, min_latents=1)
    shots = range(len(lengths) if spec.single_shot else 1)
    return max([len(_join_chunks(lengths, longest, (shot, 0))) for shot in shots])


def raw_frame_slice(first: int, last: int, *, temporal_stride: int = 4) -> slice:
    """The raw frames that latents [first, last) of a clip encode."""
    return slice(
        max(0, 1 + temporal_stride * (first - 1)), max(0, 1 + temporal_stride * (last - 1))
    )


def _join_chunks(lengths: Sequence[int], spec: JoinSpec, start: ShotFrame) -> tuple[Piece, ...]:
    """Complete chunks from `start` on, until the clip is full or the shots are used up."""
    shot, frame = start
    pieces: list[Piece] = []
    shot_chunks = 0  # since the last cut
    while len(pieces) < spec.chunks:
        need = spec.num_raw_frames(len(pieces))
        cut = bool(spec.max_chunks_per_shot) and shot_chunks == spec.max_chunks_per_shot
        if cut:
            frame, shot_chunks = frame + FPS, 0
        while frame + need > lengths[shot]:
            shot, frame, shot_chunks, cut = shot + 1, 0, 0, bool(pieces)
            if spec.single_shot or shot == len(lengths):
                return tuple(pieces)
        pieces.append(Piece(shot, frame, need, cut))
        frame, shot_chunks = frame + need, shot_chunks + 1
    return tuple(pieces)


def _num_latents(spec: JoinSpec, chunk_index: int, frames: int) -> int:
    """Latents that the first `frames` raw frames of a chunk fill completely."""
    return (
        frames + (spec.temporal_stride - 1) * (chunk_index == 0 and frames > 0)
    ) // spec.temporal_stride


def _plan_padded(lengths: Sequence[int], spec: JoinSpec) -> ClipPlan:
    """Complete chunks from the beginning, then the rest of their shot, then repeated frames."""
    # 1. The longest run of complete chunks.
    shots = range(len(lengths)) if spec.single_shot else range(1)
    runs: list[tuple[Piece, ...]] = [_join_chunks(lengths, spec, (shot, 0)) for shot in shots]
    longest = max(runs, key=len)
    pieces = list(longest)
    if not spec.pad:
        listed = ", ".join(map(str, lengths[:8])) + (", ..." if len(lengths) > 8 else "")
        raise Unusable(
            f"too short: fills {len(pieces)} of {spec.chunks} chunks ({spec.num_raw_frames(0)} "
            f"frames, then {spec.num_raw_frames(1)} each) from shots of {listed} frames at {FPS} "
            "fps"
        )
    if pieces:
        shot, at = pieces[-1].shot, pieces[-1].start + pieces[-1].frames
    else:
        shot, at = max(range(len(lengths)), key=lambda i: lengths[i]), 0
    # 2. The rest of the shot, unless a virtual cut is due.
    run = next((i for i, piece in enumerate(reversed(pieces)) if piece.cut), len(pieces) - 1) + 1
    due = bool(pieces) and run == spec.max_chunks_per_shot
    rest = 0 if due else lengths[shot] - at
    if rest:
        pieces.append(Piece(shot, at, rest, cut=False))
    real = sum(_num_latents(spec, i, piece.frames) for i, piece in enumerate(pieces))
    if real < spec.min_latents:
        raise Unusable(f"too short: {real} real latents, min_latents is {spec.min_latents}")
    # 3. Repeats of the last frame.
    last = Piece(shot, lengths[shot] - 1 if rest else at - 1, 0, cut=False)
    pieces += [last] * (spec.chunks - len(pieces))
    return ClipPlan(spec, tuple(pieces))
