"""`longlive convert --source=PATH --out=DIR`: weights of other libraries to our checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from longlive_jax.cli.app import Parser

TYPES = ("bfloat16", "float16", "float32")


def byte_progress() -> Progress:
    """A bar that counts bytes."""
    what = TextColumn("{task.description}")
    return Progress(what, BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())


def main(argv: Sequence[str]) -> int:
    """Converts and says what was found."""
    args = _parser().parse_args(argv)
    from longlive_jax.interop import keys_vae  # these import JAX; --help should not wait for it
    from longlive_jax.interop.convert import convert

    with byte_progress() as bar:
        task = bar.add_task("reading", total=None)
        done = convert(
            args.source,
            args.out,
            use_ema=args.use_ema,
            heads=args.heads,
            text_len=args.text_len,
            dtype=args.dtype,
            merge_lora=args.merge_lora,
            lora_alpha=args.lora_alpha,
            overwrite=args.overwrite,
            progress=lambda what, at, total: bar.update(
                task, description=what, completed=at, total=total
            ),
        )
    for part in done:
        count = f"{part.parameters / 1e6:,.1f} M parameters in {part.tensors} tensors"
        print(f"{part.component}: {count}, {part.naming}, from {part.source}")
        if part.naming == keys_vae.ORIGINAL.name and not any(part.config["latent_mean"]):
            print("  its file does not tell the latents' mean and scale; taken as 0 and 1")
    print(f"wrote {args.out}")
    return 0


def _parser() -> Parser:
    parser = Parser("convert", "Weights of other libraries to our checkpoint directory.")
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="a .safetensors, .index.json, .pt or .pth file, or a folder of them (Wan2.2, its "
        "diffusers version, LongLive-2.0, LoRA)",
    )
    parser.add_argument("--out", type=Path, required=True, help="checkpoint directory; added to")
    parser.add_argument("--use_ema", action="store_true", help="take generator_ema, not generator")
    parser.add_argument("--heads", type=int, help="attention heads of the DiT, if nothing tells")
    parser.add_argument("--text_len", type=int, help="rows of text of the DiT (default 512)")
    parser.add_argument("--dtype", choices=TYPES, help="stored type (default: as in the source)")
    parser.add_argument("--merge_lora", type=Path, help="add this LoRA file to the DiT's kernels")
    parser.add_argument("--lora_alpha", type=float, help="alpha of the LoRA (default: its rank)")
    parser.add_argument("--overwrite", action="store_true", help="replace what DIR already has")
    return parser
