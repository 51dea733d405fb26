"""Does a video show what its captions say? Decided from pixels, without any learned model.

`judge_video` takes a video, one caption per shot and the shots' frame bounds, so it judges
generated, reconstructed and true videos alike. `summary` turns many verdicts into rates with
their 95 % Wilson intervals.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longlive_jax.small_world import words
from longlive_jax.small_world.drawing import HEIGHT, SPEED, WIDTH
from longlive_jax.small_world.reading import UNCLEAR, FrameReadings, read_frames
from longlive_jax.small_world.words import BACKGROUNDS, COLOURS, MARKS, MOTIONS, SHAPES
from longlive_jax.typing import Float

ATTRIBUTES = ("shape", "colour", "background", "motion")

_TABLES = {"shape": SHAPES, "colour": COLOURS, "background": BACKGROUNDS, "mark": MARKS}
_LAG = 4  # frames: a step over one latent, so that jitter between a latent's frames cancels
_STEADY = 0.9  # share of a shot's frames that have to agree for its identity to hold
_SIZE_TOLERANCE = 1.0  # pixels of radius
_CUT_FLOOR = 0.04  # least mean absolute change over a cut; the least true one is near 0.1
_CUT_CONTRAST = 3.0  # ... and so many times the median change around it
_LEAP = 8.0  # pixels from one frame to the next: no motion of the world, so a cut
_SHORTEST_PIECE = 12  # frames: a shorter rest of a shot in a quarter is not judged


@dataclasses.dataclass(frozen=True)
class ShotVerdict:
    """What one shot shows, beside what its caption says.

    shown: attribute -> word, or None where most frames do not show it clearly.
    right: attribute -> shown as the caption says. mark and radius: the subject's unspoken
    identity as seen. identity_held: shape, colour, mark and size stay the same in the shot.
    """

    caption: str
    start: int
    stop: int
    shown: dict[str, str | None]
    right: dict[str, bool]
    mark: str | None
    radius: float
    velocity: tuple[float, float]
    identity_held: bool

    @property
    def all_right(self) -> bool:
        return all(self.right.values())


@dataclasses.dataclass(frozen=True)
class CutVerdict:
    """A cut that should show first on frame `expected`; found is None if there is none near."""

    expected: int
    found: int | None

    @property
    def exact(self) -> bool:
        return self.found == self.expected


@dataclasses.dataclass(frozen=True)
class ReturnVerdict:
    """Whether the subject of shot `first` comes back in shot `again` with its mark and size."""

    first: int
    again: int
    same_mark: bool
    same_size: bool

    @property
    def held(self) -> bool:
        return self.same_mark and self.same_size


@dataclasses.dataclass(frozen=True)
class Quarter:
    """Means over one quarter of a video's frames, and how many pieces of shots are all right.

    error, overlap and sharpness as in `FrameReadings`.
    """

    error: float
    overlap: float
    sharpness: float
    pieces: int
    pieces_right: int


@dataclasses.dataclass(frozen=True)
class VideoVerdict:
    """Everything the judge says of one video.

    extra_cuts: frames where the subject leaps or the background changes although the script has no
    cut (one that is found on a wrong frame counts under `cuts`, not here).
    """

    shots: tuple[ShotVerdict, ...]
    cuts: tuple[CutVerdict, ...]
    returns: tuple[ReturnVerdict, ...]
    extra_cuts: tuple[int, ...]
    quarters: tuple[Quarter, ...]

    @property
    def drift(self) -> float:
        """Pixel error of the last quarter less that of the first; 0 is a video that keeps up."""
        return self.quarters[-1].error - self.quarters[0].error


def judge_video(
    video: Float[np.ndarray, "f h w 3"],
    captions: Sequence[str],
    bounds: Sequence[tuple[int, int]],
) -> VideoVerdict:
    """Judge a float video in [-1, 1] against its script.

    Args:
        video: HEIGHT x WIDTH pixels.
        captions: one per shot; the cut prefix may stand before them.
        bounds: (first, one past last) frame of each shot, in order and without gaps.

    Raises:
        ValueError: for a caption outside the small world, bounds that do not tile the video or do
            not match the captions, and whatever `read_frames` refuses.
    """
    scenes = [words.parse_caption(text) for text in captions]
    bounds = _check_bounds(bounds, len(captions), len(video))
    frames = read_frames(video)
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
            f"{captions} captions for {len(spans)} shot bounds; give as many of each, at least one"
        )
    edges = [0, *(stop for _, stop in spans)]
    if edges[-1] != frames or any(
        start != edge or stop <= start for (start, stop), edge in zip(spans, edges, strict=False)
    ):
        raise ValueError(
            f"shot bounds {spans} do not tile the {frames} frames of the video; they have to "
            f"begin at 0, follow each other without gaps and end at {frames}"
        )
    return spans


def _judge_shot(
    frames: FrameReadings, caption: str, scene: words.Scene, span: tuple[int, int]
) -> ShotVerdict:
    part = slice(*span)
    shown = {k: _most(getattr(frames, k)[part], _TABLES[k]) for k in ATTRIBUTES[:3]}
    velocity = _velocity(frames, span)
    shown["motion"] = _motion(velocity)
    clear = frames.shape[part] != UNCLEAR
    radius = float(np.median(frames.radius[part][clear])) if clear.any() else float("nan")
    return ShotVerdict(
        caption=caption,
        start=span[0],
        stop=span[1],
        shown=shown,
        right={k: shown[k] == getattr(scene, k) for k in ATTRIBUTES},
        mark=_most(frames.mark[part], MARKS),
        radius=radius,
        velocity=velocity or (float("nan"), float("nan")),
        identity_held=_identity_held(frames, part),
    )


def _most(readings: np.ndarray, table) -> str | None:
    """The word that more than half of the frames show, or None."""
    counts = np.bincount(readings[readings != UNCLEAR], minlength=len(table))
    best = int(counts.argmax())
    return tuple(table)[best] if 2 * counts[best] > len(readings) else None


def _velocity(frames: FrameReadings, span: tuple[int, int]) -> tuple[float, float] | None:
    """Median velocity (x, y) in pixels per frame; None if unclear or not one common motion."""
    start, stop = span
    lag = min(_LAG, stop - start - 1)
    if lag < 1:
        return None
    early, late = slice(start, stop - lag), slice(start + lag, stop)
    clear = (frames.shape[early] != UNCLEAR) & (frames.shape[late] != UNCLEAR)
    if 2 * clear.sum() <= len(clear):
        return None
    dx, dy = _moved(frames, early, late)
    vx, vy = float(np.median(dx[clear])), float(np.median(dy[clear]))
    agree = np.hypot(dx - vx, dy - vy) < SPEED * lag / 2
    if 2 * (agree & clear).sum() <= len(clear):
        return None
    return vx / lag, vy / lag


def _moved(frames: FrameReadings, early: slice, late: slice) -> tuple[np.ndarray, np.ndarray]:
    """Shortest way (x, y) on the torus from the subject's place in one frame to another."""
    dx = (frames.x[late] - frames.x[early] + WIDTH / 2) % WIDTH - WIDTH / 2
    dy = (frames.y[late] - frames.y[early] + HEIGHT / 2) % HEIGHT - HEIGHT / 2
    return dx, dy


