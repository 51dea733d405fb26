"""Where a run's numbers go: a JSON line a record, TensorBoard, and a picture of the curves."""

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
    """Appends records to `metrics.jsonl` and to TensorBoard's files in `tensorboard/`.

    A restart drops those past the restored step. With `write=False` (all processes but the first)
    records are kept in memory only.
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
        """A record of what is finite: a noise level without a frame has no error."""
        finite = {k: round(float(v), 6) for k, v in values.items() if math.isfinite(v)}
        record = {"step": step} | finite  # JSON has no other numbers
        self.records.append(record)
        if self._board is None:
            return
        with self.path.open("a") as out:
            out.write(json.dumps(record) + "\n")
        for name, value in finite.items():
            self._board.add_scalar(name, value, step)

    def evaluated(self, step: int) -> bool:
        """Whether there is a record of an evaluation at a step; those of updates have a rate."""
        return any(r["step"] == step and "steps_per_s" not in r for r in self.records)

    def close(self) -> None:
        """Writes what TensorBoard has not got yet, unless the disk is full."""
        if self._board is not None:
            with contextlib.suppress(OSError):  # the run is over, and its lines are in the file
                self._board.close()


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def read_records(path: pathlib.Path) -> list[dict]:
    """The records of a `metrics.jsonl`; an unfinished last line is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def mean_of(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    """Means over a window of device-side metrics, of the values that are finite if any is."""
    fetched = jax.device_get(window)
    columns = {k: np.array([float(m[k]) for m in fetched]) for k in fetched[0]}
    finite = {k: x[np.isfinite(x)] for k, x in columns.items()}
    return {k: float(x.mean()) if len(x) else math.nan for k, x in finite.items()}


def peak_gib() -> dict[str, float]:
    """The most memory that a device of this process has used so far, where the device tells."""
    used = [(d.memory_stats() or {}).get("peak_bytes_in_use") for d in jax.local_devices()]
    known = [x for x in used if x is not None]
    return {"peak_gib": max(known) / 2**30} if known else {}


def plot_curves(runs: Mapping[str, list[dict]], path: pathlib.Path) -> None:
    """Draws every logged number of the runs over the steps, one panel each, to a PNG.

    `runs` are records by the name that a legend gives them; of one run there is none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {k for records in runs.values() for r in records for k in r}
    names = sorted(found - {"step", "bad_steps"})
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
    """One number of every run."""
    lowest = math.inf
    for records in runs.values():
        points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
        steps, values = zip(*points, strict=True) if points else ((), ())
        panel.plot(steps, values, lw=1.2)
        lowest = min((lowest, *values))
    panel.set_title(name, fontsize=9)
    panel.tick_params(labelsize=7)
    if 0 < lowest < math.inf and ("loss" in name or name == "grad_norm"):
        panel.set_yscale("log")
