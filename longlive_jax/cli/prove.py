"""`longlive kernels prove [--tune] [--out=FILE] [--kernel=NAME ...] [--dry-run]`.

The first hour of a GPU in one command. Each kernel for this machine's GPU runs in a process of its
own with a timeout: static laws; then one tile, none and a blind one; then the production sizes
against the oracle, twenty times with equal bits; then times against the data sheet and against
other libraries. "auto" takes a kernel only where this proved it and found it faster.

Without --tune it ends within ten minutes; --tune also searches the tile sizes. --dry-run prints the
plan and runs nothing; it needs no GPU. The report is replaced after every kernel, so that whatever
ends the run leaves it. The exit code is 1 if a kernel is not proven.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError, nearest

if TYPE_CHECKING:
    from longlive_jax.bench.prove import Step

DRY = {"sm_90a": "NVIDIA H200", "sm_100a": "NVIDIA GB200"}
"""Architecture -> the device that a plan without a GPU is for."""


def main(argv: Sequence[str]) -> int:
    """Runs or prints the plan."""
    args = _parser().parse_args(argv)
    if args.chip is not None and not args.dry_run:
        raise UserError("--chip is for --dry-run; kernels run on this machine's GPU")
    if args.chip is not None and args.chip not in DRY:
        raise UserError(f"--chip: unknown chip {args.chip!r}{nearest(args.chip, DRY)}")
    if args.out is not None and args.out.is_dir():
        raise UserError(f"--out: {args.out} is a folder; name a file")
    import jax

    # The GPU belongs to the processes of the kernels: this one must not reserve its memory.
    jax.config.update("jax_platforms", "cpu")
    from longlive_jax.bench.prove import find_device, plan

    if args.dry_run:
        for chip in DRY if args.chip is None else (args.chip,):
            _show(DRY[chip], chip, plan(chip, DRY[chip], args.kernel, tune=args.tune))
        return 0
    device = find_device()
    return _run(args, device, plan(device.chip, device.kind, args.kernel, tune=args.tune))


def _run(args, device, steps: "list[Step]") -> int:
    from longlive_jax.bench.prove import prove
    from longlive_jax.bench.prove_report import Report
    from longlive_jax.bench.timing import machine

    versions = {name: x for name, x in machine().items() if name not in ("device", "platform")}
    report = Report(device.kind, device.chip, args.tune, versions, args.out)
    report.check_writable()
    _show(device.kind, device.chip, steps)
    try:
        return prove(
            device, steps, report, tune=args.tune, say=lambda text: print(text, flush=True)
        )
    finally:
        print(f"longlive: report in {os.path.relpath(report.path)}", file=sys.stderr)


def _show(device: str, chip: str, steps: "list[Step]") -> None:
    """Prints the plan: modelled seconds and timeouts."""
    print(f"{device} ({chip}): {len(steps)} kernels")
    width = max((len(step.kernel) for step in steps), default=0)
    for step in steps:
        seconds = f"{step.modelled:6.0f} s modelled, {step.timeout:6.0f} s at most"
        print(f"  {step.kernel:<{width}}  {seconds}")
    modelled, most = (sum(x) for x in zip(*((s.modelled, s.timeout) for s in steps), strict=True))
    print(f"  together {modelled:.0f} s modelled, {most:.0f} s at most", flush=True)


def _parser() -> Parser:
    parser = Parser("kernels prove", __doc__ or "")
    parser.add_argument("--tune", action="store_true", help="also search the tile sizes")
    parser.add_argument("--out", type=Path, help="where the report goes instead")
    parser.add_argument("--kernel", action="append", help="only this kernel; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="print the plan only")
    parser.add_argument("--chip", help="with --dry-run: sm_90a or sm_100a; default both")
    return parser
