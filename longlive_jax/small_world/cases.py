"""Which cases are measured, and the run over them: resumable, one case after the other."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from longlive_jax.io.checkpoint import weights_of
from longlive_jax.io.models import load_model
from longlive_jax.quant.packed import resident_bytes
from longlive_jax.sampling.pipeline import LOADED_WITH, Pipeline
from longlive_jax.sampling.settings import SampleSpec, Solver, spec_for
from longlive_jax.small_world.evaluator import (
    Example,
    Footage,
    Reconstruction,
    Sampled,
    Tick,
    measure,
    truth,
)
from longlive_jax.small_world.report import (
    chart,
    is_done,
    markdown,
    read_report,
    write_report,
    write_strip,
)
from longlive_jax.spec import UserError, nearest

PARTS = ("ceilings", "steps", "long", "sinks", "compared")

type Progress = Callable[[str], Tick]
"""Announces a case by its name; what it returns is told how far that case is."""


SHORT = Footage()
LONG = Footage(least_shots=560, chunks=91, shot_chunks=(8, 30), shots=(4, 8), seed=1)
"""91 chunks are 60.5 seconds. Of 96 videos the last quarter over the first is known to 0.03."""
RETURNING = Footage(least_shots=120, chunks=30, shot_chunks=(5, 9), cast=2, seed=2)
COMPARED = Footage(least_shots=300, seed=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """What is measured.

    Attributes:
      sample: settings of `SampleSpec` in the place of the checkpoint's own.
      fewer_steps: numbers of model calls to measure beside the checkpoint's own.
      fewer_solver: the solver for these; noise added between few steps is not worked off.
      batch: videos made together.
      short: footage of the ceilings and of all numbers of steps.
      long: footage for drift.
      returning: footage for the sinks: long shots, and few subjects that leave and come back.
      compared: one row each: `name`, settings of `SampleSpec`, and `checkpoint` for other weights
        than the run's.
      comparison: footage for these.
    """

    sample: dict[str, Any] = dataclasses.field(default_factory=dict)
    fewer_steps: tuple[int, ...] = (4, 2)
    fewer_solver: Solver = "unipc"
    batch: int = 8
    short: Footage = SHORT
    long: Footage = LONG
    returning: Footage = RETURNING
    compared: tuple[dict[str, Any], ...] = ()
    comparison: Footage = COMPARED

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; make at least one video at a time")
        names = [case.name for case in cases(self)]
        for row in self.compared:
            if names.count(row.get("name", "")) != 1 or not row.get("name"):
                raise ValueError(f"compared: {row} needs a name of its own")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the report.

    changes: of the sampler's settings; None for "truth" and "vae". checkpoint: None is the run's.
    """

    part: str
    name: str
    footage: Footage
    changes: Mapping[str, Any] | None = None
    checkpoint: Path | None = None


SINKS = {
    "both sinks": (1, True),
    "global sink only": (1, False),
    "shot sink only": (0, True),
    "no sinks": (0, False),
}
"""Case -> global sinks, shot sink."""


def cases(spec: EvaluateSpec) -> list[Case]:
    """Every case, in the order of the report."""
    found = [Case("ceilings", "truth", spec.short), Case("ceilings", "vae", spec.short)]
    found += [Case("steps", "shots", spec.short, {})]
    for n in spec.fewer_steps:
        changes = {"steps": n, "solver": spec.fewer_solver}
        found += [Case("steps", f"{n} steps", spec.short, changes)]
    found += [Case("long", "minute", spec.long, {})]
    found += [
        Case("sinks", name, spec.returning, {"global_sinks": first, "shot_sinks": shot})
        for name, (first, shot) in SINKS.items()
    ]
    return found + [_compared(dict(row), spec.comparison) for row in spec.compared]


def _compared(row: dict[str, Any], footage: Footage) -> Case:
    name, folder = row.pop("name", ""), row.pop("checkpoint", None)
    return Case("compared", name, footage, row, None if folder is None else Path(folder))


def check_parts(parts: Sequence[str]) -> None:
    """UserError for a part that does not exist."""
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts: unknown part {part!r}{nearest(part, PARTS)}")


