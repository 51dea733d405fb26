"""Evaluation reports: resumable JSON, Markdown tables, a bar chart, and strips of frames.

A report is plain JSON: `{"about": {...}, "cases": {name: result}, "tables": {name: table}}` with
results from `evaluator.measure` and `tables.table_results`. The key `asked` of a case holds
everything that its result depends on, which decides whether the case must be measured again.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.io.pictures import strip
from longlive_jax.small_world.evaluator import Example
from longlive_jax.small_world.markdown import rate_text, table_text
from longlive_jax.small_world.table_report import tables_markdown
from longlive_jax.spec import UserError

RATES = {
    "shape": "shape",
    "colour": "colour",
    "background": "background",
    "motion": "motion",
    "all_right": "caption accuracy",
    "cut_exact": "cut timing",
    "identity_held": "identity kept in shot",
}
"""Rates of `metrics.summary` in the report -> their names for readers."""

QUALITY_TARGETS = {
    "vae": dict.fromkeys(("shape", "colour", "background", "motion"), 0.98) | {"psnr": 32.0},
    "shots": dict.fromkeys(("shape", "colour", "background", "motion"), 0.90)
    | {"all_right": 0.80, "cut_exact": 0.98},
    "minute": {"last_to_first": 0.90},
}
"""Targets of the small world's checkpoint: case -> metric -> smallest value."""

_OTHER_METRICS = {
    "psnr": "PSNR, dB",
    "last_to_first": "caption accuracy, last / first quarter",
}


def read_report(path: Path) -> dict[str, Any]:
    """The report at `path`, or an empty one; UserError if the file is not a report."""
    if not path.is_file():
        return {"about": {}, "cases": {}}
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path} is not a report ({error}); remove it or choose another --out"
        ) from error
    if not isinstance(report, dict) or not isinstance(report.get("cases"), dict):
        raise UserError(
            f"{path} is not a report of `longlive evaluate`; remove it or choose another --out"
        )
    return report


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report atomically, so an interrupted run leaves the previous one intact."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def is_done(report: Mapping[str, Any], name: str, dependencies: Mapping[str, Any]) -> bool:
    """Whether the report has this case, measured with the same dependencies.

    Reports of earlier versions have no outcomes of single shots, so their cases are measured again.
    """
    recorded = report["cases"].get(name, {})
    is_same = recorded.get("asked") == json.loads(json.dumps(dependencies))
    return is_same and "outcomes" in recorded


def target_results(report: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float, bool]]:
    """(case, metric, value, target, is met) for every target whose case was measured."""
    for case, targets in QUALITY_TARGETS.items():
        result = report["cases"].get(case)
        if result is None:
            continue
        for key, target in targets.items():
            value = result[key]["rate"] if isinstance(result[key], dict) else result[key]
            if value is not None:
                yield case, key, value, target, value >= target


def metric_name(key: str) -> str:
    """The name for readers of a metric's key in report.json."""
    return (RATES | _OTHER_METRICS).get(key, key)


def markdown(report: Mapping[str, Any]) -> str:
    """The complete report as Markdown tables."""
    cases = report["cases"]
    sections = [
        # Header and rates.
        "# Small world evaluation",
        _about(report["about"]),
        *tables_markdown(report),
        "## Rates",
        _RATES_NOTE,
        _case_table(["steps", "shots", *RATES.values(), "extra cuts"], cases, _rates),
        # Drift and identity.
        "## Drift over the length of a video",
        _case_table(_QUARTERS, cases, _quarters),
        "## Identity of returning subjects",
        "Captions mention neither marker nor size. The chance level of each is 33 %.",
        _case_table(_RETURNS, cases, _returns),
        # Costs.
        "## Speed and memory",
        "Memory: the DiT's parameters, and the KV cache of one video.",
        _case_table(_COSTS, cases, _costs),
        # Mistakes, fidelity and targets.
        "## Most frequent mistakes",
        _case_table(["observed for expected (number of shots)"], cases, _mistakes),
        *(_fidelity(name, case) for name, case in cases.items() if "psnr" in case),
        "## Targets",
        _targets(report),
    ]
    return "\n\n".join(sections) + "\n"


