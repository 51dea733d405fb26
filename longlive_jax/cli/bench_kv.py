"""`longlive bench kv [--checkpoint=DIR] [--chunks=5] [--json]`.

What keys and values in NVFP4 cost: the error of attention's output and bytes, for every smoothing
of keys, on keys with outlier channels and on those of a model in mid-video.
"""

from collections.abc import Sequence
from typing import Any

from longlive_jax.cli.bench_spec import Benchmark

HELP = {
    "checkpoint": "of the model; default: the built-in one",
    "chunks": "of the video that fill the cache",
    "tokens": "of a synthetic chunk",
    "heads": "of synthetic attention",
    "width": "channels of a synthetic head; a multiple of 16",
    "outliers": "channels of a head that are outliers",
}


def main(argv: Sequence[str]) -> int:
    """Measures, prints a table or JSON, writes JSON to --out."""
    from longlive_jax.bench.kv_quant import KVSpec, bench_kv
    from longlive_jax.io.builtin import builtin_checkpoint

    about, defaults = __doc__ or "", {"checkpoint": str(builtin_checkpoint())}
    return Benchmark("kv", about, KVSpec, HELP, bench_kv, show, defaults).main(argv)


def show(report: dict[str, Any]) -> None:
    """One table a kind of keys."""
    from rich.console import Console
    from rich.table import Table

    kinds = list(next(iter(report["smoothing"].values())))
    for kind in kinds:
        table = Table("smoothing", "error, keys", "keys and values", "bytes", "x less", title=kind)
        for name, row in report["smoothing"].items():
            found = row[kind]
            table.add_row(
                name,
                f"{found['keys_error']:.2%}",
                f"{found['keys_and_values_error']:.2%}",
                f"{found['bytes_per_token_and_head']:.1f}",
                f"{found['times_less_than_bfloat16']:.2f}",
            )
        Console().print(table)
