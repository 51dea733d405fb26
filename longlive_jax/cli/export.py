"""`longlive export --source=DIR --out=DIR2`: our checkpoint to safetensors."""

from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.app import Parser
from longlive_jax.cli.convert import byte_progress
from longlive_jax.spec import UserError


def main(argv: Sequence[str]) -> int:
    """Exports and lists the files."""
    args = _parser().parse_args(argv)
    if args.shard_gb <= 0:
        raise UserError(f"--shard_gb={args.shard_gb}: must be larger than 0")
    from longlive_jax.interop.export import export  # imports JAX; --help should not wait for it

    with byte_progress() as bar:
        task = bar.add_task("reading", total=None)
        files = export(
            args.source,
            args.out,
            args.naming,
            shard_bytes=int(args.shard_gb * 1e9),
            progress=lambda what, at, total: bar.update(
                task, description=what, completed=at, total=total
            ),
        )
    for file in files:
        print(f"wrote {file}")
    return 0


def _parser() -> Parser:
    parser = Parser("export", "Our checkpoint directory to safetensors.")
    parser.add_argument("--source", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--naming", choices=("original", "diffusers"), default="original")
    parser.add_argument("--shard_gb", type=float, default=5.0, help="largest file, in 10^9 bytes")
    return parser