class Workshop:
    """Makes the film of a case; all cases share weights and, where they can, compilations."""

    def __init__(self, checkpoint: Path, sample: Mapping[str, Any]):
        self.checkpoint = checkpoint
        self.weights = weights_of(checkpoint)
        self._sample = dict(sample)
        self._loaded: tuple[str, Pipeline] | None = None

    def settings(self, case: Case) -> SampleSpec | None:
        """All settings of the sampler, or None where nothing is sampled."""
        if case.changes is None:
            return None
        folder = case.checkpoint or self.checkpoint
        return spec_for(folder, {**self._sample, **case.changes})

    def asked(self, case: Case, batch: int) -> dict[str, Any]:
        """Everything the result depends on, in plain JSON."""
        settings = self.settings(case)
        sample = None if settings is None else dataclasses.asdict(settings)
        footage = dataclasses.asdict(case.footage)
        weights = self.weights if case.checkpoint is None else weights_of(case.checkpoint)
        return {"sample": sample, "footage": footage, "batch": batch, "weights": weights}

    def measure(self, case: Case, batch: int, tick: Tick) -> tuple[dict, Example]:
        """The result of one case, and a video of it."""
        if case.name == "truth":
            return measure(truth, case.footage, batch=batch, tick=tick)
        if case.name == "vae":
            again = Reconstruction(load_model(self.checkpoint, "vae"))
            result, example = measure(again, case.footage, batch=batch, tick=tick)
            return {**result, **again.fidelity()}, example
        pipe = self._pipe(case)
        result, example = measure(Sampled(pipe), case.footage, batch=batch, tick=tick)
        return {**result, "bytes": _resident(pipe)}, example

    def _pipe(self, case: Case) -> Pipeline:
        """A pipeline with the case's settings; one is kept, for cases that load the same."""
        folder, changes = case.checkpoint or self.checkpoint, dict(case.changes or {})
        loading = {key: changes.pop(key) for key in LOADED_WITH if key in changes}
        key = json.dumps([str(folder), loading], sort_keys=True)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # one set of weights in memory at a time
            self._loaded = key, Pipeline.from_checkpoint(folder, **self._sample | loading)
        return self._loaded[1].with_settings(**changes)


def _resident(pipe: Pipeline) -> dict[str, int]:
    """Bytes of the DiT, and of a video's keys and values (with guidance both halves)."""
    cache = jax.eval_shape(lambda: pipe.cache(1, pipe.spec.size))
    return {"dit": sum(resident_bytes(pipe.params).values()), "cache": cache.nbytes}


def evaluate(
    spec: EvaluateSpec,
    checkpoint: Path,
    out: Path,
    *,
    parts: Sequence[str] = PARTS,
    about: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Measures the cases of `parts` that `out` does not hold yet, and writes the report.

    Writes report.json after every case, then report.md, rates.png and a strip of frames per case.
    A case is measured again when anything it depends on has changed.

    Raises UserError for a bad checkpoint, unknown parts, or a report.json that is something else.
    """
    check_parts(parts)
    workshop, path = Workshop(checkpoint, spec.sample), out / "report.json"
    report = read_report(path)
    report["about"] = {"checkpoint": str(checkpoint), "weights": workshop.weights, **about}
    all_cases = cases(spec)
    wanted = [case for case in all_cases if case.part in parts]
    asked = {case.name: workshop.asked(case, spec.batch) for case in wanted}
    for case in wanted:
        if is_done(report, case.name, asked[case.name]):
            continue
        result, example = workshop.measure(case, spec.batch, progress(case.name))
        report["cases"][case.name] = {"asked": asked[case.name], **result}
        write_strip(out / f"{case.name.replace(' ', '_')}.png", example)
        write_report(path, report)
    order = [case.name for case in all_cases if case.name in report["cases"]]
    report["cases"] = {name: report["cases"][name] for name in order}
    write_report(path, report)
    (out / "report.md").write_text(markdown(report))
    chart(report, out / "rates.png")
    return report
