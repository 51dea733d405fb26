"""Times of every kernel of this machine's GPU and of its peers, and the table of their work.

Both follow from the kernels' records. `longlive kernels prove` times a kernel only after it was
compared with its oracle; this benchmark does not check results.
"""

import dataclasses
from typing import Any

import jax

from longlive_jax.bench.prove_kernel import chip_of, jitted, limit, time_peers, timed
from longlive_jax.bench.timing import machine
from longlive_jax.spec import UserError, nearest
from pallas_kernels import tuned
from pallas_kernels.catalog import catalog
from pallas_kernels.dispatch import capability, device_kind, platform
from pallas_kernels.kernel import CHIPS, Kernel, abstract


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelTimesSpec:
    """What is timed.

    Attributes:
      kernel: name of the only kernel; empty for all of this machine's GPU.
    """

    kernel: str = ""


def bench_kernels(spec: KernelTimesSpec) -> dict[str, Any]:
    """Times kernels and peers at the 5B model's sizes; returns a JSON-serializable report.

    `not_run` holds the reasons why kernels were skipped. Raises UserError for an unknown kernel.
    """
    if spec.kernel and spec.kernel not in catalog():
        hint = nearest(spec.kernel, catalog())
        raise UserError(f"bench kernels: no kernel {spec.kernel!r}{hint}")
    chip = CHIPS.get(capability()) if platform() == "gpu" else None
    times: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for name, kernel in catalog().items():
        if spec.kernel not in ("", name):
            continue
        if chip not in kernel.chips:
            skipped[name] = f"it is for {' and '.join(kernel.chips)}, this is {chip or platform()}"
            continue
        times[name] = _times(kernel)
    return {"machine": machine(), "kernels": times, "not_run": skipped}


def _times(kernel: Kernel) -> dict[str, Any]:
    arguments = jax.block_until_ready(kernel.production())
    seconds = timed(jitted(kernel.run, arguments, **tuned.tiles(kernel.name, device_kind())))
    least = limit(kernel.cost(*arguments), chip_of(device_kind()))
    times = {"seconds": seconds, "limit_seconds": least, "share": least and least / seconds}
    return times | {"peers": time_peers(kernel, arguments)}


def work_table() -> str:
    """A Markdown table of all records: operation, chip, bytes and operations of a call, counted."""
    lines = [
        "| kernel | operation | chip | MB | GFLOP | exponentials, millions | tiles searched |",
        "|---|---|---|---|---|---|---|",
    ]
    for kernel in catalog().values():
        cost = kernel.cost(*abstract(kernel.production))
        spaces = (f"{name} {', '.join(map(str, x))}" for name, x in kernel.tiles.items())
        cells = (
            f"`{kernel.name}`",
            kernel.op,
            ", ".join(kernel.chips),
            f"{cost.bytes / 1e6:,.1f}",
            f"{cost.flops / 1e9:,.1f}",
            f"{cost.exponentials / 1e6:,.1f}",
            "; ".join(spaces) or "none",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
