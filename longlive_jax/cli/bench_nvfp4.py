"""`longlive bench nvfp4 [--rows=7040] [--inputs=3072] [--outputs=14336] [--json]`.

Times quantizing, unpacking, products, the reading of a packed cache and linears in FP8 and NVFP4,
by every implementation that runs here. Sizes not given are those of the 5B model on a GPU, and
small ones elsewhere.
"""

from collections.abc import Sequence
from typing import Any

from longlive_jax.cli.bench_spec import Benchmark, rate

HELP = {
    "rows": "tokens that meet a matrix",
    "inputs": "of the matrix; a multiple of 16",
    "outputs": "of the matrix",
    "slots": "chunks that are kept packed",
    "tokens": "of a chunk",
    "heads": "attention heads",
    "width": "channels of a head; a multiple of 16",
    "calls": "made before one waits for the device",
    "repeats": "measurements",
    "product": "size of the matrix product whose rate is a limit",
    "copy": "MiB that are copied, for the other limit",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark, prints a table or JSON, writes JSON to --out."""
    from longlive_jax.bench.nvfp4 import NVFP4Spec, bench_nvfp4, default_settings

    about, defaults = __doc__ or "", default_settings()
    return Benchmark("nvfp4", about, NVFP4Spec, HELP, bench_nvfp4, show, defaults).main(argv)


def show(report: dict[str, Any]) -> None:
    """The report as a table, with the limits above and what is missing below."""
    from rich.console import Console

    console, limits, spec = Console(), report["limits"], report["spec"]
    console.print(
        f"{report['machine']['device']}: {rate(limits['bytes'], 'B/s')} copying, "
        f"{rate(limits['flop_bfloat16'], 'FLOP/s')} in bfloat16 products and "
        f"{rate(limits['flop_float32'], 'FLOP/s')} in float32; {spec['rows']} x {spec['inputs']} "
        f"x {spec['outputs']}, {spec['slots']} slots of {spec['tokens']} tokens.",
        highlight=False,
    )
    console.print(_table(report))
    for name, why in report["not_run"].items():
        console.print(f"{name}: not run: {why}", highlight=False, markup=False)


def _table(report: dict[str, Any]):
    from rich.table import Table

    table = Table("operation", "by", "ms", "useful work", "of limit", "x jnp", "x bfloat16")
    for name, operation in report["operations"].items():
        unit = {"bytes": "B/s", "flop": "FLOP/s"}[operation["unit"]]
        for i, (way, row) in enumerate(operation["ways"].items()):
            ratios = (row.get(f"times_{base}") for base in ("reference", "bfloat16"))
            table.add_row(
                "" if i else name,
                way,
                f"{1e3 * row['seconds']['median']:.4g}",
                rate(row["per_second"], unit),
                f"{row['share_of_limit']:.1%}",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
        table.add_section()
    return table
