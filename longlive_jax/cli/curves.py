"""`longlive curves [NAME=]WORKDIR... [--out=FILE.png]`: training curves of several runs."""

from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError


def main(argv: Sequence[str]) -> int:
    """Plots the logged metrics of several runs: one panel per metric, one line per run."""
    parser = Parser("curves", "Training curves of several runs in one figure.")
    parser.add_argument("runs", nargs="+", help="work directories; NAME=DIR sets the label")
    parser.add_argument("--out", default="out/curves.png", type=Path, help="PNG file to write")
    args = parser.parse_args(argv)

    from longlive_jax.io.paths import check_writable
    from longlive_jax.training.metrics import plot_curves, read_records

    runs = {}
    for argument in args.runs:
        name, _, folder = argument.rpartition("=")
        records = read_records(Path(folder) / "metrics.jsonl")
        if not records:
            raise UserError(
                f"{folder}: no metrics.jsonl in this folder; give the --workdir of a training run"
            )
        runs[name or Path(folder).name] = records
    check_writable(args.out.parent)
    plot_curves(runs, args.out)
    print(args.out)
    return 0
