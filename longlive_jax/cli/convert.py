"""`longlive convert --source=PATH --out=DIR`: converts weights of other libraries."""

from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from longlive_jax.cli.app import Parser

DTYPES = ("bfloat16", "float16", "float32")


def byte_progress() -> Progress:
    """A progress bar that counts bytes."""
    description = TextColumn("{task.description}")
    size = DownloadColumn(binary_units=True)
    return Progress(description, BarColumn(), size, TimeRemainingColumn())


def main(argv: Sequence[str]) -> int:
    """Converts the weights and prints what was written."""
    args = _parser().parse_args(argv)
    # These import JAX, which would slow down --help.
    from longlive_jax.interop import keys_vae
    from longlive_jax.interop.convert import convert

    # 1. Convert.
    with byte_progress() as bar:
        task = bar.add_task("reading", total=None)
        converted = convert(
            args.source,
            args.out,
            use_ema=args.use_ema,
            heads=args.heads,
            text_len=args.text_len,
            dtype=args.dtype,
            merge_lora=args.merge_lora,
            lora_alpha=args.lora_alpha,
            overwrite=args.overwrite,
            progress=lambda name, done, total: bar.update(
                task, description=name, completed=done, total=total
            ),
        )
    # 2. Report.
    for item in converted:
        count = f"{item.parameters / 1e6:,.1f} M parameters in {item.tensors} tensors"
        print(f"{item.component}: {count}, {item.naming}, from {item.source}")
        if item.naming == keys_vae.ORIGINAL.name and not any(item.config["latent_mean"]):
            print("  the file has no mean and std of the latents; they are set to 0 and 1")
    print(f"wrote {args.out}")
    return 0


def _parser() -> Parser:
    parser = Parser("convert", "Converts weights of other libraries to our checkpoint directory.")
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="a .safetensors, .index.json, .pt or .pth file, or a folder of them (Wan2.2, its "
        "diffusers version, LongLive-2.0, LoRA)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="checkpoint directory; may have other components"
    )
    parser.add_argument(
        "--use_ema", action="store_true", help="take generator_ema instead of generator"
    )
    parser.add_argument(
        "--heads", type=int, help="attention heads of the DiT, if there is no config.json"
    )
    parser.add_argument("--text_len", type=int, help="text tokens of the DiT (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to store (default: the source's)")
    parser.add_argument("--merge_lora", type=Path, help="LoRA file to merge into the DiT's kernels")
    parser.add_argument("--lora_alpha", type=float, help="alpha of the LoRA (default: its rank)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace components that --out already has"
    )
    return parser