def _motion(velocity: tuple[float, float] | None) -> str | None:
    """The motion whose velocity is within half a speed of what was seen."""
    if velocity is None:
        return None
    for word, direction in MOTIONS.items():
        across, down = (v - SPEED * d for v, d in zip(velocity, direction, strict=True))
        if np.hypot(across, down) < SPEED / 2:
            return word
    return None


def _identity_held(frames: FrameReadings, part: slice) -> bool:
    for kind in ("shape", "colour", "mark"):
        readings = getattr(frames, kind)[part]
        counts = np.bincount(readings[readings != UNCLEAR], minlength=1)
        if counts.max() < _STEADY * len(readings):
            return False
    sizes = [np.median(piece) for piece in np.array_split(frames.radius[part], 4) if len(piece)]
    return bool(max(sizes) - min(sizes) <= _SIZE_TOLERANCE)


def _judge_cut(frames: FrameReadings, bounds: list[tuple[int, int]], shot: int) -> CutVerdict:
    """The sharpest change between the middles of the two shots, if it stands out."""
    (before, cut), (_, after) = bounds[shot - 1], bounds[shot]
    low, high = (before + cut) // 2 + 1, max((cut + after) // 2, cut + 1)
    window = frames.change[low:high]
    peak = int(window.argmax())
    floor = max(_CUT_FLOOR, _CUT_CONTRAST * float(np.median(window)))
    if len(window) < 3:  # too short to compare with its surroundings
        floor = _CUT_FLOOR
    return CutVerdict(cut, low + peak if window[peak] >= floor else None)


