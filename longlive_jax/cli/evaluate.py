"""`longlive evaluate [--config=small_world:evaluate] [--checkpoint=DIR] [--out=DIR]`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.effects import note_evaluate
from longlive_jax.cli.options import parse_command
from longlive_jax.spec import build, reject_unknown

if TYPE_CHECKING:
    from longlive_jax.small_world.cases import EvaluateSpec


def main(argv: Sequence[str]) -> int:
    """Samples held-out scripts, scores them, and writes report.{json,md}, pictures and strips.

    Cases that are already in the report in `--out` are not measured again, so the same command
    resumes an interrupted run.
    """
    # Parse the command line before the slow imports.
    parser = Parser("evaluate", __doc__ or "")
    parser.add_argument("--checkpoint", help="checkpoint directory (default: the built-in model)")
    parser.add_argument("--out", default="out/evaluation", help="directory of the report")
    parser.add_argument(
        "--parts",
        default="",
        help="comma-separated subset of ceilings,steps,long,sinks,compared and of the recipe's "
        "tables (default: config.evaluate.parts, which is all but the tables)",
    )
    command = parse_command(parser, argv, "evaluate", default="small_world:evaluate")
    settings, args = command.settings, command.args
    reject_unknown(settings, ("evaluate",), "config")

    from longlive_jax.bench.timing import machine
    from longlive_jax.cli.progress import ProgressBars
    from longlive_jax.io.paths import check_writable
    from longlive_jax.small_world.cases import EvaluateSpec, evaluate, select_cases

    # Measure the cases that the report lacks.
    spec = build(EvaluateSpec, settings.get("evaluate") or {}, path="config.evaluate")
    parts = [part for part in args.parts.split(",") if part] or list(spec.parts)
    select_cases(spec, parts)
    note_evaluate(command.given, spec, parts)
    checkpoint = _complete_checkpoint(args.checkpoint, spec, parts)
    out = check_writable(args.out)
    with ProgressBars() as progress:
        report = evaluate(
            spec, checkpoint, out, parts=parts, about=machine(), progress=progress.begin
        )
    _print_report(report, out)
    return 0


def _print_report(report: Mapping[str, Any], out: Path) -> None:
    """Prints the tables and the missed targets."""
    from longlive_jax.small_world.report import metric_name, target_results
    from longlive_jax.small_world.tables import bar_line, bar_results

    print((out / "report.md").read_text())
    missed = [
        f"{case}: {metric_name(key)} {value:.3g} < {target:g}"
        for case, key, value, target, is_met in target_results(report)
        if not is_met
    ]
    bars_missed = [bar_line(bar) for _, bar in bar_results(report) if not bar["met"]]
    missed += dict.fromkeys(bars_missed)  # two tables may have the same bar
    print("Targets missed: " + "; ".join(missed) if missed else "All targets met.")
    print(out / "report.md")


def _complete_checkpoint(name: str | None, spec: "EvaluateSpec", parts: Sequence[str]) -> Path:
    """The checkpoint directory to evaluate.

    Raises UserError if it, or another one that the selected cases sample from, is not complete.
    """
    from longlive_jax.io.builtin import find_checkpoint
    from longlive_jax.io.completeness import require_components
    from longlive_jax.small_world.cases import select_cases

    checkpoint = find_checkpoint(name)
    selected = [case.checkpoint or checkpoint for case in select_cases(spec, parts)]
    for folder in dict.fromkeys((checkpoint, *selected)):
        require_components(folder)
    return checkpoint
