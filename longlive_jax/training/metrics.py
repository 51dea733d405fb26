"""Metrics of a run: records in `metrics.jsonl`, TensorBoard events, and a plot of the curves."""

import contextlib
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter


class MetricsLog:
    """Appends records to `metrics.jsonl` and to TensorBoard event files in `tensorboard/`.

    After a restart at step `resume_at`, records of later steps are dropped. With `write=False` (all
    processes but the first) records stay in memory only.

    Attributes:
      path: the `metrics.jsonl` file.
      records: all records so far, each a dictionary with its "step".
    """

    def __init__(self, workdir: pathlib.Path, *, resume_at: int = 0, write: bool = True):
        self.path = workdir / "metrics.jsonl"
        self.records = [r for r in read_records(self.path) if r["step"] <= resume_at]
        self._board = None
        if write:
            _replace(self.path, "".join(json.dumps(r) + "\n" for r in self.records))
            folder = str(workdir / "tensorboard")
            self._board = SummaryWriter(folder, purge_step=resume_at + 1, flush_secs=30)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends a record of the finite values.

        A value may be NaN, such as the error at a noise level that no frame had.
        """
        finite = {k: round(float(v), 6) for k, v in values.items() if math.isfinite(v)}
        record = {"step": step} | finite  # JSON cannot represent NaN and infinity
        self.records.append(record)
        if self._board is None:
            return
        with self.path.open("a") as out:
            out.write(json.dumps(record) + "\n")
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)

    def has_evaluation(self, step: int) -> bool:
        """Whether an evaluation at `step` is recorded; records of updates have `steps_per_s`."""
        return any(r["step"] == step and "steps_per_s" not in r for r in self.records)

    def close(self) -> None:
        """Flushes the TensorBoard events, unless the disk is full."""
        if self._board is not None:
            with contextlib.suppress(OSError):  # the run is over, and metrics.jsonl is complete
                self._board.close()


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def read_records(path: pathlib.Path) -> list[dict]:
    """The records of a `metrics.jsonl` file, without an incomplete last line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def mean_metrics(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Mean of each device-side metric over its finite values in `window`; NaN if it has none.

    A metric may be missing from some steps of the window, such as the loss of a group of parameters
    that is updated in every fifth step: its mean is over the other steps.
    """
    fetched = jax.device_get(window)
    names = dict.fromkeys(name for metrics in fetched for name in metrics)
    columns = {k: np.array([float(m[k]) for m in fetched if k in m]) for k in names}
    finite = {k: x[np.isfinite(x)] for k, x in columns.items()}
    return {k: float(x.mean()) if len(x) else math.nan for k, x in finite.items()}


def peak_gib() -> dict[str, float]:
    """Peak memory of this process's devices in GiB, the largest; empty if no device reports it."""
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    known = [x for x in peaks if x is not None]
    return {"peak_gib": max(known) / 2**30} if known else {}


def plot_curves(runs: Mapping[str, list[dict]], path: pathlib.Path) -> None:
    """Plots every metric of the runs over the steps to a PNG, one panel per metric.

    `runs` maps the name of a run in the legend to its records; a single run has no legend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = {k for records in runs.values() for r in records for k in r}
    names = sorted(k for k in keys - {"step"} if not k.endswith("bad_steps"))
    if not names:
        return
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, name in zip(panels, names, strict=False):
        _draw(panel, name, runs)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    if len(runs) > 1:
        handles = panels[0].get_lines()
        figure.legend(handles, list(runs), loc="outside upper center", ncols=len(runs), fontsize=9)
    figure.savefig(path, dpi=110)


def _draw(panel: Any, name: str, runs: Mapping[str, list[dict]]) -> None:
    """Plots one metric of every run; a positive loss or gradient norm gets a log scale."""
    lowest = math.inf
    for records in runs.values():
        points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
        steps, values = zip(*points, strict=True) if points else ((), ())
        panel.plot(steps, values, lw=1.2)
        lowest = min((lowest, *values))
    panel.set_title(name, fontsize=9)
    panel.tick_params(labelsize=7)
    if 0 < lowest < math.inf and ("loss" in name or name.endswith("grad_norm")):
        panel.set_yscale("log")
