"""`longlive evaluate --config=configs/small_world.py:evaluate [--checkpoint=DIR] [--out=DIR]`."""

from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.app import Parser, take_config
from longlive_jax.spec import build, reject_unknown


def main(argv: Sequence[str]) -> int:
    """Samples held-out scripts, judges them, and writes report.{json,md}, rates.png and strips.

    What `--out` already holds is not measured again, so an interrupted run goes on where it was.
    """
    config, rest = take_config(argv, default="configs/small_world.py:evaluate")
    parser = Parser("evaluate", __doc__ or "")
    parser.add_argument("--checkpoint", help="default: the built-in one")
    parser.add_argument("--out", default="out/evaluation", help="folder of the report")
    parser.add_argument("--parts", default="", help="of ceilings,steps,long,sinks,compared")
    args = parser.parse_args(rest)
    settings = config.to_dict()
    reject_unknown(settings, ("evaluate",), "config")

    from longlive_jax.bench.timing import machine
    from longlive_jax.cli.progress import ShareBars
    from longlive_jax.io.builtin import builtin_checkpoint
    from longlive_jax.io.video import check_writable
    from longlive_jax.small_world.cases import PARTS, EvaluateSpec, check_parts, evaluate
    from longlive_jax.small_world.report import judgements

    spec = build(EvaluateSpec, settings.get("evaluate") or {}, path="config.evaluate")
    parts = [part for part in args.parts.split(",") if part] or list(PARTS)
    check_parts(parts)
    checkpoint = Path(args.checkpoint) if args.checkpoint else builtin_checkpoint()
    out = check_writable(args.out)
    with ShareBars() as bars:
        report = evaluate(spec, checkpoint, out, parts=parts, about=machine(), progress=bars.begin)
    print((out / "report.md").read_text())
    missed = [
        f"{case}: {key} {value:.3g} < {bar:g}"
        for case, key, value, bar, reached in judgements(report)
        if not reached
    ]
    print("Below the bar: " + "; ".join(missed) if missed else "No bar is missed.")
    print(out / "report.md")
    return 0
