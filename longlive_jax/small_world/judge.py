"""Checks whether a video shows what its captions say, from pixels and without a learned model.

`judge_video` takes a video, one caption per shot and the frame range of each shot, so it applies to
generated, reconstructed and ground-truth videos. `metrics.summary` aggregates verdicts into rates.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from longlive_jax.small_world import words
from longlive_jax.small_world.drawing import HEIGHT, SPEED, WIDTH
from longlive_jax.small_world.reading import UNCLEAR, FrameReadings, frame_readings
from longlive_jax.small_world.words import BACKGROUNDS, COLOURS, MARKERS, MOTIONS, SHAPES
from longlive_jax.typing import Float

ATTRIBUTES = ("shape", "colour", "background", "motion")

_TABLES = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS, "marker": MARKERS}
_LAG = 4  # frames of one latent; over this lag, jitter between a latent's frames cancels
_MIN_AGREEMENT = 0.9  # share of a shot's frames that must agree on the subject's identity
_SIZE_TOLERANCE = 1.0  # pixels of radius
_CUT_FLOOR = 0.04  # smallest mean absolute change at a cut; in ground-truth videos it is >= ~0.1
_CUT_CONTRAST = 3.0  # smallest ratio of the change at a cut to the median change around it
_JUMP = 8.0  # pixels per frame; faster than any motion of the world, hence a cut
_MIN_HIDDEN = 12  # frames without a visible subject that count as its absence
_MIN_SEGMENT = 12  # frames; shorter segments of a shot within a quarter are not judged


@dataclasses.dataclass(frozen=True)
class ShotVerdict:
    """Comparison of one shot with its caption.

    Attributes:
      caption: caption without the cut prefix.
      start: first frame.
      stop: frame after the last one.
      observed: word per attribute; None unless more than half of the frames agree on one.
      correct: per attribute, whether the observed word is that of the caption.
      marker: observed centre marker, or None.
      radius: median radius of the subject in pixels; NaN if no frame shows a shape.
      velocity: median velocity (x, y) in pixels per frame; NaN if there is no common motion.
      identity_held: whether shape, colour, marker and size stay the same throughout the shot.
      hidden: longest range (first frame, frame after the last) of at least half a second without a
        visible subject, or None. No true video has one.
    """

    caption: str
    start: int
    stop: int
    observed: dict[str, str | None]
    correct: dict[str, bool]
    marker: str | None
    radius: float
    velocity: tuple[float, float]
    identity_held: bool
    hidden: tuple[int, int] | None = None

    @property
    def caption_correct(self) -> bool:
        """Whether all four attributes are as in the caption, by the majority of frames."""
        return all(self.correct.values())

    @property
    def shows_caption(self) -> bool:
        """Whether the caption is correct and the subject is visible from beginning to end."""
        return self.caption_correct and self.hidden is None


@dataclasses.dataclass(frozen=True)
class CutVerdict:
    """Timing of one cut.

    Attributes:
      expected: first frame of the new shot according to the script.
      frame: first frame of the new shot in the video; None if no cut is visible near it.
    """

    expected: int
    frame: int | None

    @property
    def exact(self) -> bool:
        """Whether the cut is on the expected frame."""
        return self.frame == self.expected


@dataclasses.dataclass(frozen=True)
class ReturnVerdict:
    """Identity of a subject that returns after a shot with another subject.

    Attributes:
      first: index of the subject's first shot.
      again: index of the shot in which it returns.
      same_marker: whether both shots have the same, clearly visible marker.
      same_size: whether both shots have the same radius, within 1 pixel.
    """

    first: int
    again: int
    same_marker: bool
    same_size: bool

    @property
    def same_identity(self) -> bool:
        """Whether both marker and size are the same."""
        return self.same_marker and self.same_size


@dataclasses.dataclass(frozen=True)
class Quarter:
    """Quality and caption accuracy over one quarter of a video's frames.

    A segment is the part of a shot that lies within the quarter.

    Attributes:
      error: mean pixel error (see `FrameReadings`).
      overlap: mean overlap with the fitted outline (see `FrameReadings`).
      sharpness: mean relative sharpness (see `FrameReadings`).
      segments: number of judged segments.
      segments_correct: number of segments that show all that their caption says.
    """

    error: float
    overlap: float
    sharpness: float
    segments: int
    segments_correct: int


@dataclasses.dataclass(frozen=True)
class VideoVerdict:
    """Verdict on one video.

    Attributes:
      shots: one verdict per shot.
      cuts: one verdict per cut of the script.
      returns: one verdict per return of an earlier subject.
      extra_cuts: frames where the subject jumps or the background changes without a cut in the
        script. A cut on the wrong frame counts under `cuts`, not here.
      quarters: quality and caption accuracy, from the first quarter of the video to the last.
    """

    shots: tuple[ShotVerdict, ...]
    cuts: tuple[CutVerdict, ...]
    returns: tuple[ReturnVerdict, ...]
    extra_cuts: tuple[int, ...]
    quarters: tuple[Quarter, ...]

    @property
    def drift(self) -> float:
        """Pixel error of the last quarter minus that of the first; 0 means no drift."""
        return self.quarters[-1].error - self.quarters[0].error


def judge_video(
    video: Float[np.ndarray, "f h w 3"],
    captions: Sequence[str],
    bounds: Sequence[tuple[int, int]],
) -> VideoVerdict:
    """Judges a video against its captions and cuts.

    Args:
      video: floats in [-1, 1], HEIGHT x WIDTH pixels.
      captions: one caption per shot, with or without the cut prefix.
      bounds: frame range (start, stop) of each shot, in order and without gaps.

    Raises:
      ValueError: if a caption is outside the small world, if the bounds do not tile the video or
        do not match the captions in number, or if `frame_readings` rejects the video.
    """
    scenes = [words.parse_caption(text) for text in captions]
    bounds = _check_bounds(bounds, len(captions), len(video))
    frames = frame_readings(video)
    shots = tuple(
        _judge_shot(frames, words.caption(scene), scene, span)
        for scene, span in zip(scenes, bounds, strict=True)
    )
    cuts = tuple(_judge_cut(frames, bounds, k) for k in range(1, len(bounds)))
    return VideoVerdict(
        shots,
        cuts,
        tuple(_judge_returns(shots, scenes)),
        _extra_cuts(frames, cuts),
        tuple(_judge_quarters(frames, scenes, bounds)),
    )


def _check_bounds(bounds, captions: int, frames: int) -> list[tuple[int, int]]:
    spans = [(int(start), int(stop)) for start, stop in bounds]
    if len(spans) != captions or not spans:
        raise ValueError(
            f"got {captions} captions and {len(spans)} shot bounds; give one of each per shot, and "
            "at least one shot"
        )
    edges = [0, *(stop for _, stop in spans)]
    if edges[-1] != frames or any(
        start != edge or stop <= start for (start, stop), edge in zip(spans, edges, strict=False)
    ):
        raise ValueError(
            f"shot bounds {spans} do not tile the {frames} frames of the video; they must "
            f"begin at 0, have no gaps and end at {frames}"
        )
    return spans


def _judge_shot(
    frames: FrameReadings, caption: str, scene: words.Scene, span: tuple[int, int]
) -> ShotVerdict:
    """Verdict on the frames of `span`, whose caption describes `scene`."""
    part = slice(*span)
    observed = {k: _majority(getattr(frames, k)[part], _TABLES[k]) for k in ATTRIBUTES[:3]}
    velocity = _velocity(frames, span)
    observed["motion"] = _motion(velocity)
    clear = frames.shape[part] != UNCLEAR
    radius = float(np.median(frames.radius[part][clear])) if clear.any() else float("nan")
    return ShotVerdict(
        caption=caption,
        start=span[0],
        stop=span[1],
        observed=observed,
        correct={k: observed[k] == getattr(scene, k) for k in ATTRIBUTES},
        marker=_majority(frames.marker[part], MARKERS),
        radius=radius,
        velocity=velocity or (float("nan"), float("nan")),
        identity_held=_identity_held(frames, part),
        hidden=_hidden(frames.shape[part] == UNCLEAR, span[0]),
    )


def _hidden(is_hidden: np.ndarray, start: int) -> tuple[int, int] | None:
    """The longest run of hidden frames if it is long enough; `start` is the first frame's index."""
    edges = np.flatnonzero(np.diff(np.pad(is_hidden.astype(int), 1)))
    runs = [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
    first, end = max(runs, key=lambda run: run[1] - run[0], default=(0, 0))
    return (start + first, start + end) if end - first >= _MIN_HIDDEN else None


def _majority(readings: np.ndarray, table) -> str | None:
    """The word that more than half of the frames show, or None."""
    counts = np.bincount(readings[readings != UNCLEAR], minlength=len(table))
    best = int(counts.argmax())
    return tuple(table)[best] if 2 * counts[best] > len(readings) else None


def _velocity(frames: FrameReadings, span: tuple[int, int]) -> tuple[float, float] | None:
    """Median velocity (x, y) in pixels per frame; None if unclear or without a common motion."""
    start, stop = span
    lag = min(_LAG, stop - start - 1)
    if lag < 1:
        return None
    early, late = slice(start, stop - lag), slice(start + lag, stop)
    clear = (frames.shape[early] != UNCLEAR) & (frames.shape[late] != UNCLEAR)
    if 2 * clear.sum() <= len(clear):
        return None
    dx, dy = _displacement(frames, early, late)
    vx, vy = float(np.median(dx[clear])), float(np.median(dy[clear]))
    agree = np.hypot(dx - vx, dy - vy) < SPEED * lag / 2
    if 2 * (agree & clear).sum() <= len(clear):
        return None
    return vx / lag, vy / lag


def _displacement(
    frames: FrameReadings, early: slice, late: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Shortest displacement (x, y) of the subject on the torus between two series of frames."""
    dx = (frames.x[late] - frames.x[early] + WIDTH / 2) % WIDTH - WIDTH / 2
    dy = (frames.y[late] - frames.y[early] + HEIGHT / 2) % HEIGHT - HEIGHT / 2
    return dx, dy


def _motion(velocity: tuple[float, float] | None) -> str | None:
    """The motion whose velocity differs by less than SPEED / 2 from the observed one, or None."""
    if velocity is None:
        return None
    for word, direction in MOTIONS.items():
        across, down = (v - SPEED * d for v, d in zip(velocity, direction, strict=True))
        if np.hypot(across, down) < SPEED / 2:
            return word
    return None


def _identity_held(frames: FrameReadings, part: slice) -> bool:
    """Whether shape, colour, marker and size are the same throughout the frames."""
    for kind in ("shape", "colour", "marker"):
        readings = getattr(frames, kind)[part]
        counts = np.bincount(readings[readings != UNCLEAR], minlength=1)
        if counts.max() < _MIN_AGREEMENT * len(readings):
            return False
    sizes = [np.median(radii) for radii in np.array_split(frames.radius[part], 4) if len(radii)]
    return bool(max(sizes) - min(sizes) <= _SIZE_TOLERANCE)


def _judge_cut(frames: FrameReadings, bounds: list[tuple[int, int]], shot: int) -> CutVerdict:
    """The largest change between the middles of the two shots, if it exceeds both thresholds."""
    (before, cut), (_, after) = bounds[shot - 1], bounds[shot]
    low, high = (before + cut) // 2 + 1, max((cut + after) // 2, cut + 1)
    window = frames.change[low:high]
    peak = int(window.argmax())
    floor = max(_CUT_FLOOR, _CUT_CONTRAST * float(np.median(window)))
    if len(window) < 3:  # too short for a median around the cut
        floor = _CUT_FLOOR
    return CutVerdict(cut, low + peak if window[peak] >= floor else None)


def _extra_cuts(frames: FrameReadings, cuts: Sequence[CutVerdict]) -> tuple[int, ...]:
    """Frames where the subject jumps or the background changes, other than the known cuts."""
    dx, dy = _displacement(frames, slice(None, -1), slice(1, None))
    clear, plain = frames.shape != UNCLEAR, frames.background != UNCLEAR
    jumps = (np.hypot(dx, dy) > _JUMP) & clear[1:] & clear[:-1]
    changes = (np.diff(frames.background) != 0) & plain[1:] & plain[:-1]
    known = {cut.frame for cut in cuts}
    return tuple(int(k) for k in np.flatnonzero(jumps | changes) + 1 if k not in known)


def _judge_returns(shots: Sequence[ShotVerdict], scenes: Sequence[words.Scene]):
    """Compares every shot in which a subject returns with the subject's first shot."""
    first: dict[tuple[str, str], int] = {}
    for k, scene in enumerate(scenes):
        subject = (scene.shape, scene.colour)
        start = first.setdefault(subject, k)
        away = k > 0 and subject != (scenes[k - 1].shape, scenes[k - 1].colour)
        if start == k or not away:
            continue
        then, now = shots[start], shots[k]
        yield ReturnVerdict(
            start,
            k,
            then.marker is not None and then.marker == now.marker,
            bool(abs(then.radius - now.radius) <= _SIZE_TOLERANCE),
        )


def _judge_quarters(frames: FrameReadings, scenes, bounds):
    """Yields a `Quarter` for each quarter of the frames."""
    edges = [round(len(frames) * k / 4) for k in range(5)]
    for low, high in itertools.pairwise(edges):
        part = slice(min(low, len(frames) - 1), max(high, low + 1))
        verdicts = [
            _judge_shot(frames, "", scene, (max(start, low), min(stop, high))).caption_correct
            for scene, (start, stop) in zip(scenes, bounds, strict=True)
            if min(stop, high) - max(start, low) >= min(_MIN_SEGMENT, stop - start)
        ]
        yield Quarter(
            error=float(frames.error[part].mean()),
            overlap=float(frames.overlap[part].mean()),
            sharpness=float(frames.sharpness[part].mean()),
            segments=len(verdicts),
            segments_correct=sum(verdicts),
        )
