"""The cases of an evaluation, and the resumable run over them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.sampling.settings import SolverName
from longlive_jax.small_world.case_runner import Case, CaseRunner
from longlive_jax.small_world.evaluator import EvaluationSet, VideoProgress
from longlive_jax.small_world.report import (
    is_done,
    markdown,
    read_report,
    write_chart,
    write_report,
    write_strip,
)
from longlive_jax.small_world.table_report import write_table_picture
from longlive_jax.small_world.tables import TableSpec, check_tables, table_results, training_cost
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
        optionally a `checkpoint` with other weights, an `adapter` (`PATH` or `PATH:SCALE`) to plug
        in, and a `log`, the work directory of the training whose time and memory the tables state.
      comparison: evaluation set of part `compared`.
      tables: tables of these cases; the name of one in `--parts` selects its rows.
      runs: folder that relative paths in `compared` start from; empty for the working directory.
      parts: what to evaluate unless `--parts` says it: names of PARTS and of tables.
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
    tables: tuple[TableSpec, ...] = ()
    runs: str = ""
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"evaluate.batch must be >= 1, got {self.batch}")
        names = [case.name for case in cases(self)]
        for row in self.compared:
            if names.count(row.get("name", "")) != 1 or not row.get("name"):
                raise ValueError(f"evaluate.compared: {row} needs a unique name")
        check_tables(self.tables, names, PARTS)
        select_cases(self, self.parts)


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
    return rows + [_compared(dict(row), spec) for row in spec.compared]


def _compared(row: dict[str, Any], spec: EvaluateSpec) -> Case:
    """The case of one entry of `EvaluateSpec.compared`."""
    name = row.pop("name", "")
    paths = {key: row.pop(key, None) for key in ("checkpoint", "adapter", "log")}
    checkpoint, adapter, log = (
        None if path is None else Path(spec.runs) / path for path in paths.values()
    )
    plugged = None if adapter is None else str(adapter)
    return Case("compared", name, spec.comparison, row, checkpoint, plugged, log)


def select_cases(spec: EvaluateSpec, parts: Sequence[str]) -> list[Case]:
    """The cases of `parts`, which are names of PARTS and of tables, in the order of the report.

    Raises UserError for a part that does not exist.
    """
    tables = {table.name: table for table in spec.tables}
    known = (*PARTS, *tables)
    for part in parts:
        if part not in known:
            raise UserError(f"parts: unknown part {part!r}{nearest(part, known)}")
    rows = {row for part in parts if part in tables for row in tables[part].rows}
    return [case for case in cases(spec) if case.part in parts or case.name in rows]


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

    Writes report.json and a strip of frames after every case, and at the end report.md and the
    pictures. A case is measured again if anything that it depends on has changed.

    Args:
      spec: settings.
      checkpoint: directory of the checkpoint to evaluate.
      out: directory of the report.
      parts: parts to evaluate, of PARTS and the names of tables.
      about: facts on the machine for the report's header.
      progress: called at the start of every case.

    Raises:
      UserError: if a file is missing or invalid, or a part is unknown.
    """
    # 1. What the cases depend on.
    wanted = select_cases(spec, parts)
    runner, path = CaseRunner(checkpoint, spec.sample), out / "report.json"
    report = read_report(path)
    report["about"] = {"checkpoint": str(checkpoint), "weights": runner.weights, **about}
    dependencies = {case.name: runner.dependencies(case, spec.batch) for case in wanted}
    costs = {case.name: training_cost(case.log) for case in wanted if case.log is not None}
    # 2. The cases that are missing.
    for case in wanted:
        if is_done(report, case.name, dependencies[case.name]):
            continue
        result, example = runner.measure(case, spec.batch, progress(case.name))
        report["cases"][case.name] = {"asked": dependencies[case.name], **result}
        write_strip(out / f"{case.name.replace(' ', '_')}.png", example)
        write_report(path, report)
    # 3. The report.
    for name, cost in costs.items():
        report["cases"][name]["training"] = cost
    _write_outputs(report, spec, out)
    return report


def _write_outputs(report: dict[str, Any], spec: EvaluateSpec, out: Path) -> None:
    """Sorts the cases of a report and adds its tables; writes it and its pictures."""
    order = [case.name for case in cases(spec) if case.name in report["cases"]]
    report["cases"] = {name: report["cases"][name] for name in order}
    results = {table.name: table_results(table, report["cases"]) for table in spec.tables}
    report["tables"] = {name: result for name, result in results.items() if result is not None}
    write_report(out / "report.json", report)
    for name, table in report["tables"].items():
        write_table_picture(table, report["cases"], out / f"{name}.png")
    (out / "report.md").write_text(markdown(report))
    write_chart(report, out / "rates.png")