_RATES_NOTE = (
    "Rates in % with 95 % Wilson intervals. Caption accuracy: shots with all four attributes as in "
    "the caption. Cut timing: cuts on the right frame. Identity kept in shot: shots with constant "
    "shape, colour, marker and size. Extra cuts: number of cuts that are not in the script."
)
_QUARTERS = (
    "caption accuracy by quarter, %", "last / first quarter", "pixel error by quarter",
    "growth of pixel error",
)  # fmt: skip
_RETURNS = (
    "marker kept, subject of first shot", "size kept, subject of first shot",
    "marker kept, subject of later shot", "size kept, subject of later shot",
)  # fmt: skip
_COSTS = (
    "seconds of video", "first batch, s", "all batches, s", "frames/s", "judge, s", "DiT, MB",
    "KV cache, MB",
)  # fmt: skip


def _mistakes(case: Mapping[str, Any]) -> list[str]:
    return [", ".join(f"{mistake} ({count})" for mistake, count in case["mistakes"].items())]


def _fidelity(name: str, case: Mapping[str, Any]) -> str:
    return (
        f"VAE reconstruction ({name}): PSNR {case['psnr']:.2f} dB over all pixels, "
        f"{case['psnr_worst_frame']:.2f} dB for the worst frame."
    )


def _targets(report: Mapping[str, Any]) -> str:
    rows = [
        [case, metric_name(key), _number(value), _number(target), "yes" if is_met else "no"]
        for case, key, value, target, is_met in target_results(report)
    ]
    return table_text(["case", "metric", "measured", "target", "met"], rows)


def _about(about: Mapping[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in about.items())


def _case_table(
    head: Sequence[str],
    cases: Mapping[str, Any],
    cells: Callable[[Mapping[str, Any]], list[str]],
) -> str:
    """A table with one row per case: its name and `cells(case)`."""
    return table_text(["case", *head], [[name, *cells(case)] for name, case in cases.items()])


def _rates(case: Mapping[str, Any]) -> list[str]:
    sample = case["asked"]["sample"]
    steps = "–" if sample is None else str(sample["steps"])
    return [
        steps,
        str(case["shots"]),
        *(rate_text(case[k]) for k in RATES),
        str(case["extra_cuts"]),
    ]


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
    return [
        rate_text(group[kind]) for group in case["returns"].values() for kind in ("mark", "size")
    ]


def _costs(case: Mapping[str, Any]) -> list[str]:
    times = case["times"]
    keys = ("video_seconds", "first_batch", "all_batches", "frames_per_second", "judging")
    seconds = ["–" if times[key] is None else f"{times[key]:g}" for key in keys]
    memory = case.get("bytes", {})
    sizes = [f"{memory[key] / 1e6:.2f}" if key in memory else "–" for key in ("dit", "cache")]
    return [*seconds, *sizes]


def _number(value: float) -> str:
    return f"{value:.2f}" if value > 2 else f"{value:.3f}"


def write_chart(report: Mapping[str, Any], path: Path) -> None:
    """Writes a bar chart (PNG) of all rates of all cases with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = report["cases"]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.82 / max(1, len(cases))
    for i, (name, case) in enumerate(cases.items()):
        entries = [(j, case[k]) for j, k in enumerate(RATES) if case[k]["rate"] is not None]
        centres = [j + (i - (len(cases) - 1) / 2) * width for j, _ in entries]
        rates = [entry["rate"] for _, entry in entries]
        below = [max(0.0, entry["rate"] - entry["low"]) for _, entry in entries]
        above = [max(0.0, entry["high"] - entry["rate"]) for _, entry in entries]
        bars = axes.bar(
            centres, rates, width, yerr=[below, above], label=name, error_kw={"lw": 0.8}
        )
        for bar in bars:
            bar.set_color(f"C{i % 10}")
    axes.set_xticks(range(len(RATES)), list(RATES.values()))
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of shots (of cuts for cut timing)")
    axes.legend(fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.savefig(path, dpi=120)


def write_strip(path: Path, example: Example) -> None:
    """Writes a PNG with one row of frames per shot."""
    strip(path, example.shots, example.captions)
