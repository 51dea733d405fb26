"""`longlive bench balanced [--sp=4] [--chunks=8] [--json]`.

Times an update, from frames to gradient, by Balanced SP and by the naive cut of the sequence; on a
machine without accelerators over devices that share its cores.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from longlive_jax.cli.bench_spec import Benchmark
from longlive_jax.spec import UserError

HELP = {
    "sp": "devices that share a clip",
    "chunks": "of the clip",
    "chunk_frames": "latent frames of a chunk",
    "size": "height and width in pixels",
    "dim": "width of the model",
    "layers": "of the model",
    "repeats": "calls that are timed",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark, prints its numbers, writes JSON to --out."""
    from longlive_jax.bench.balanced import BalancedSpec, bench_balanced
    from longlive_jax.cli.bench import show

    def run(spec: BalancedSpec) -> dict[str, Any]:
        _enough(spec.sp)
        return bench_balanced(spec)

    return Benchmark("balanced", __doc__ or "", BalancedSpec, HELP, run, show).main(argv)


def _enough(count: int) -> None:
    """UserError if there are fewer devices; a CPU that nobody has used yet is split."""
    import jax

    with contextlib.suppress(RuntimeError):  # devices are counted already
        jax.config.update("jax_num_cpu_devices", count)  # of no effect on accelerators
    if jax.device_count() < count:
        raise UserError(
            f"--sp is {count} and there are {jax.device_count()} devices; choose at most as many"
        )
