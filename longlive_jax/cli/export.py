"""`longlive export --source=DIR --out=DIR2`: exports our checkpoint, or an adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.convert import byte_progress
from longlive_jax.spec import UserError


def main(argv: Sequence[str]) -> int:
    """Exports the checkpoint and lists the files."""
    args = _parser().parse_args(argv)
    if args.shard_gb <= 0:
        raise UserError(f"--shard_gb must be > 0, got {args.shard_gb}")
    # These import JAX, which would slow down --help.
    from longlive_jax.adapters import is_adapter
    from longlive_jax.interop.export import export
    from longlive_jax.io.builtin import find_checkpoint
    from longlive_jax.io.completeness import describe_missing

    if is_adapter(args.source):
        return _export_adapter(args)
    if args.role is not None:
        raise UserError(f"--role={args.role} chooses an adapter, and {args.source} is not one")
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


def _export_adapter(args: Any) -> int:
    """Writes an adapter as PEFT's folder, or as the original's file if --out ends in .pt."""
    from longlive_jax.adapters import export_original, export_peft, load_adapters

    # 1. The adapters.
    adapters = load_adapters(args.source)
    role = args.role or next(iter(adapters))
    if role not in adapters:
        raise UserError(f"{args.source}: has no adapter of the {role}; leave out --role")
    # 2. Write.
    if args.out.suffix == ".pt":
        given = adapters if args.role is None else {role: adapters[role]}
        step = adapters[role].provenance.get("step", 0)
        export_original(args.out, **given, step=step if isinstance(step, int) else 0)
        files = [args.out]
    else:
        files = export_peft(args.out, adapters[role])
    for file in files:
        print(f"wrote {file}")
    return 0


def _parser() -> Parser:
    parser = Parser("export", "Exports our checkpoint directory, or an adapter, to safetensors.")
    parser.add_argument(
        "--source", type=Path, required=True, help="checkpoint directory, or an adapter"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to create; for an adapter also a .pt file, as the original's training writes",
    )
    parser.add_argument(
        "--role",
        choices=("generator", "critic"),
        help="which adapter of two to export (default: both in a .pt file, else the generator's)",
    )
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
