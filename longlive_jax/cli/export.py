"""`longlive export --source=DIR --out=DIR2`: exports our checkpoint to safetensors."""

from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.app import Parser
from longlive_jax.cli.convert import byte_progress
from longlive_jax.spec import UserError


def main(argv: Sequence[str]) -> int:
    """Exports the checkpoint and lists the files."""
    args = _parser().parse_args(argv)
    if args.shard_gb <= 0:
        raise UserError(f"--shard_gb must be > 0, got {args.shard_gb}")
    # These import JAX, which would slow down --help.
    from longlive_jax.interop.export import export
    from longlive_jax.io.builtin import find_checkpoint
    from longlive_jax.io.completeness import describe_missing

    source = find_checkpoint(args.source)
    with byte_progress() as progress:
        files = export(
            source,
            args.out,
            args.naming,
            shard_bytes=int(args.shard_gb * 1e9),
            progress=progress,
        )
    for file in files:
        print(f"wrote {file}")
    index = args.out / "model_index.json"
    if index.is_file():
        print(f"wrote {index}: `WanPipeline.from_pretrained({str(args.out)!r})` loads the folder")
    elif args.naming == "diffusers":
        print(f"no pipeline: {source} {describe_missing(source)}")
    return 0


def _parser() -> Parser:
    parser = Parser("export", "Exports our checkpoint directory to safetensors.")
    parser.add_argument("--source", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--naming",
        choices=("original", "diffusers"),
        default="original",
        help="names of weights and files (default: original)",
    )
    parser.add_argument(
        "--shard_gb", type=float, default=5.0, help="largest file, in 10^9 bytes (default: 5)"
    )
    return parser
