"""`longlive bench balanced [--sp=4] [--chunks=8] [--json]`.

Times an update, from frames to gradient, by Balanced SP and by the naive cut of the sequence; on a
machine without accelerators over devices that share its cores.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError, build

HELP = {
    "sp": "devices that share a clip",
    "chunks": "of the clip",
    "chunk": "latent frames of a chunk",
    "size": "height and width in pixels",
    "dim": "width of the model",
    "layers": "of the model",
    "repeats": "calls that are timed",
}


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark, prints its numbers, writes JSON to --out."""
    from longlive_jax.bench.balanced import BalancedSpec, bench_balanced

    parser = Parser("bench balanced", __doc__ or "")
    for field in dataclasses.fields(BalancedSpec):
        parser.add_argument(f"--{field.name}", type=field.type, help=HELP[field.name])
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    given = {k: v for k, v in vars(args).items() if k in HELP and v is not None}
    spec = build(BalancedSpec, given, path="bench")
    if args.out is not None:
        from longlive_jax.io.video import check_writable

        check_writable(args.out.parent)
    _enough(spec.sp)
    report = bench_balanced(spec)
    text = json.dumps(report, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        from longlive_jax.cli.bench import show

        show(report)
    return 0


def _enough(count: int) -> None:
    """UserError if there are fewer devices; a CPU that nobody has used yet is split."""
    import jax

    with contextlib.suppress(RuntimeError):  # devices are counted already
        jax.config.update("jax_num_cpu_devices", count)  # of no effect on accelerators
    if jax.device_count() < count:
        raise UserError(
            f"--sp is {count} and there are {jax.device_count()} devices; choose at most as many"
        )
