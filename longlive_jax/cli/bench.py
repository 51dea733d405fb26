"""`longlive bench sampler [--checkpoint=DIR | --model=mid] [--steps=4] [--json] [--out=FILE]`.

`longlive bench encode [--sp=4] [--frames=96,192,384] [--size=704x1280]` counts what encoding a clip
over a mesh costs each device. `longlive bench attention` times attention alone, `longlive bench
balanced` what Balanced SP buys, `longlive bench nvfp4` packed products and what goes with them, and
`longlive bench kv` what packed keys and values cost.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.bench_spec import add_report_options, check_report_options, deliver
from longlive_jax.spec import UserError, build, nearest

APART = ("attention", "balanced", "nvfp4", "kv")
"""Benchmarks with options of their own."""
WHAT = ("sampler", "encode", *APART)


def main(argv: Sequence[str]) -> int:
    """Times sampling stage by stage, or one call of a larger DiT with random weights."""
    what = next((word for word in argv if not word.startswith("-")), "")
    if what in APART:
        verb = importlib.import_module(f"longlive_jax.cli.bench_{what}")
        return verb.main([word for word in argv if word is not what])
    parser = Parser("bench", __doc__ or "")
    parser.add_argument("what", help=", ".join(WHAT))
    parser.add_argument("--checkpoint", help="default: the built-in one")
    parser.add_argument("--model", help="time one denoising call of this model instead: mid, 5b")
    parser.add_argument("--steps", type=int, help="model calls per chunk")
    parser.add_argument("--chunks", type=int, default=40, help="length of the video")
    parser.add_argument("--batch", type=int, default=1, help="videos at once")
    parser.add_argument("--sp", type=int, default=4, help="encode: devices that share a clip")
    parser.add_argument("--frames", default="96,192,384", help="encode: lengths in latent frames")
    parser.add_argument("--size", default="704x1280", help="encode: HEIGHTxWIDTH in pixels")
    add_report_options(parser)
    args = parser.parse_args(argv)
    if args.what not in WHAT:
        raise UserError(f"bench: unknown benchmark {args.what!r}{nearest(args.what, WHAT)}")
    check_report_options(args)
    deliver(_report(args), args, _encode_table if args.what == "encode" else show)
    return 0


def _encode_table(report: dict[str, Any]) -> None:
    from longlive_jax.bench.encode_cost import table

    print(table(report))


def _report(args: Any) -> dict[str, Any]:
    if args.what == "encode":
        return _encode(args)
    return _call(args.model) if args.model else _sampler(args)


def _encode(args: Any) -> dict[str, Any]:
    from longlive_jax.bench.encode_cost import EncodeCostSpec, encode_cost

    settings = {
        "latents": _numbers("--frames", args.frames, ","),
        "sp": args.sp,
        "size": _numbers("--size", args.size, "x"),
    }
    spec = build(EncodeCostSpec, settings, path="bench")
    try:
        return encode_cost(spec)
    except ValueError as error:
        raise UserError(f"bench: {error}") from error


def _numbers(option: str, text: str, between: str) -> list[int]:
    try:
        return [int(word) for word in text.split(between)]
    except ValueError:
        raise UserError(f"{option}: expected whole numbers and {between!r}, got {text!r}") from None


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
