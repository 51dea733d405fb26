"""Where a run's numbers go: one JSON line a record, and a picture of the curves."""

import json
import math
import pathlib

import jax


class MetricsLog:
    """Appends records to `metrics.jsonl`; a restart drops those past the restored step."""

    def __init__(self, workdir: pathlib.Path, *, resume_at: int = 0):
        self.path = workdir / "metrics.jsonl"
        self.records = [r for r in read_records(self.path) if r["step"] <= resume_at]
        self.path.write_text("".join(json.dumps(r) + "\n" for r in self.records))

    def write(self, step: int, values: dict[str, float]) -> None:
        record = {"step": step} | {k: round(float(v), 6) for k, v in values.items()}
        self.records.append(record)
        with self.path.open("a") as out:
            out.write(json.dumps(record) + "\n")


def read_records(path: pathlib.Path) -> list[dict]:
    """The records of a `metrics.jsonl`; an unfinished last line is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def mean_of(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over a window of device-side metrics: the only place that waits for the device."""
    fetched = jax.device_get(window)
    return {k: sum(float(m[k]) for m in fetched) / len(fetched) for k in fetched[0]}


def plot_curves(records: list[dict], path: pathlib.Path) -> None:
    """Draws every logged number over the steps, one panel each, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({k for r in records for k in r} - {"step", "bad_steps"})
    if not names:
        return
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
        panel.plot(*zip(*points, strict=True), lw=1.2)
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        if points and min(y for _, y in points) > 0 and ("loss" in name or name == "grad_norm"):
            panel.set_yscale("log")
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    figure.savefig(path, dpi=110)
