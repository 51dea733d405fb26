"""Cases of golden files and the rows they become.

The error of a case is max |ours - golden| / max |golden| over the arrays compared; for sampled
latents the L2 norm of the difference over that of the golden, because a few steps of a solver
amplify single values; and for whole numbers, masks and text the share that differs, to be 0.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

EXACT = 0.0
TIGHT = 1e-5
"""Tables, which are a few float32 operations deep."""
CLOSE = 1e-4
"""Models and sampling in float32."""

PASS, FAIL, LATER = "pass", "fail", "not implemented"


class NotThere(Exception):
    """The project has no function for what a case asks."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: `measure` gives its error, or raises `NotThere`."""

    name: str
    tolerance: float
    measure: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Row:
    """What became of a case. `error` is None where there is no finite number."""

    file: str
    case: str
    error: float | None
    tolerance: float | None
    status: str
    reason: str = ""

    def public(self) -> dict[str, Any]:
        """The row as the JSON report has it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "reason"}


def run(file: str, case: Case) -> Row:
    """Measures a case; an exception in it is a failure with a reason."""
    try:
        error = float(case.measure())
    except NotThere as reason:
        return Row(file, case.name, None, None, LATER, str(reason))
    except Exception as problem:  # the cases after this one shall still be seen
        return broken(file, case.name, problem, case.tolerance)
    if not math.isfinite(error):
        return Row(file, case.name, None, case.tolerance, FAIL, f"the error is {error}")
    status = PASS if error <= case.tolerance else FAIL
    return Row(file, case.name, error, case.tolerance, status)


def broken(file: str, case: str, problem: Exception, tolerance: float | None = None) -> Row:
    """The row of something that raised."""
    first = (str(problem).strip() or "no message").splitlines()[0]
    return Row(file, case, None, tolerance, FAIL, f"{type(problem).__name__}: {first}")


def compared(
    name: str,
    tolerance: float,
    got: Callable[[], Any],
    want: Any,
    metric: Callable[[Any, Any], float] | None = None,
) -> Case:
    """A case that computes `got()` and measures it against the golden, by default `relative`."""
    measure = relative if metric is None else metric
    return Case(name, tolerance, lambda: measure(got(), want))


def later(name: str, reason: str = "") -> Case:
    """A case that no function of the project serves yet."""

    def measure() -> float:
        raise NotThere(reason)

    return Case(name, EXACT, measure)


def relative(got: Any, want: Any) -> float:
    """max |got - want| / max |want|; the plain maximum where the golden is all zeros."""
    got, want = _pair(got, want)
    difference, scale = np.max(np.abs(got - want)), np.max(np.abs(want))
    return float(difference / scale if scale else difference)


def distance(got: Any, want: Any) -> float:
    """Relative L2 distance."""
    got, want = _pair(got, want)
    scale = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / (scale or 1.0))


def differing(got: Any, want: Any) -> float:
    """Share of entries that are not equal."""
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
