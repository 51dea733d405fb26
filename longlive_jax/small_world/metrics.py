"""Aggregation of verdicts into rates with confidence intervals."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longlive_jax.small_world.judge import ATTRIBUTES, VideoVerdict

_QUALITY = ("error", "overlap", "sharpness")


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval (low, high) of a success rate; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    mean, scale = successes / n, 1 + z * z / n
    middle = mean + z * z / (2 * n)
    spread = z * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return float(max(0.0, (middle - spread) / scale)), float(min(1.0, (middle + spread) / scale))


def summary(verdicts: Sequence[VideoVerdict]) -> dict:
    """Aggregates verdicts into plain numbers, ready for JSON.

    Returns:
      shape, colour, background, motion: rates of shots with that attribute as in the caption.
      all_right: caption accuracy, the rate of shots with all four attributes correct.
      identity_held: rate of shots with a constant identity.
      cut_exact: rate of cuts on the expected frame.
      cut_found: rate of cuts that are visible near it.
      return_held, return_mark, return_size: rates of returning subjects with the same identity,
        marker and size.
      extra_cuts: number of unexpected cuts.
      drift: mean growth of the pixel error from the first quarter to the last.
      last_to_first: ratio of caption accuracies, last quarter to first; None if undefined.
      quarters: error, overlap, sharpness and caption accuracy (`all_right`) per quarter.
      videos: number of videos.

      A rate is {"rate", "n", "low", "high"}, with rate None for n = 0.

    Raises:
      ValueError: if there are no verdicts.
    """
    if not verdicts:
        raise ValueError("no verdicts to summarise; judge at least one video")
    shots = [shot for verdict in verdicts for shot in verdict.shots]
    cuts = [cut for verdict in verdicts for cut in verdict.cuts]
    returns = [back for verdict in verdicts for back in verdict.returns]
    quarters = _quarter_summaries(verdicts)
    first, last = (quarters[k]["all_right"]["rate"] for k in (0, -1))
    return {
        **{k: _rate(shots, lambda shot, k=k: shot.correct[k]) for k in ATTRIBUTES},
        "all_right": _rate(shots, lambda shot: shot.caption_correct),
        "identity_held": _rate(shots, lambda shot: shot.identity_held),
        "cut_exact": _rate(cuts, lambda cut: cut.exact),
        "cut_found": _rate(cuts, lambda cut: cut.frame is not None),
        "return_held": _rate(returns, lambda back: back.same_identity),
        "return_mark": _rate(returns, lambda back: back.same_marker),
        "return_size": _rate(returns, lambda back: back.same_size),
        "extra_cuts": sum(len(verdict.extra_cuts) for verdict in verdicts),
        "drift": float(np.mean([verdict.drift for verdict in verdicts])),
        "last_to_first": last / first if first and last is not None else None,
        "quarters": quarters,
        "videos": len(verdicts),
    }


def _quarter_summaries(verdicts: Sequence[VideoVerdict]) -> list[dict[str, Any]]:
    """Mean quality and caption accuracy over all videos, quarter by quarter."""
    columns = zip(*(verdict.quarters for verdict in verdicts), strict=True)
    return [
        {
            **{k: float(np.mean([getattr(q, k) for q in column])) for k in _QUALITY},
            "all_right": rate(
                sum(q.segments_correct for q in column), sum(q.segments for q in column)
            ),
        }
        for column in columns
    ]


def _rate(items: Sequence, test: Callable[..., bool]) -> dict:
    """Rate of the items that pass the test."""
    return rate(sum(bool(test(item)) for item in items), len(items))


def rate(successes: int, n: int) -> dict:
    """A success rate with its 95 % Wilson interval: {"rate", "n", "low", "high"}."""
    low, high = wilson(successes, n)
    return {"rate": successes / n if n else None, "n": n, "low": low, "high": high}
