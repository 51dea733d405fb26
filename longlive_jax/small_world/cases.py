"""The cases of an evaluation, and the resumable run over them."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from longlive_jax.io.checkpoint import weights_fingerprint
from longlive_jax.io.models import load_model
from longlive_jax.quant.packed import resident_bytes
from longlive_jax.sampling.pipeline import Pipeline
from longlive_jax.sampling.settings import LOADED_WITH, SampleSpec, SolverName, spec_for
from longlive_jax.small_world.evaluator import (
    EvaluationSet,
    Example,
    SampledVideos,
    VAEReconstruction,
    VideoProgress,
    ground_truth,
    measure,
)
from longlive_jax.small_world.report import (
    is_done,
    markdown,
    read_report,
    write_chart,
    write_report,
    write_strip,
)
from longlive_jax.spec import UserError, nearest

PARTS = ("ceilings", "steps", "long", "sinks", "compared")

type StartCase = Callable[[str], VideoProgress]
"""Called with the name of a case when it starts; returns the callback for its progress."""


SHORT = EvaluationSet()
LONG = EvaluationSet(least_shots=560, chunks=91, shot_chunks=(8, 30), shots=(4, 8), seed=1)
"""Videos of 91 chunks, which are 60.5 seconds.

With 96 videos, the last-to-first ratio of caption accuracies is known to ± 0.03.
"""
RETURNING = EvaluationSet(least_shots=120, chunks=30, shot_chunks=(5, 9), cast=2, seed=2)
COMPARED = EvaluationSet(least_shots=300, seed=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """Settings of an evaluation.

    Attributes:
      sample: fields of `SampleSpec` that override the checkpoint's.
      fewer_steps: numbers of sampling steps to measure in addition to the checkpoint's own.
      fewer_solver: solver for `fewer_steps`. A deterministic one is better there: few steps do
        not remove the noise that a stochastic solver adds.
      batch: videos generated together.
      short: evaluation set of parts `ceilings` and `steps`.
      long: evaluation set of part `long`, for drift.
      returning: evaluation set of part `sinks`, with long shots and few subjects, which return.
      compared: cases of part `compared`; each has a `name`, fields of `SampleSpec`, and
        optionally a `checkpoint` with other weights.
      comparison: evaluation set of part `compared`.
    """

    sample: dict[str, Any] = dataclasses.field(default_factory=dict)
    fewer_steps: tuple[int, ...] = (4, 2)
    fewer_solver: SolverName = "unipc"
    batch: int = 8
    short: EvaluationSet = SHORT
    long: EvaluationSet = LONG
    returning: EvaluationSet = RETURNING
    compared: tuple[dict[str, Any], ...] = ()
    comparison: EvaluationSet = COMPARED

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"evaluate.batch must be >= 1, got {self.batch}")
        names = [case.name for case in cases(self)]
        for row in self.compared:
            if names.count(row.get("name", "")) != 1 or not row.get("name"):
                raise ValueError(f"evaluate.compared: {row} needs a unique name")


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the report.

    Attributes:
      part: part of the evaluation, one of PARTS.
      name: unique name.
      videos: evaluation set.
      changes: fields of `SampleSpec` that differ from the run's; None if nothing is sampled.
      checkpoint: checkpoint with other weights; None for the run's checkpoint.
    """

    part: str
    name: str
    videos: EvaluationSet
    changes: Mapping[str, Any] | None = None
    checkpoint: Path | None = None


SINKS = {
    "both sinks": (1, True),
    "global sink only": (1, False),
    "shot sink only": (0, True),
    "no sinks": (0, False),
}
"""Case name -> (number of global sinks, whether there is a shot sink)."""


def cases(spec: EvaluateSpec) -> list[Case]:
    """All cases in the order of the report."""
    rows = [Case("ceilings", "truth", spec.short), Case("ceilings", "vae", spec.short)]
    rows += [Case("steps", "shots", spec.short, {})]
    for n in spec.fewer_steps:
        changes = {"steps": n, "solver": spec.fewer_solver}
        rows += [Case("steps", f"{n} steps", spec.short, changes)]
    rows += [Case("long", "minute", spec.long, {})]
    rows += [
        Case("sinks", name, spec.returning, {"global_sinks": first, "shot_sinks": shot})
        for name, (first, shot) in SINKS.items()
    ]
    return rows + [_compared(dict(row), spec.comparison) for row in spec.compared]


def _compared(row: dict[str, Any], videos: EvaluationSet) -> Case:
    """The case of one entry of `EvaluateSpec.compared`."""
    name, folder = row.pop("name", ""), row.pop("checkpoint", None)
    return Case("compared", name, videos, row, None if folder is None else Path(folder))


