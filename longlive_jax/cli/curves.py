"""`longlive curves [NAME=]WORKDIR... [--out=FILE.png]`: what several trainings logged."""

from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError


def main(argv: Sequence[str]) -> int:
    """Draws the runs' numbers over their steps, one panel a number, one line a run."""
    parser = Parser("curves", "What several trainings logged, in one picture.")
    parser.add_argument("runs", nargs="+", help="work directories, NAME=DIR to name them")
    parser.add_argument("--out", default="out/curves.png", type=Path, help="the PNG")
    args = parser.parse_args(argv)

    from longlive_jax.io.video import check_writable
    from longlive_jax.training.metrics import plot_curves, read_records

    runs = {}
    for word in args.runs:
        name, _, folder = word.rpartition("=")
        records = read_records(Path(folder) / "metrics.jsonl")
        if not records:
            raise UserError(f"{folder}: no metrics.jsonl of a training; give its --workdir")
        runs[name or Path(folder).name] = records
    check_writable(args.out.parent)
    plot_curves(runs, args.out)
    print(args.out)
    return 0
