"""Judged cases as a file that can be resumed, a table in words, a chart, and strips of frames.

A report is plain JSON: `{"about": {...}, "cases": {name: result}}` with results as `measure`
returns them. Every case also holds what was asked for (`asked`), which tells whether it has to be
measured again.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longlive_jax.io.pictures import strip
from longlive_jax.small_world.evaluator import Example
from longlive_jax.spec import UserError

RATES = {
    "shape": "shape",
    "colour": "colour",
    "background": "background",
    "motion": "motion",
    "all_right": "all right",
    "cut_exact": "cut on its frame",
    "identity_held": "identity in shot",
}
"""Rates of `judge.summary` that a report shows, and what it calls them."""

BARS = {
    "vae": dict.fromkeys(("shape", "colour", "background", "motion"), 0.98) | {"psnr": 32.0},
    "shots": dict.fromkeys(("shape", "colour", "background", "motion"), 0.90)
    | {"all_right": 0.80, "cut_exact": 0.98},
    "minute": {"last_to_first": 0.90},
}
"""What the small world's checkpoint has to reach, by case."""


def read_report(path: Path) -> dict[str, Any]:
    """The report written before, or an empty one; UserError if the file is something else."""
    if not path.is_file():
        return {"about": {}, "cases": {}}
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is no report ({error}); remove it or choose another --out"
        ) from error
    if not isinstance(report, dict) or not isinstance(report.get("cases"), dict):
        raise UserError(f"{path} is no report of ours; remove it or choose another --out")
    return report


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes in one step, so an interrupted run leaves the last whole report."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def is_done(report: Mapping[str, Any], name: str, asked: Mapping[str, Any]) -> bool:
    """Whether the report holds this case, measured as it is asked for now."""
    held = report["cases"].get(name, {}).get("asked")
    return held == json.loads(json.dumps(asked))


def judgements(report: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float, bool]]:
    """(case, quantity, value, bar, reached) for every bar whose case was measured."""
    for case, bars in BARS.items():
        result = report["cases"].get(case)
        if result is None:
            continue
        for key, bar in bars.items():
            value = result[key]["rate"] if isinstance(result[key], dict) else result[key]
            if value is not None:
                yield case, key, value, bar, value >= bar


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown tables."""
    cases = report["cases"]
    parts = [
        "# Small world: what the judge says",
        _about(report["about"]),
        "Rates in % with 95 % Wilson intervals.",
        _table(
            ["case", "steps", "shots", *RATES.values(), "extra cuts"],
            [[n, *_rates(c)] for n, c in cases.items()],
        ),
        "## Over the length of a video",
        _table(
            ["case", "all right, by quarter", "last / first", "pixel error, by quarter", "drift"],
            [[n, *_quarters(c)] for n, c in cases.items()],
        ),
        "## Subjects that return",
        "No caption names mark or size. Chance keeps the mark in 33 %, the size in 33 %.",
        _table(
            ["case", *(f"{k} of {w}" for w in ("first shot", "later shots") for k in _KEPT)],
            [[n, *_returns(c)] for n, c in cases.items()],
        ),
        "## Times and memory",
        "Of the DiT's parameters, and of the keys and values of one video's window.",
        _table(
            ["case", *_COSTS],
            [[n, *_times(c)] for n, c in cases.items()],
        ),
    ]
    parts += ["## Mistakes, the most frequent first", _mistakes(cases)]
    parts += [_fidelity(name, case) for name, case in cases.items() if "psnr" in case]
    parts += ["## Bars", _bars(report)]
    return "\n\n".join(parts) + "\n"


def _mistakes(cases: Mapping[str, Any]) -> str:
    lists = [[f"{k} ({v})" for k, v in case["mistakes"].items()] for case in cases.values()]
    rows = [[name, ", ".join(words)] for name, words in zip(cases, lists, strict=True)]
    return _table(["case", "seen for meant"], rows)


def _fidelity(name: str, case: Mapping[str, Any]) -> str:
    return (
        f"VAE ({name}): {case['psnr']:.2f} dB over all pixels, worst frame "
        f"{case['psnr_worst_frame']:.2f} dB."
    )


def _bars(report: Mapping[str, Any]) -> str:
    rows = [
        [case, key.replace("_", " "), _number(value), _number(bar), "yes" if reached else "no"]
        for case, key, value, bar, reached in judgements(report)
    ]
    return _table(["case", "quantity", "measured", "bar", "reached"], rows)


_KEPT = ("mark", "size")
_COSTS = (
    "seconds of video", "first batch, s", "all, s", "frames/s", "judge, s", "DiT, MB", "cache, MB",
)  # fmt: skip


def _about(about: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in about.items())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _rates(case: Mapping[str, Any]) -> list[str]:
    sample = case["asked"]["sample"]
    steps = "–" if sample is None else str(sample["steps"])
    return [steps, str(case["shots"]), *(_rate(case[k]) for k in RATES), str(case["extra_cuts"])]


def _rate(entry: Mapping[str, Any]) -> str:
    if entry["rate"] is None:
        return "–"
    rate, low, high = (100 * entry[k] for k in ("rate", "low", "high"))
    return f"{rate:.1f} ({low:.1f}–{high:.1f})"


def _quarters(case: Mapping[str, Any]) -> list[str]:
    quarters, ratio = case["quarters"], case["last_to_first"]
    right = [q["all_right"]["rate"] for q in quarters]
    return [
        " · ".join("–" if r is None else f"{100 * r:.0f}" for r in right),
        "–" if ratio is None else f"{ratio:.3f}",
        " · ".join(f"{q['error']:.3f}" for q in quarters),
        f"{case['drift']:+.3f}",
    ]


def _returns(case: Mapping[str, Any]) -> list[str]:
    return [_rate(group[kind]) for group in case["returns"].values() for kind in _KEPT]


def _times(case: Mapping[str, Any]) -> list[str]:
    times = case["times"]
    keys = ("video_seconds", "first_batch", "all_batches", "frames_per_second", "judging")
    seconds = ["–" if times[key] is None else f"{times[key]:g}" for key in keys]
    held = case.get("bytes", {})
    sizes = [f"{held[key] / 1e6:.2f}" if key in held else "–" for key in ("dit", "cache")]
    return [*seconds, *sizes]


def _number(value: float) -> str:
    return f"{value:.2f}" if value > 2 else f"{value:.3f}"


def chart(report: Mapping[str, Any], path: Path) -> None:
    """A PNG of bars: every rate of every case with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = report["cases"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.82 / max(1, len(cases))
    for i, (name, case) in enumerate(cases.items()):
        found = [(j, case[k]) for j, k in enumerate(RATES) if case[k]["rate"] is not None]
        places = [j + (i - (len(cases) - 1) / 2) * width for j, _ in found]
        rates = [entry["rate"] for _, entry in found]
        below = [max(0.0, entry["rate"] - entry["low"]) for _, entry in found]
        above = [max(0.0, entry["high"] - entry["rate"]) for _, entry in found]
        bars = axes.bar(places, rates, width, yerr=[below, above], label=name, error_kw={"lw": 0.8})
        for bar in bars:
            bar.set_color(f"C{i % 10}")
    axes.set_xticks(range(len(RATES)), list(RATES.values()))
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of shots (cuts)")
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path, dpi=120)


def write_strip(path: Path, example: Example) -> None:
    """A PNG with one row a shot, spread over its frames."""
    strip(path, example.shots, example.captions)
