"""`longlive quantize --checkpoint=DIR --out=DIR2 [--policy=nvfp4|fp8] [--adapter=PATH[:SCALE]]`.

Packs the DiT of a checkpoint directory for inference, layer by layer: NVFP4 (W4A4), or FP8 for
GPUs without FP4 tensor cores. `longlive sample --checkpoint=DIR2` samples from the result.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.convert import DTYPES, KINDS, byte_progress
from longlive_jax.spec import UserError

SOURCES = ("params", "ema")


def main(argv: Sequence[str]) -> int:
    """Packs the checkpoint, and prints the formats and the sizes before and after."""
    args = _parser().parse_args(argv)
    # These import JAX, which would slow down --help.
    from longlive_jax.interop.quantize_checkpoint import quantize_checkpoint
    from longlive_jax.io.completeness import describe_missing
    from longlive_jax.quant.policy import named

    # 1. Pack.
    try:
        policy = named(args.policy)
    except ValueError as error:
        raise UserError(str(error).replace("quant.policy", "--policy")) from error
    checkpoint, lora = _checkpoint(args), _lora(args)
    with byte_progress() as progress:
        report = quantize_checkpoint(
            checkpoint,
            args.out,
            policy,
            weights=_weights(args, checkpoint),
            lora=lora,
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=progress,
        )
    # 2. Report.
    print(report.record.describe())
    before, after = report.bytes_before / 1e6, report.bytes_after / 1e6
    print(
        f"{len(report.record.kernels)} kernels packed (each with all its layers); "
        f"dit: {before:,.1f} MB before, {after:,.1f} MB after"
    )
    print(_write_settings(args, {} if lora is None else lora.open().settings))
    print(f"wrote {args.out}")
    if missing := describe_missing(args.out):
        print(f"{args.out} {missing}")
    return 0


def _checkpoint(args: Any) -> Path:
    """The checkpoint to pack. Raises UserError if it has no DiT, or parts of other models."""
    from longlive_jax.io.builtin import find_checkpoint
    from longlive_jax.io.completeness import PARTS, missing_parts, require_components

    checkpoint = find_checkpoint(args.checkpoint)
    others = set(missing_parts(checkpoint)) - {"dit"}
    require_components(checkpoint, *(name for name in PARTS if name not in others))
    return checkpoint


def _write_settings(args: Any, made_for: Mapping[str, Any]) -> str:
    """Stores the sampling settings of the packed checkpoint, and describes them in one line.

    `made_for` are the settings of its adapters.
    """
    from longlive_jax.sampling.kinds import describe, settings_of
    from longlive_jax.sampling.settings import changed, checkpoint_settings, save_settings

    own = checkpoint_settings(args.out)
    settings = changed(own, made_for)
    settings = changed(settings, settings_of(args.kind) if args.kind else {})
    if args.kv is not None:
        settings["kv"] = args.kv
    if settings != own:
        save_settings(args.out, settings)
    if not settings:
        return "sampling settings: none, so the defaults of a distilled model hold; set --kind"
    cache = f", {settings['kv']} KV cache" if "kv" in settings else ""
    return f"sampling settings: {describe(settings)}{cache}"


def _weights(args: Any, checkpoint: Path) -> Any:
    """The weights of a training run's last checkpoint, or None for those of `--checkpoint`."""
    if (args.workdir is None) != (args.source is None):
        raise UserError(
            "--workdir (a training run) and --source (params or ema) must be given together; "
            "without both, the weights of --checkpoint are packed (a run exports its EMA)"
        )
    if args.workdir is None:
        return None
    from longlive_jax.training.trained_weights import TrainedWeights

    return TrainedWeights.load(args.workdir, args.source, checkpoint, notify=print)


def _lora(args: Any) -> Any:
    """The adapters to apply, or None."""
    from longlive_jax.adapters import parse_strength
    from longlive_jax.interop.quantize_checkpoint import LoraSpec

    if args.lora_alpha is not None and args.lora is None:
        raise UserError("--lora_alpha needs a LoRA; pass --lora=FILE")
    if args.lora is not None and args.adapter:
        raise UserError("--lora and --adapter are two names for one option; give --adapter alone")
    if args.lora is not None:
        return LoraSpec(args.lora, args.lora_mode, args.lora_alpha)
    if not args.adapter:
        return None
    first, *more = ((Path(path), scale) for path, scale in map(parse_strength, args.adapter))
    return LoraSpec(first[0], args.adapter_mode, strength=first[1], more=tuple(more))


def _parser() -> Parser:
    parser = Parser("quantize", __doc__ or "")
    # Input, output and formats.
    parser.add_argument(
        "--checkpoint", type=Path, help="checkpoint directory (default: the built-in one)"
    )
    parser.add_argument("--out", type=Path, required=True, help="packed checkpoint directory")
    parser.add_argument("--policy", default="nvfp4", help="nvfp4 (default), fp8 or nvfp4_train")
    parser.add_argument(
        "--workdir", type=Path, help="pack the weights of this training run's last checkpoint"
    )
    parser.add_argument(
        "--source", choices=SOURCES, help="weights of that run: params, or ema (their EMA)"
    )
    _add_settings(parser)
    _add_adapters(parser)
    # Everything else.
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="dtype of all parameters that are not packed (default: bfloat16)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace components that --out already has"
    )
    return parser


def _add_adapters(parser: Parser) -> None:
    """Options for adapters."""
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="PATH[:SCALE]",
        help="adapter to apply; its sampling settings are stored; may be given several times",
    )
    parser.add_argument(
        "--adapter_mode",
        choices=("merge", "branch"),
        default="merge",
        help="merge: add adapters to the kernels before packing (default); branch: store them next "
        "to the packed kernels, in high precision",
    )
    parser.add_argument("--lora", type=Path, help="the same for one LoRA file")
    parser.add_argument(
        "--lora_mode", choices=("merge", "branch"), default="merge", help="mode of --lora"
    )
    parser.add_argument(
        "--lora_alpha", type=float, help="alpha of --lora (default: the file's own, or its rank)"
    )


def _add_settings(parser: Parser) -> None:
    """Options for the sampling settings of the packed checkpoint."""
    parser.add_argument(
        "--kind",
        choices=KINDS,
        help="sampling settings to store, as for `longlive convert` (default: the checkpoint's)",
    )
    parser.add_argument(
        "--kv",
        choices=("model", "nvfp4"),
        help="storage of keys and values when sampling (default: the checkpoint's setting)",
    )
