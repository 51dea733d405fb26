"""`longlive bench attention [--seconds=16] [--chunk=8] [--heads=24] [--width=128] [--json]`.

Times every implementation of attention that runs here on teacher forcing, and PyTorch's compiled
flex_attention where PyTorch and a CUDA device are. Sizes not given are those of a 16-second video
of the 5B model on a GPU, and small ones elsewhere.
"""

from collections.abc import Sequence
from typing import Any

from longlive_jax.cli.bench_spec import Benchmark, rate

HELP = {
    "seconds": "length of the video; 6 latent frames a second",
    "chunk_frames": "latent frames of a chunk",
    "rows": "tokens in a column of a frame",
    "columns": "tokens in a row of a frame",
    "heads": "attention heads",
    "width": "channels of a head",
    "dtype": "bfloat16 or float32",
    "repeats": "calls that are timed",
    "product": "size of the matrix product whose rate is the measure",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark, prints a table or JSON, writes JSON to --out."""
    from longlive_jax.bench.attention import AttentionSpec, bench_attention, default_settings

    about, defaults = __doc__ or "", default_settings()
    bench = Benchmark("attention", about, AttentionSpec, HELP, bench_attention, show, defaults)
    return bench.main(argv)


def show(report: dict[str, Any]) -> None:
    """The report as a table, with what it was measured on above and what is missing below."""
    from rich.console import Console

    console, spec, pairs = Console(), report["spec"], report["pairs"]
    product = report["matmul_flop_per_second"][spec["dtype"]]
    console.print(
        f"{report['machine']['device']}: {spec['seconds']:g} s of video, {report['tokens']} tokens "
        f"in chunks of {spec['chunk']} frames, {spec['heads']} heads of {spec['width']}, "
        f"{spec['dtype']}; {pairs['visible']:.1%} of all pairs are visible, {pairs['visited']:.1%} "
        f"are in tiles of {pairs['tile']} that a kernel visits; one matrix product runs at "
        f"{rate(product)}.",
        highlight=False,
    )
    console.print(_table(report))
    for name, why in report["not_run"].items():
        console.print(f"{name}: not run: {why}", highlight=False, markup=False)


def _table(report: dict[str, Any]):
    from rich.table import Table

    found = report["implementations"]
    base = "flex_attention" if "flex_attention" in found else "xla"
    table = Table("attention", "pass", "seconds", "useful work", "of matmul", f"x {base}")
    for name, row in found.items():
        for part in ("forward", "backward", "forward_backward"):
            ratio = report["times_as_fast"][name].get(base)
            table.add_row(
                name if part == "forward" else "",
                "both" if part == "forward_backward" else part,
                f"{row['seconds'][part]['median']:.4g}",
                rate(row["flop_per_second"][part]),
                f"{row['share_of_matmul'][part]:.1%}",
                "" if ratio is None else f"{ratio[part]:.2f}",
            )
        table.add_section()
    return table
