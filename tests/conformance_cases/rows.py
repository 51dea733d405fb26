"""Cases of golden files, and the rows of the report that they produce.

The error of a case is max |ours - golden| / max |golden| over the compared arrays. For sampled
latents it is the L2 norm of the difference relative to that of the golden, because a few solver
steps amplify single values. For integers, masks and text it is the fraction of entries that differ,
which must be 0.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

EXACT = 0.0
TIGHT = 1e-5
"""Tolerance for tables, which result from a few float32 operations."""
CLOSE = 1e-4
"""Tolerance for models and sampling in float32."""

PASS, FAIL, LATER = "pass", "fail", "not implemented"


class NotImplementedHere(Exception):
    """Raised by a case that the project has no function for."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
      name: name of the case within its file.
      tolerance: largest error that passes.
      measure: computes the error, or raises `NotImplementedHere`.
    """

    name: str
    tolerance: float
    measure: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """The result of a case.

    Attributes:
      file: name of the golden file.
      case: name of the case.
      error: measured error; None if it is not a finite number.
      tolerance: largest error that passes; None if the case is not implemented.
      status: "pass", "fail" or "not implemented".
      reason: explanation of a failure.
    """

    file: str
    case: str
    error: float | None
    tolerance: float | None
    status: str
    reason: str = ""

    def public(self) -> dict[str, Any]:
        """The row as it appears in the JSON report."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "reason"}


def run(file: str, case: Case) -> Row:
    """Runs a case; an exception counts as a failure, with a reason."""
    try:
        error = float(case.measure())
    except NotImplementedHere as reason:
        return Row(file, case.name, None, None, LATER, str(reason))
    except Exception as problem:  # the later cases must still run
        return broken(file, case.name, problem, case.tolerance)
    if not math.isfinite(error):
        return Row(file, case.name, None, case.tolerance, FAIL, f"the error is {error}")
    status = PASS if error <= case.tolerance else FAIL
    return Row(file, case.name, error, case.tolerance, status)


def broken(file: str, case: str, problem: Exception, tolerance: float | None = None) -> Row:
    """The row of a case or file that raised an exception."""
    first = (str(problem).strip() or "no message").splitlines()[0]
    return Row(file, case, None, tolerance, FAIL, f"{type(problem).__name__}: {first}")


def compared(
    name: str,
    tolerance: float,
    got: Callable[[], Any],
    want: Any,
    metric: Callable[[Any, Any], float] | None = None,
) -> Case:
    """A case that compares `got()` with the golden `want`, by default with `relative`."""
    measure = relative if metric is None else metric
    return Case(name, tolerance, lambda: measure(got(), want))


def later(name: str, reason: str = "") -> Case:
    """A case that is not implemented yet."""

    def measure() -> float:
        raise NotImplementedHere(reason)

    return Case(name, EXACT, measure)


def relative(got: Any, want: Any) -> float:
    """max |got - want| / max |want|, or max |got - want| if the golden is all zeros."""
    got, want = _pair(got, want)
    difference, scale = np.max(np.abs(got - want)), np.max(np.abs(want))
    return float(difference / scale if scale else difference)


def distance(got: Any, want: Any) -> float:
    """L2 distance relative to the norm of the golden."""
    got, want = _pair(got, want)
    scale = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / (scale or 1.0))


def differing(got: Any, want: Any) -> float:
    """Fraction of entries that differ."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        raise ValueError(f"ours has shape {got.shape}, the golden {want.shape}")
    return float(np.mean(got != want)) if want.size else 0.0


def _pair(got: Any, want: Any) -> tuple[np.ndarray, np.ndarray]:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"ours has shape {got.shape}, the golden {want.shape}")
    if not want.size:
        raise ValueError("the golden is empty")
    return got, want
