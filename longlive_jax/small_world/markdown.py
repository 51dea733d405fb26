"""Markdown tables and the rates in them."""

from collections.abc import Mapping, Sequence
from typing import Any


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the given cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def rate_text(entry: Mapping[str, Any]) -> str:
    """A rate of `metrics.rate` in % with its interval, as in `91.2 (88.0–93.6)`."""
    if entry["rate"] is None:
        return "–"
    rate, low, high = (100 * entry[k] for k in ("rate", "low", "high"))
    return f"{rate:.1f} ({low:.1f}–{high:.1f})"
