"""`longlive kernels check --chip=sm_100a [--kernel=NAME ...] [--no-interpret] [--json]`.

Compiles every Pallas kernel for a GPU that need not be present, runs it in the interpreter, and
reports its instructions and resources. Exits with code 1 if a kernel does not compile, spills
registers, lacks the instructions it is written for, exceeds the chip's memory, or gives wrong
results in the interpreter.
"""

import json
from collections.abc import Sequence
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError, nearest

ACTIONS = ("check",)
NUMBERS = {"spills": "spill_bytes", "regs": "registers", "shared": "smem_bytes"}
"""Table column -> key of a row."""


def main(argv: Sequence[str]) -> int:
    """Prints the table, or with --json a list of rows."""
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
        "instructions",
        *(Column(name, justify="right") for name in NUMBERS),
        "state",
    )
    for row in rows:
        names = sorted({".".join(name.split(".")[:3]) for name in row["instructions"]})
        numbers = (row[key] for key in NUMBERS.values())
        table.add_row(
            row["kernel"],
            "\n".join(names),
            *("" if x is None else str(x) for x in numbers),
            state(row),
        )
    console = Console()
    console.print(table)
    for row in rows:
        for text in row["failures"]:
            console.print(f"{row['kernel']}: {text}", highlight=False, markup=False)


def state(row: dict[str, Any]) -> str:
    """The state of a kernel: any of "interpreted", "compiled for ..." and "run on ..."."""
    words = ["interpreted"] if row["interpreted"] else []
    words += [f"compiled for {row['chip']}"] if row["compiled"] else []
    words += [f"run on {row['executed_on']}"] if row["executed_on"] else []
    return ", ".join(words) or "nothing"
