"""`longlive quantize --checkpoint=DIR --out=DIR2 [--policy=nvfp4|fp8] [--lora=FILE]`.

Packs the DiT of a checkpoint directory, layer by layer, for inference: W4A4 in NVFP4, or FP8 for
GPUs without FP4 units. `longlive sample --checkpoint=DIR2` runs it as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.convert import TYPES, byte_progress
from longlive_jax.spec import UserError

SOURCES = ("params", "ema")


def main(argv: Sequence[str]) -> int:
    """Packs, and says by which rules and what it saves."""
    args = _parser().parse_args(argv)
    from longlive_jax.interop.quantize_checkpoint import quantize_checkpoint
    from longlive_jax.io.builtin import builtin_checkpoint  # these import JAX; --help does not wait
    from longlive_jax.quant.policy import named

    try:
        policy = named(args.policy)
    except ValueError as error:
        raise UserError(str(error).replace("quant.policy", "--policy")) from error
    checkpoint = args.checkpoint or builtin_checkpoint()
    with byte_progress() as bar:
        task = bar.add_task("reading", total=None)
        done = quantize_checkpoint(
            checkpoint,
            args.out,
            policy,
            weights=_weights(args, checkpoint),
            lora=_lora(args),
            dtype=args.dtype,
            overwrite=args.overwrite,
            progress=lambda what, at, total: bar.update(
                task, description=what, completed=at, total=total
            ),
        )
    print(done.record.describe())
    kernels, sizes = len(done.record.kernels), (done.before / 1e6, done.after / 1e6)
    print(f"{kernels} stacks of matrices; dit: {sizes[0]:,.1f} MB before, {sizes[1]:,.1f} MB after")
    print(f"wrote {args.out}")
    return 0


def _weights(args: Any, checkpoint: Path) -> Any:
    """Weights of a run's last save in place of the checkpoint's; None for the checkpoint's own."""
    if (args.workdir is None) != (args.source is None):
        raise UserError(
            "--source says which weights of a training run's save (params or ema), and --workdir "
            "which run; give both or none (a checkpoint that a run has exported is its average)"
        )
    if args.workdir is None:
        return None
    from longlive_jax.training.trained_weights import SavedWeights

    return SavedWeights.of(args.workdir, args.source, checkpoint, say=print)


def _lora(args: Any) -> Any:
    from longlive_jax.interop.quantize_checkpoint import Lora

    if args.lora is not None:
        return Lora(args.lora, args.lora_mode, args.lora_alpha)
    if args.lora_alpha is not None:
        raise UserError("--lora_alpha belongs to a LoRA; name it with --lora=FILE")
    return None


def _parser() -> Parser:
    parser = Parser("quantize", __doc__ or "")
    parser.add_argument("--checkpoint", type=Path, help="checkpoint directory; default: built in")
    parser.add_argument("--out", type=Path, required=True, help="packed checkpoint directory")
    parser.add_argument("--policy", default="nvfp4", help="nvfp4 (default), fp8, nvfp4_train")
    parser.add_argument("--workdir", type=Path, help="take the weights of this run's last save")
    parser.add_argument("--source", choices=SOURCES, help="which of them: params, or their average")
    parser.add_argument("--lora", type=Path, help="a LoRA file for the DiT")
    parser.add_argument(
        "--lora_mode",
        choices=("merge", "branch"),
        default="merge",
        help="merge it before packing, or keep it beside the packed kernels in high precision",
    )
    parser.add_argument("--lora_alpha", type=float, help="alpha of the LoRA (default: its rank)")
    parser.add_argument(
        "--dtype", choices=TYPES, default="bfloat16", help="of all that is not packed"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --out already has")
    return parser
