"""Prints benchmark reports as text and tables."""

from typing import Any

Report = dict[str, Any]


def show_nested(report: Any, name: str = "", depth: int = 0) -> None:
    """Prints a nested report as indented lines."""
    if not isinstance(report, dict):
        print(f"{'  ' * (depth - 1)}{name}: {report}")
        return
    if name:
        print(f"{'  ' * (depth - 1)}{name}:")
    for key, value in report.items():
        show_nested(value, key.replace("_", " "), depth + 1)


def show_encode(report: Report) -> None:
    """A table of encoding costs by clip length and method."""
    from longlive_jax.bench.encode_cost import cost_table

    print(cost_table(report))


def show_attention(report: Report) -> None:
    """Prints the workload, a table by implementation, and the implementations that did not run."""
    from rich.console import Console

    console, spec, pairs = Console(), report["spec"], report["pairs"]
    product = report["matmul_flop_per_second"][spec["dtype"]]
    console.print(
        f"{report['machine']['device']}: {spec['seconds']:g} s of video, {report['tokens']} tokens "
        f"in chunks of {spec['chunk']} frames, {spec['heads']} heads of {spec['width']}, "
        f"{spec['dtype']}; {pairs['visible']:.1%} of all pairs are visible, {pairs['visited']:.1%} "
        f"are in tiles of {pairs['tile']} that a kernel visits; one matrix product runs at "
        f"{format_rate(product)}.",
        highlight=False,
    )
    console.print(_attention_table(report))
    _show_not_run(console, report)


def _attention_table(report: Report):
    from rich.table import Table

    results = report["implementations"]
    base = "flex_attention" if "flex_attention" in results else "xla"
    table = Table("attention", "pass", "seconds", "useful work", "of matmul", f"x {base}")
    for name, row in results.items():
        for part in ("forward", "backward", "forward_backward"):
            ratio = report["times_as_fast"][name].get(base)
            table.add_row(
                name if part == "forward" else "",
                "both" if part == "forward_backward" else part,
                f"{row['seconds'][part]['median']:.4g}",
                format_rate(row["flop_per_second"][part]),
                f"{row['share_of_matmul'][part]:.1%}",
                "" if ratio is None else f"{ratio[part]:.2f}",
            )
        table.add_section()
    return table


def show_nvfp4(report: Report) -> None:
    """Prints the measured limits, a table by operation, and the operations that did not run."""
    from rich.console import Console

    if "limits" not in report:
        _show_linear_bytes(report)
        return
    console, limits, spec = Console(), report["limits"], report["spec"]
    console.print(
        f"{report['machine']['device']}: {format_rate(limits['bytes'], 'B/s')} copying, "
        f"{format_rate(limits['flop_bfloat16'], 'FLOP/s')} in bfloat16 products and "
        f"{format_rate(limits['flop_float32'], 'FLOP/s')} in float32; "
        f"{spec['rows']} x {spec['inputs']} x {spec['outputs']}, "
        f"{spec['slots']} slots of {spec['tokens']} tokens.",
        highlight=False,
    )
    console.print(_nvfp4_table(report))
    _show_not_run(console, report)


def _show_linear_bytes(report: Report) -> None:
    """Prints the counted bytes of a linear by implementation and phase, and what "auto" takes."""
    from rich.console import Console
    from rich.table import Table

    columns = ("inference", "forward", "backward", "training", "weights")
    table = Table("by", *columns, title=f"MB of a linear {report['size']} on {report['chip']}")
    for path, counted in report["bytes"].items():
        cells = (f"{counted[name] / 1e6:.0f}" if name in counted else "" for name in columns)
        table.add_row(path, *cells)
    console, auto = Console(), report["auto"]
    console.print(table)
    console.print(
        f"Counted in compiled programs. auto takes {auto['now']} now, and {auto['proven']} where "
        "`longlive kernels prove` found the kernels proven and faster.",
        highlight=False,
    )


def _nvfp4_table(report: Report):
    from rich.table import Table

    table = Table("operation", "by", "ms", "useful work", "of limit", "x jnp", "x bfloat16")
    for name, operation in report["operations"].items():
        unit = {"bytes": "B/s", "flop": "FLOP/s"}[operation["unit"]]
        for i, (implementation, row) in enumerate(operation["ways"].items()):
            ratios = (row.get(f"times_{base}") for base in ("reference", "bfloat16"))
            table.add_row(
                "" if i else name,
                implementation,
                f"{1e3 * row['seconds']['median']:.4g}",
                format_rate(row["per_second"], unit),
                f"{row['share_of_limit']:.1%}",
                *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            )
        table.add_section()
    return table


def show_kv(report: Report) -> None:
    """Prints a table of errors and bytes by smoothing for every kind of keys."""
    from rich.console import Console
    from rich.table import Table

    head = ("smoothing", "error, keys", "keys and values", "bytes", "x less than bf16")
    for kind in next(iter(report["smoothing"].values())):
        table = Table(*head, title=kind)
        for name, row in report["smoothing"].items():
            cells = row[kind]
            table.add_row(
                name,
                f"{cells['keys_error']:.2%}",
                f"{cells['keys_and_values_error']:.2%}",
                f"{cells['bytes_per_token_and_head']:.1f}",
                f"{cells['times_less_than_bfloat16']:.2f}",
            )
        Console().print(table)


def format_rate(per_second: float, unit: str = "FLOP/s") -> str:
    """A rate in T, G or M of the unit, with three digits."""
    for letter, size in (("T", 1e12), ("G", 1e9)):
        if per_second >= size:
            return f"{per_second / size:.3g} {letter}{unit}"
    return f"{per_second / 1e6:.3g} M{unit}"


def _show_not_run(console: Any, report: Report) -> None:
    for name, reason in report["not_run"].items():
        console.print(f"{name}: not run: {reason}", highlight=False, markup=False)
