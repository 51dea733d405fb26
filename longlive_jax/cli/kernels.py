"""`longlive kernels check --chip=sm_100a [--kernel=NAME ...] [--no-interpret] [--json]`.

`longlive kernels prove` runs the kernels on this machine's GPU (`longlive help kernels prove`).

Compiles every Pallas kernel for a GPU that need not be present, runs it in the interpreter, and
reports its instructions and resources, and the share of the chip's limit that a model gives it.
Exits with code 1 if a kernel does not compile, spills registers, lacks the instructions it is
written for, exceeds the chip's memory or registers, breaks another rule of the hardware, or gives
wrong results in the interpreter. What could not be run is reported, and is no failure.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError, nearest

ACTIONS = ("check", "prove")
NUMBERS = {"shared": "smem_bytes", "model": "model_share"}
"""Table column -> key of a row."""


def main(argv: Sequence[str]) -> int:
    """Prints the table, or with --json a list of rows."""
    if "prove" in argv:
        from longlive_jax.cli.prove import main as prove

        return prove([word for word in argv if word != "prove"])
    parser = Parser("kernels", __doc__ or "")
    parser.add_argument("what", help=", ".join(ACTIONS))
    parser.add_argument(
        "--chip", required=True, help="sm_100a (GB200, B200) or sm_90a (H200, H100)"
    )
    parser.add_argument("--kernel", action="append", help="only this kernel; may be repeated")
    parser.add_argument("--no-interpret", action="store_true", help="only compile")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args(argv)
    if args.what not in ACTIONS:
        raise UserError(f"kernels: unknown command {args.what!r}{nearest(args.what, ACTIONS)}")
    from longlive_jax.bench.kernels import check
    from longlive_jax.cli.progress import ProgressBars

    with ProgressBars() as bars:
        rows = check(args.chip, args.kernel, interpret=not args.no_interpret, ticks=bars.begin)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)
    return int(any(row["failures"] for row in rows))


def show(rows: list[dict[str, Any]]) -> None:
    """Prints one line per kernel, then the failures."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(
        Column("kernel", no_wrap=True),
        Column("instr."),
        *(Column(name, justify="right", no_wrap=True) for name in NUMBERS),
        Column("state", no_wrap=True),
    )
    for row in rows:
        names = sorted({name.partition(".")[0] for name in row["instructions"]})
        numbers = (row[key] for key in NUMBERS.values())
        table.add_row(
            row["kernel"],
            "\n".join(names),
            *(_cell(x) for x in numbers),
            state(row).replace(f" for {row['chip']}", "").replace(", ", "\n"),
        )
    console = Console()
    console.print(table)
    for text in _not_run(rows):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    for row in rows:
        for text in row["failures"]:
            console.print(f"{row['kernel']}: {text}", highlight=False, markup=False)


def _not_run(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line per reason for which kernels were not interpreted although that was requested."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["not_run"] not in (None, "not requested"):
            reasons.setdefault(row["not_run"], []).append(row["kernel"])
    for reason, names in reasons.items():
        yield f"not interpreted: {reason} ({', '.join(names)})"


def _cell(number: float | None) -> str:
    """A number of the table; shares are in percent."""
    if number is None:
        return ""
    return f"{100 * number:.0f} %" if isinstance(number, float) else str(number)


def state(row: dict[str, Any]) -> str:
    """The state of a kernel: any of "interpreted", "compiled for ..." and "run on ..."."""
    words = ["interpreted"] if row["interpreted"] else []
    words += [f"compiled for {row['chip']}"] if row["compiled"] else []
    words += [f"run on {row['executed_on']}"] if row["executed_on"] else []
    return ", ".join(words) or "nothing"
