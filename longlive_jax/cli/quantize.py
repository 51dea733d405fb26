"""`longlive quantize --checkpoint=DIR --out=DIR2 [--policy=nvfp4|fp8] [--lora=FILE]`.

Packs the DiT of a checkpoint directory for inference, layer by layer: NVFP4 (W4A4), or FP8 for
GPUs without FP4 tensor cores. `longlive sample --checkpoint=DIR2` samples from the result.
"""

from collections.abc import Sequence
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
    checkpoint = _checkpoint(args)
    with byte_progress() as progress:
        report = quantize_checkpoint(
            checkpoint,
            args.out,
            policy,
            weights=_weights(args, checkpoint),
            lora=_lora(args),
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
    print(_write_settings(args))
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


def _write_settings(args: Any) -> str:
    """Stores the sampling settings of the packed checkpoint, and describes them in one line."""
    from longlive_jax.sampling.kinds import describe, settings_of
    from longlive_jax.sampling.settings import checkpoint_settings, save_settings

    own = checkpoint_settings(args.out)
    settings = own | (settings_of(args.kind) if args.kind else {})
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
    """The LoRA to apply, or None."""
    from longlive_jax.interop.quantize_checkpoint import LoraSpec

    if args.lora is not None:
        return LoraSpec(args.lora, args.lora_mode, args.lora_alpha)
    if args.lora_alpha is not None:
        raise UserError("--lora_alpha needs a LoRA; pass --lora=FILE")
    return None


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
    # LoRA.
    parser.add_argument("--lora", type=Path, help="LoRA file for the DiT")
    parser.add_argument(
        "--lora_mode",
        choices=("merge", "branch"),
        default="merge",
        help="merge: add the LoRA to the kernels before packing (default); branch: store it next "
        "to the packed kernels, in high precision",
    )
    parser.add_argument("--lora_alpha", type=float, help="alpha of the LoRA (default: its rank)")
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
