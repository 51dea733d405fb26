"""Differences between two cases on the same videos, with one-sided bounds.

Videos are the independent unit: shots of a video share its noise and its past. The bounds are the
percentiles of a bootstrap that draws whole videos, each with its outcomes in both cases.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from longlive_jax.small_world.judge import ATTRIBUTES, VideoVerdict
from longlive_jax.spec import UserError
from longlive_jax.typing import Int

RESAMPLES, SEED, CONFIDENCE = 10_000, 0, 0.95
"""Number of bootstrap samples, their seed, and the confidence of each one-sided bound."""

_EMPTY = "-"
"""Outcomes of a video that has none, such as those of cuts in a video of one shot."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Difference of a rate between two cases, as a share: 0.01 is one point.

    Attributes:
      estimate: rate of the case minus that of the other.
      low: one-sided lower bound; the difference is larger with 95 % confidence.
      high: one-sided upper bound; the difference is smaller with 95 % confidence.
      n: number of shots (of cuts for their rates) in each case.
      videos: number of videos.
    """

    estimate: float
    low: float
    high: float
    n: int
    videos: int


def outcomes(verdicts: Sequence[VideoVerdict]) -> dict[str, str]:
    """Success (1) or failure (0) of every shot or cut, by rate, ready for JSON.

    The rates are those of `metrics.summary` that a `Difference` is taken of. The outcomes of a
    video are a word such as `101`, or `-` if it has none; spaces separate the videos.
    """
    return {
        name: " ".join(
            "".join("01"[bool(success)] for success in test(video)) or _EMPTY for video in verdicts
        )
        for name, test in _TESTS.items()
    }


def _attribute_test(name: str) -> Callable[[VideoVerdict], list[bool]]:
    """Whether each shot has the attribute of its caption."""
    return lambda video: [shot.correct[name] for shot in video.shots]


_TESTS: dict[str, Callable[[VideoVerdict], list[bool]]] = {
    **{name: _attribute_test(name) for name in ATTRIBUTES},
    "all_right": lambda video: [shot.caption_correct for shot in video.shots],
    "identity_held": lambda video: [shot.identity_held for shot in video.shots],
    "cut_exact": lambda video: [cut.exact for cut in video.cuts],
}


def paired_difference(case: str, other: str) -> Difference | None:
    """Difference of the rates of two strings of `outcomes`; None if they have no shot.

    Raises UserError if they are not outcomes of the same videos.
    """
    # 1. Successes and shots of every video.
    successes, sizes = _counts(case)
    other_successes, other_sizes = _counts(other)
    if not np.array_equal(sizes, other_sizes):
        raise UserError(
            f"cannot pair {len(sizes)} videos of {sizes.sum()} shots with {len(other_sizes)} of "
            f"{other_sizes.sum()}; measure both cases on the same videos"
        )
    if not sizes.sum():
        return None
    # 2. Pooled differences of samples of videos.
    gains = successes - other_successes
    draws = _draws(len(sizes))
    sampled = gains[draws].sum(1) / np.maximum(sizes[draws].sum(1), 1)
    low, high = np.quantile(sampled, (1 - CONFIDENCE, CONFIDENCE))
    return Difference(
        estimate=float(gains.sum() / sizes.sum()),
        low=float(low),
        high=float(high),
        n=int(sizes.sum()),
        videos=len(sizes),
    )


def _counts(text: str) -> tuple[Int[np.ndarray, "v"], Int[np.ndarray, "v"]]:
    """Number of successes, and of shots, of each video."""
    videos = ["" if word == _EMPTY else word for word in text.split()]
    return np.array([w.count("1") for w in videos], int), np.array([len(w) for w in videos], int)


@functools.lru_cache(maxsize=4)
def _draws(videos: int) -> Int[np.ndarray, "r v"]:
    """Indices of the videos of every bootstrap sample, the same for every pair of cases."""
    return np.random.default_rng(SEED).integers(videos, size=(RESAMPLES, videos))
