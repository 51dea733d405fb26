"""Tables of an evaluation as Markdown and as pictures, from a report with `tables`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.small_world.markdown import rate_text, table_text
from longlive_jax.small_world.tables import METRICS, difference_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NOTE = (
    "Rates in % with 95 % Wilson intervals. Differences from `{baseline}` in points, with a lower "
    "and an upper bound of 95 % confidence each (one-sided), for the same videos and noise: a "
    "bootstrap over {videos} videos."
)
_COSTS = ("frames/s", "DiT, MB", "KV cache, MB", "updates", "s/update", "training, GiB")


def tables_markdown(report: Mapping[str, Any]) -> list[str]:
    """Sections of the tables of a report."""
    sections: list[str] = []
    for table in report.get("tables", {}).values():
        sections += [f"## {table['title']}", _note(table), _rows(table, report["cases"])]
        if table["missing"]:
            sections.append(f"Not measured on these videos: {', '.join(table['missing'])}.")
        if table["bars"]:
            sections.append(_bars(table["bars"]))
    return sections


def _note(table: Mapping[str, Any]) -> str:
    videos = table["rows"][table["baseline"]]["all_right"]["videos"]
    return _NOTE.format(baseline=table["baseline"], videos=videos)


def _rows(table: Mapping[str, Any], cases: Mapping[str, Any]) -> str:
    head = ["case", "steps", "shots"]
    head += [text for name in METRICS.values() for text in (name, "difference")]
    rows = [
        [name, *_cells(cases[name], differences, is_baseline=name == table["baseline"])]
        for name, differences in table["rows"].items()
    ]
    return table_text([*head, *_COSTS], rows)


def _cells(
    case: Mapping[str, Any], differences: Mapping[str, Any], *, is_baseline: bool
) -> list[str]:
    """Cells of a row after its name."""
    # Rates and differences.
    sample = case["asked"]["sample"]
    cells = ["–" if sample is None else str(sample["steps"]), str(case["shots"])]
    for metric in METRICS:
        text = "–" if is_baseline else difference_text(differences[metric])
        cells += [rate_text(case[metric]), text]
    # Costs.
    memory, training = case.get("bytes", {}), case.get("training") or {}
    megabytes = {k: memory[k] / 1e6 for k in ("dit", "cache") if k in memory}
    return [
        *cells,
        _number(case["times"]["frames_per_second"], "{:.0f}"),
        _number(megabytes.get("dit"), "{:.2f}"),
        _number(megabytes.get("cache"), "{:.2f}"),
        _number(training.get("updates"), "{:d}"),
        _number(training.get("seconds_per_update"), "{:.2f}"),
        _number(training.get("peak_gib"), "{:.2f}"),
    ]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _bars(bars: Sequence[Mapping[str, Any]]) -> str:
    """The requirements, with what was measured."""
    rows = [
        [
            bar["case"],
            METRICS[bar["metric"]],
            "no worse" if bar["kind"] == "no_worse" else f"at most {bar['points']:g} points below",
            bar["against"],
            difference_text(bar),
            "met" if bar["met"] else "missed",
        ]
        for bar in bars
    ]
    note = (
        "A loss is at most so many points if the lower bound says so. A case is no worse if the "
        "upper bound is not below 0."
    )
    head = ["case", "rate", "requirement", "than", "difference", "verdict"]
    return f"{note}\n\n{table_text(head, rows)}"


def write_table_picture(table: Mapping[str, Any], cases: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG of a table: rates with intervals, and below them differences with bounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(table["rows"])
    figure = Figure(figsize=(12, 1.6 + 0.62 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(METRICS), sharey=True)
    for column, (metric, title) in enumerate(METRICS.items()):
        _draw_rates(panels[0, column], [cases[name][metric] for name in names])
        differences = {name: table["rows"][name][metric] for name in names}
        _draw_differences(panels[1, column], differences, table, metric)
        panels[0, column].set_title(title, fontsize=10)
    panels[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0, 0].invert_yaxis()
    figure.suptitle(table["title"], fontsize=11)
    figure.savefig(path, dpi=120)


def _draw_rates(panel: "Axes", entries: Sequence[Mapping[str, Any]]) -> None:
    """Horizontal bars of rates with their intervals."""
    for row, entry in enumerate(entries):
        if entry["rate"] is None:
            continue
        rate, low, high = (100 * entry[key] for key in ("rate", "low", "high"))
        error = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
        panel.barh(row, rate, 0.7, xerr=error, color=f"C{row % 10}", error_kw={"lw": 1})
        place, colour = (2, "white") if low > 15 else (high + 2, "black")
        panel.text(place, row, f"{rate:.1f}", va="center", fontsize=7, color=colour)
    panel.set_xlim(0, 100)
    panel.set_xlabel("%, with 95 % interval", fontsize=8)
    panel.tick_params(labelsize=8)


def _draw_differences(
    panel: "Axes", differences: Mapping[str, Any], table: Mapping[str, Any], metric: str
) -> None:
    """Differences from the baseline with both bounds, and the limits of the lower bounds."""
    # 1. Differences.
    panel.axvline(0, color="0.5", lw=0.8)
    names = list(differences)
    for row, (name, entry) in enumerate(differences.items()):
        if entry is None or name == table["baseline"]:
            continue
        middle, low, high = (100 * entry[key] for key in ("estimate", "low", "high"))
        panel.plot([low, high], [row, row], color=f"C{row % 10}", lw=2)
        panel.plot(middle, row, "o", color=f"C{row % 10}", ms=4)
    # 2. Limits.
    for bar in table["bars"]:
        is_limit = bar["kind"] == "within" and bar["against"] == table["baseline"]
        if is_limit and bar["metric"] == metric:
            row = names.index(bar["case"])
            colour = "green" if bar["met"] else "red"
            panel.plot([-bar["points"]] * 2, [row - 0.35, row + 0.35], color=colour, lw=1.5)
    panel.set_xlabel(f"points against {table['baseline']}", fontsize=8)
    panel.tick_params(labelsize=8)