def _extra_cuts(frames: FrameReadings, cuts: Sequence[CutVerdict]) -> tuple[int, ...]:
    """Frames where the subject leaps or the ground turns into another, away from known cuts."""
    dx, dy = _moved(frames, slice(None, -1), slice(1, None))
    clear, plain = frames.shape != UNCLEAR, frames.background != UNCLEAR
    leap = (np.hypot(dx, dy) > _LEAP) & clear[1:] & clear[:-1]
    turn = (np.diff(frames.background) != 0) & plain[1:] & plain[:-1]
    known = {cut.found for cut in cuts}
    return tuple(int(k) for k in np.flatnonzero(leap | turn) + 1 if k not in known)


def _judge_returns(shots: Sequence[ShotVerdict], scenes: Sequence[words.Scene]):
    """Compare every reappearance after a cut away with the subject's first shot."""
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
            then.mark is not None and then.mark == now.mark,
            bool(abs(then.radius - now.radius) <= _SIZE_TOLERANCE),
        )


def _judge_quarters(frames: FrameReadings, scenes, bounds):
    edges = [round(len(frames) * k / 4) for k in range(5)]
    for low, high in itertools.pairwise(edges):
        part = slice(min(low, len(frames) - 1), max(high, low + 1))
        verdicts = [
            _judge_shot(frames, "", scene, (max(start, low), min(stop, high))).all_right
            for scene, (start, stop) in zip(scenes, bounds, strict=True)
            if min(stop, high) - max(start, low) >= min(_SHORTEST_PIECE, stop - start)
        ]
        yield Quarter(
            error=float(frames.error[part].mean()),
            overlap=float(frames.overlap[part].mean()),
            sharpness=float(frames.sharpness[part].mean()),
            pieces=len(verdicts),
            pieces_right=sum(verdicts),
        )


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a rate; (0, 1) when nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    rate, scale = right / n, 1 + z * z / n
    middle = rate + z * z / (2 * n)
    spread = z * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return float(max(0.0, (middle - spread) / scale)), float(min(1.0, (middle + spread) / scale))


def summary(verdicts: Sequence[VideoVerdict]) -> dict:
    """Rates over all videos as plain numbers, ready for JSON.

    Every rate is {"rate", "n", "low", "high"} with rate None for n = 0. `quarters` lists error,
    overlap, sharpness and the rate of shot pieces that are all right, from the first quarter of
    the videos to the last; `last_to_first` is the ratio of that rate, last to first; `drift` the
    growth of the pixel error between the same two; `extra_cuts` a plain count.

    Raises ValueError for no verdicts.
    """
    if not verdicts:
        raise ValueError("no verdicts to summarise; judge at least one video")
    shots = [shot for verdict in verdicts for shot in verdict.shots]
    cuts = [cut for verdict in verdicts for cut in verdict.cuts]
    returns = [back for verdict in verdicts for back in verdict.returns]
    columns = list(zip(*(verdict.quarters for verdict in verdicts), strict=True))
    quarters: list[dict[str, Any]] = [
        {
            **{k: float(np.mean([getattr(q, k) for q in column])) for k in _QUALITY},
            "all_right": _rate_of(
                sum(q.pieces_right for q in column), sum(q.pieces for q in column)
            ),
        }
        for column in columns
    ]
    first, last = (quarters[k]["all_right"]["rate"] for k in (0, -1))
    return {
        **{k: _rate(shots, lambda shot, k=k: shot.right[k]) for k in ATTRIBUTES},
        "all_right": _rate(shots, lambda shot: shot.all_right),
        "identity_held": _rate(shots, lambda shot: shot.identity_held),
        "cut_exact": _rate(cuts, lambda cut: cut.exact),
        "cut_found": _rate(cuts, lambda cut: cut.found is not None),
        "return_held": _rate(returns, lambda back: back.held),
        "return_mark": _rate(returns, lambda back: back.same_mark),
        "return_size": _rate(returns, lambda back: back.same_size),
        "extra_cuts": sum(len(verdict.extra_cuts) for verdict in verdicts),
        "drift": float(np.mean([verdict.drift for verdict in verdicts])),
        "last_to_first": last / first if first and last is not None else None,
        "quarters": quarters,
        "videos": len(verdicts),
    }


_QUALITY = ("error", "overlap", "sharpness")


def _rate(items: Sequence, test: Callable[..., bool]) -> dict:
    return _rate_of(sum(bool(test(item)) for item in items), len(items))


def _rate_of(right: int, n: int) -> dict:
    low, high = wilson(right, n)
    return {"rate": right / n if n else None, "n": n, "low": low, "high": high}
