"""Writes the tables of docs/kernels.md from what `longlive kernels check` counts.

    python -m longlive_jax.bench.kernels_page

compiles every kernel for both chips, stores the rows in `TABLE`, and replaces the part of the page
between its markers. With `--page` it only writes the page from the stored rows.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longlive_jax.bench import calibration
from longlive_jax.planning.kernel_model import attention_share

TABLE = Path(__file__).with_name("results") / "compiled_kernels.json"
"""Rows of `bench.kernels.check` for both chips, without interpretation."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
MARKERS = "<!-- {}: begin -->", "<!-- {}: end -->"
"""Around the generated part of a name: "kernels" and "calibration"."""
PEAK = 989
"""Dense bfloat16 TFLOP/s of an H100 by its data sheet."""
MOST_SPILLED = 2048
"""Bytes of spills beyond which a kernel is outside the model."""
STATES = ("interpreted", "not_run", "executed_on")
"""Keys of a row that do not come from compiling."""


def main(argv: list[str]) -> int:
    """Arguments: nothing, or `--page`."""
    if argv != ["--page"]:
        TABLE.write_text(json.dumps(compiled_rows(), indent=1) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), json.loads(TABLE.read_text())))
    return 0


def compiled_rows() -> list[dict[str, Any]]:
    """The rows of all kernels on both chips, as compiled here."""
    from longlive_jax.bench.kernels import ARCHITECTURES, check

    rows = [row for chip in ARCHITECTURES for row in check(chip, interpret=False)]
    return [{key: x for key, x in row.items() if key not in STATES} for row in rows]


def with_tables(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with its generated parts replaced: the tables of `rows`, and the calibration."""
    kernels = "\n".join([*_resources(rows), "", *_steps(rows), "", *_failures(rows)])
    measured = json.loads(calibration.TABLE.read_text())
    parts = {"kernels": kernels, "calibration": "\n".join(_calibration(measured))}
    for name, text in parts.items():
        begin, end = (marker.format(name) for marker in MARKERS)
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def _calibration(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| call | spills | measured | share measured | share modelled |"
    yield "|---|---|---|---|---|"
    for row in rows:
        share = attention_share(row["kernels"], "sm_90a", useful=row["useful"], width=row["width"])
        outside = " (outside the model)" if row["spilled_bytes"] > MOST_SPILLED else ""
        yield (
            f"| {row['case']} | {_number(row['spilled_bytes'])} bytes | "
            f"{row['measured_tflops']:.0f} TFLOP/s | {100 * row['measured_tflops'] / PEAK:.0f} % | "
            f"{100 * share:.0f} %{outside} |"
        )


def _resources(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "Counted in the compiled code:"
    yield ""
    yield "| kernel | chip | instructions | registers asked of the pool | shared memory | spills |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        names = sorted({".".join(name.split(".")[:3]) for name in row["instructions"]})
        instructions = ", ".join(f"`{name}`" for name in names)
        asked = f"{_number(row['registers_asked'])} of {_number(row['register_pool'])}"
        yield (
            f"| `{row['kernel']}` | {row['chip']} | {instructions} | {asked} | "
            f"{_number(row['smem_bytes'])} | {_number(row['spill_bytes'])} |"
        )


def _steps(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "Cycles of one step, counted (stalls, time and share are modelled):"
    yield ""
    yield (
        "| kernel | products | shared memory | exponentials | issue | stalls | time | "
        "share of the limit |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        causes = ("tensor", "smem", "softmax", "issue", "stall", "step")
        cycles = " | ".join(_number(row[f"{cause}_cycles"]) for cause in causes)
        share = row["model_share"]
        kind = "bf16" if row["kernel"].startswith("attention") else "FP4"
        limit = kind if row["step_cycles"] is not None else "bandwidth"
        text = "–" if share is None else f"{100 * share:.0f} % of {limit}"
        yield f"| `{row['kernel']}` | {cycles} | {text} |"


def _failures(rows: list[dict[str, Any]]) -> Iterator[str]:
    broken = [(row["kernel"], text) for row in rows for text in row["failures"]]
    if not broken:
        yield "Every kernel keeps the rules below."
        return
    yield "These kernels break a rule below and must not be run:"
    yield ""
    for name, text in broken:
        yield f"* `{name}`: {text}"


def _number(x: int | None) -> str:
    return "–" if x is None else f"{x:,}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