def check_parts(parts: Sequence[str]) -> None:
    """Raises UserError if a part does not exist."""
    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts: unknown part {part!r}{nearest(part, PARTS)}")


class CaseRunner:
    """Measures cases; they share weights and, where possible, compiled functions.

    Args:
      checkpoint: checkpoint of the run.
      sample: fields of `SampleSpec` that override the checkpoint's.
    """

    def __init__(self, checkpoint: Path, sample: Mapping[str, Any]):
        self.checkpoint = checkpoint
        self.weights = weights_fingerprint(checkpoint)
        self._sample = dict(sample)
        self._loaded: tuple[str, Pipeline] | None = None

    def settings(self, case: Case) -> SampleSpec | None:
        """Complete sampler settings of a case; None if nothing is sampled."""
        if case.changes is None:
            return None
        folder = case.checkpoint or self.checkpoint
        return spec_for(folder, {**self._sample, **case.changes})

    def dependencies(self, case: Case, batch: int) -> dict[str, Any]:
        """Everything that a case's result depends on, ready for JSON."""
        settings = self.settings(case)
        sample = None if settings is None else dataclasses.asdict(settings)
        videos = dataclasses.asdict(case.videos)
        weights = self.weights if case.checkpoint is None else weights_fingerprint(case.checkpoint)
        return {"sample": sample, "footage": videos, "batch": batch, "weights": weights}

    def measure(self, case: Case, batch: int, on_progress: VideoProgress) -> tuple[dict, Example]:
        """The result of one case, and an example video."""
        if case.name == "truth":
            return measure(ground_truth, case.videos, batch=batch, on_progress=on_progress)
        if case.name == "vae":
            source = VAEReconstruction(load_model(self.checkpoint, "vae"))
            result, example = measure(source, case.videos, batch=batch, on_progress=on_progress)
            return {**result, **source.fidelity()}, example
        pipe = self._pipe(case)
        sampled = SampledVideos(pipe)
        result, example = measure(sampled, case.videos, batch=batch, on_progress=on_progress)
        return {**result, "bytes": _resident(pipe)}, example

    def _pipe(self, case: Case) -> Pipeline:
        """A pipeline with the case's settings; the last one is cached for reuse."""
        folder, changes = case.checkpoint or self.checkpoint, dict(case.changes or {})
        loading = {key: changes.pop(key) for key in LOADED_WITH if key in changes}
        key = json.dumps([str(folder), loading], sort_keys=True)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None  # one set of weights in memory at a time
            self._loaded = key, Pipeline.from_checkpoint(folder, **self._sample | loading)
        return self._loaded[1].with_settings(**changes)


def _resident(pipe: Pipeline) -> dict[str, int]:
    """Bytes of the DiT, and of one video's KV cache (both halves with guidance)."""
    cache = jax.eval_shape(lambda: pipe.engine.cache(1, pipe.spec.size))
    return {"dit": sum(resident_bytes(pipe.engine.params).values()), "cache": cache.nbytes}


def evaluate(
    spec: EvaluateSpec,
    checkpoint: Path,
    out: Path,
    *,
    parts: Sequence[str] = PARTS,
    about: Mapping[str, Any],
    progress: StartCase,
) -> dict[str, Any]:
    """Measures the cases of `parts` that are not in the report yet; writes and returns the report.

    Writes report.json and a strip of frames after every case, and at the end report.md and
    rates.png. A case is measured again if anything that it depends on has changed.

    Args:
      spec: settings.
      checkpoint: directory of the checkpoint to evaluate.
      out: directory of the report.
      parts: parts to evaluate, a subset of PARTS.
      about: facts on the machine for the report's header.
      progress: called at the start of every case.

    Raises:
      UserError: if the checkpoint is invalid, a part is unknown, or report.json is not a report.
    """
    check_parts(parts)
    runner, path = CaseRunner(checkpoint, spec.sample), out / "report.json"
    report = read_report(path)
    report["about"] = {"checkpoint": str(checkpoint), "weights": runner.weights, **about}
    all_cases = cases(spec)
    wanted = [case for case in all_cases if case.part in parts]
    dependencies = {case.name: runner.dependencies(case, spec.batch) for case in wanted}
    for case in wanted:
        if is_done(report, case.name, dependencies[case.name]):
            continue
        result, example = runner.measure(case, spec.batch, progress(case.name))
        report["cases"][case.name] = {"asked": dependencies[case.name], **result}
        write_strip(out / f"{case.name.replace(' ', '_')}.png", example)
        write_report(path, report)
    order = [case.name for case in all_cases if case.name in report["cases"]]
    report["cases"] = {name: report["cases"][name] for name in order}
    write_report(path, report)
    (out / "report.md").write_text(markdown(report))
    write_chart(report, out / "rates.png")
    return report
