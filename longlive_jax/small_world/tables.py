"""Tables of an evaluation: cases on the same videos, against a baseline, with bars to meet."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longlive_jax.small_world.paired import Difference, paired_difference
from longlive_jax.spec import UserError
from longlive_jax.training.metrics import read_records

METRICS = {
    "all_right": "caption accuracy",
    "identity_held": "identity kept in shot",
    "cut_exact": "cut timing",
}
"""Rates that tables compare -> their names for readers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A requirement on the paired difference of two cases.

    Attributes:
      case: name of the case.
      against: name of the case that it is compared with.
      metric: rate that is compared, a key of METRICS.
      points: largest loss in points.
      kind: "within": the loss is at most `points` with 95 % confidence, by the one-sided lower
        bound of the difference. "no_worse": the videos are no evidence of any loss, since the
        one-sided upper bound is not below 0; `points` is not used.
    """

    case: str
    against: str
    metric: str = "all_right"
    points: float = 3.0
    kind: Literal["within", "no_worse"] = "within"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if self.points < 0:
            raise ValueError(f"points must be >= 0, got {self.points}")

    def is_met(self, difference: Difference) -> bool:
        """Whether the difference meets the requirement."""
        if self.kind == "no_worse":
            return difference.high >= 0
        return difference.low >= -self.points / 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table of cases of part `compared`.

    Attributes:
      name: name for `--parts` and of the picture.
      title: heading.
      rows: names of the cases, in order.
      baseline: name of the case that the others are compared with.
      bars: requirements on differences between rows.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    baseline: str
    bars: tuple[Bar, ...] = ()

    def __post_init__(self) -> None:
        used = [self.baseline, *(name for bar in self.bars for name in (bar.case, bar.against))]
        for name in used:
            if name not in self.rows:
                raise ValueError(f"table {self.name}: {name!r} is not one of its rows")


def table_results(table: TableSpec, cases: Mapping[str, Any]) -> dict[str, Any] | None:
    """Differences and bars of a table, ready for JSON; None if its baseline was not measured.

    Args:
      table: the table.
      cases: results by name, as in a report. Rows that lack a result, or have one of other videos
        than the baseline, are listed under `missing`.

    Returns:
      `title`, `baseline`, `missing`; `rows`: differences from the baseline by row and metric;
      `bars`: each with its fields, its difference and whether it is `met`.
    """
    if table.baseline not in cases:
        return None
    footage = _footage(cases[table.baseline])
    rows = {k: cases[k] for k in table.rows if k in cases and _footage(cases[k]) == footage}
    bars = [bar for bar in table.bars if bar.case in rows and bar.against in rows]
    return {
        "title": table.title,
        "baseline": table.baseline,
        "missing": [name for name in table.rows if name not in rows],
        "rows": {name: _differences(row, rows[table.baseline]) for name, row in rows.items()},
        "bars": [entry for bar in bars if (entry := _bar_result(bar, rows)) is not None],
    }


def _footage(case: Mapping[str, Any]) -> list[Any]:
    """What the videos of a case, and their noise, depend on."""
    return [case["asked"]["footage"], case["asked"]["batch"]]


def _difference(case: Mapping[str, Any], other: Mapping[str, Any], metric: str):
    return paired_difference(case["outcomes"][metric], other["outcomes"][metric])


def _differences(case: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Differences by metric; None for a metric without shots."""
    pairs = {metric: _difference(case, baseline, metric) for metric in METRICS}
    return {k: None if pair is None else dataclasses.asdict(pair) for k, pair in pairs.items()}


def _bar_result(bar: Bar, rows: Mapping[str, Any]) -> dict[str, Any] | None:
    difference = _difference(rows[bar.case], rows[bar.against], bar.metric)
    if difference is None:
        return None
    entry = dataclasses.asdict(bar) | dataclasses.asdict(difference)
    return entry | {"met": bar.is_met(difference)}


def bar_results(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(name of the table, result) for every bar of a report."""
    for name, table in report.get("tables", {}).items():
        yield from ((name, bar) for bar in table["bars"])


def bar_line(bar: Mapping[str, Any]) -> str:
    """A bar, its difference and its verdict, in one line."""
    limit = "no worse than" if bar["kind"] == "no_worse" else f"at most {bar['points']:g} below"
    return (
        f"{bar['case']}, {METRICS[bar['metric']]}: {limit} {bar['against']}: "
        f"{difference_text(bar)}: {'met' if bar['met'] else 'missed'}"
    )


def difference_text(entry: Mapping[str, float] | None) -> str:
    """A difference in points with both bounds, as in `-1.2 (-2.4, +0.1)`."""
    if entry is None:
        return "–"
    estimate, low, high = (100 * entry[key] + 0.0 for key in ("estimate", "low", "high"))
    return f"{estimate:+.1f} ({low:+.1f}, {high:+.1f})"


def training_cost(log: Path) -> dict[str, float]:
    """Time and memory of the training run with work directory `log`, from its metrics.

    Returns:
      `updates`, `seconds_per_update` (median over the logged windows), and `peak_gib` where the
      device reports it.

    Raises:
      UserError: if there is no record of an update.
    """
    records = [r for r in read_records(log / "metrics.jsonl") if r.get("steps_per_s")]
    if not records:
        raise UserError(
            f"{log}: has no metrics.jsonl with updates; give the --workdir of the training as "
            "`log`, or leave `log` out"
        )
    seconds = float(np.median([1 / r["steps_per_s"] for r in records]))
    cost = {"updates": records[-1]["step"], "seconds_per_update": seconds}
    peaks = [r["peak_gib"] for r in records if "peak_gib" in r]
    return cost | ({"peak_gib": max(peaks)} if peaks else {})


def check_tables(tables: Sequence[TableSpec], cases: Sequence[str], parts: Sequence[str]) -> None:
    """Raises ValueError for a table whose name is not unique, or with an unknown row."""
    names = [*parts, *(table.name for table in tables)]
    for table in tables:
        if not table.name or names.count(table.name) != 1:
            raise ValueError(f"evaluate.tables: {table.name!r} is not a unique name")
        for row in table.rows:
            if row not in cases:
                raise ValueError(f"evaluate.tables: {table.name}: no case is named {row!r}")
