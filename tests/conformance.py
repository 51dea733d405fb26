"""Checks this project's functions against every golden file of a folder.

    python tests/conformance.py DIR          # a table, one row per case
    python tests/conformance.py DIR --json   # a list of {file, case, error, tolerance, status}

Status is `pass`, `fail` or `not implemented`; `conformance_cases/rows.py` defines the error. The
exit code is 1 if a case failed, 2 if there is nothing to run, else 0. Reasons for failures, and the
kinds that DIR has no file of, go to stderr.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent) if str(folder) not in sys.path]

import jax  # noqa: E402  (the lines above put the project on the path)
from conformance_cases import KINDS, cases_of, golden_files, kind_of  # noqa: E402
from conformance_cases.rows import FAIL, Row, broken, run  # noqa: E402


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of one golden file, each as soon as its case has run."""
    try:
        cases = cases_of(path)
    except Exception as problem:  # a broken file becomes a row, so that the others still run
        yield broken(path.name, "file", problem)
        return
    if not cases:
        yield broken(path.name, "file", ValueError("this file has no case that is known here"))
    for case in cases:
        yield run(path.name, case)


def line(row: Row) -> str:
    """One line of the table."""
    error = "-" if row.error is None else f"{row.error:.2e}"
    tolerance = "-" if row.tolerance is None else f"{row.tolerance:.0e}"
    return f"{row.file:<26} {row.case:<50} {error:>9} {tolerance:>9}  {row.status}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the golden files of one folder and returns the exit code."""
    parser = argparse.ArgumentParser("conformance.py", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of golden files")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    options = parser.parse_args(arguments)
    files = golden_files(options.folder)
    if not files:
        problem = "has no golden files" if options.folder.is_dir() else "is not a folder"
        print(f"conformance: {options.folder} {problem} (*.npz, facts.json)", file=sys.stderr)
        return 2
    if not options.json:
        print(f"{'file':<26} {'case':<50} {'error':>9} {'tolerance':>9}  status")
    rows = []
    with jax.default_matmul_precision("highest"):
        for row in (row for path in files for row in rows_of(path)):
            rows.append(row)
            if not options.json:
                print(line(row), flush=True)
            if row.status == FAIL:
                print(
                    f"{row.file}, {row.case}: {row.reason or 'error above tolerance'}",
                    file=sys.stderr,
                )
    if absent := sorted(set(KINDS) - set(map(kind_of, files))):
        print(f"conformance: kinds without a file in DIR: {', '.join(absent)}", file=sys.stderr)
    if options.json:
        print(json.dumps([row.public() for row in rows], indent=1))
    return int(any(row.status == FAIL for row in rows))


if __name__ == "__main__":
    sys.exit(main())
