"""`longlive bench sampler [--checkpoint=DIR | --model=mid] [--steps=4] [--json] [--out=FILE]`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.spec import UserError, build, nearest

WHAT = ("sampler",)


def main(argv: Sequence[str]) -> int:
    """Times sampling stage by stage, or one call of a larger DiT with random weights."""
    parser = Parser("bench", __doc__ or "")
    parser.add_argument("what", help="sampler")
    parser.add_argument("--checkpoint", help="default: the built-in one")
    parser.add_argument("--model", help="time one denoising call of this model instead: mid, 5b")
    parser.add_argument("--steps", type=int, help="model calls per chunk")
    parser.add_argument("--chunks", type=int, default=40, help="length of the video")
    parser.add_argument("--batch", type=int, default=1, help="videos at once")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    if args.what not in WHAT:
        raise UserError(f"bench: unknown benchmark {args.what!r}{nearest(args.what, WHAT)}")
    if args.out is not None:
        from longlive_jax.io.video import check_writable

        check_writable(args.out.parent)
    report = _call(args.model) if args.model else _sampler(args)
    text = json.dumps(report, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    if args.json:
        print(text)
    else:
        show(report)
    return 0


def _call(name: str) -> dict[str, Any]:
    from longlive_jax.bench.dit_call import MODELS, bench_call

    if name not in MODELS:
        raise UserError(f"--model: unknown model {name!r}{nearest(name, MODELS)}")
    return bench_call(MODELS[name])


def _sampler(args: Any) -> dict[str, Any]:
    from longlive_jax.bench.sampler import BenchSpec, bench_sampler
    from longlive_jax.io.builtin import builtin_checkpoint

    settings = {"chunks": args.chunks, "batch": args.batch, "steps": args.steps}
    spec = build(BenchSpec, settings, path="bench")
    return bench_sampler(args.checkpoint or builtin_checkpoint(), spec)


def show(report: Any, name: str = "", depth: int = 0) -> None:
    """A nested report as indented lines."""
    if not isinstance(report, dict):
        print(f"{'  ' * (depth - 1)}{name}: {report}")
        return
    if name:
        print(f"{'  ' * (depth - 1)}{name}:")
    for key, value in report.items():
        show(value, key.replace("_", " "), depth + 1)
