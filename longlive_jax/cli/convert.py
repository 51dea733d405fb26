"""`longlive convert --source=PATH --out=DIR`: converts weights of other libraries."""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from longlive_jax.cli.app import Parser

if TYPE_CHECKING:
    from longlive_jax.interop.convert import ConvertedComponent
    from longlive_jax.io.progress import ProgressCallback

DTYPES = ("bfloat16", "float16", "float32")
KINDS = ("base", "ar", "distilled", "two_step")
"""Names of `sampling.kinds.KINDS`, which imports JAX."""


@contextlib.contextmanager
def byte_progress() -> Iterator["ProgressCallback"]:
    """A progress bar on standard error that counts bytes; gives the function that updates it.

    It appears with the first update, so that a refused file leaves its message alone.
    """
    text, size = TextColumn("{task.description}"), DownloadColumn(binary_units=True)
    columns = (text, BarColumn(), size, TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task("reading", total=None)

    def update(name: str, done: int, total: int) -> None:
        bar.start()
        bar.update(task, description=name, completed=done, total=total)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


def main(argv: Sequence[str]) -> int:
    """Converts the weights and prints what was written."""
    args = _parser().parse_args(argv)
    # These import JAX, which would slow down --help.
    from longlive_jax.interop.convert import convert
    from longlive_jax.sampling.kinds import exported_settings

    # 1. Convert.
    exported = exported_settings(args.source) if args.source.is_dir() else None
    with byte_progress() as progress:
        converted = convert(
            args.source,
            args.out,
            use_ema=args.use_ema,
            heads=args.heads,
            text_len=args.text_len,
            dtype=args.dtype,
            merge_lora=args.merge_lora,
            lora_alpha=args.lora_alpha,
            role=args.role,
            overwrite=args.overwrite,
            progress=progress,
        )
    # 2. Report.
    _report(args, converted, exported)
    return 0


def _report(
    args: Any, converted: "Sequence[ConvertedComponent]", exported: dict[str, Any] | None
) -> None:
    """Prints what was written and what the checkpoint still lacks; stores sampling settings."""
    from longlive_jax.adapters import is_adapter
    from longlive_jax.interop import keys_vae
    from longlive_jax.io.completeness import describe_missing
    from longlive_jax.io.parts import MODELS_FILE

    for item in converted:
        count = f"{item.parameters / 1e6:,.1f} M parameters in {item.tensors} tensors"
        print(f"{item.component}: {count}, {item.naming}, from {item.source}")
        if item.naming == keys_vae.ORIGINAL.name and not any(item.config["latent_mean"]):
            print(
                "  the file has no mean and std of the latents; they are set to 0 and 1: if the "
                f"VAE comes from an export, copy {MODELS_FILE} next to it and convert again"
            )
    print(_write_settings(args, converted, exported))
    print(f"wrote {args.out}")
    if is_adapter(args.out):
        print(f"plug it in: longlive sample --adapter={shlex.quote(str(args.out))} --script=SCRIPT")
    elif missing := describe_missing(args.out):
        print(f"{args.out} {missing}")


def _write_settings(
    args: Any, converted: "Sequence[ConvertedComponent]", exported: dict[str, Any] | None
) -> str:
    """Stores sampling settings that suit a converted DiT, and describes them in one line."""
    from longlive_jax.io.checkpoint import read_manifest
    from longlive_jax.sampling.kinds import describe, kind_of, settings_of
    from longlive_jax.sampling.settings import changed, save_settings

    dit = next((item for item in converted if item.component == "dit"), None)
    made_for = _adapter_settings(args, converted)
    if dit is None and made_for:
        texts = ", ".join(f"{name} {value}" for name, value in made_for.items())
        return f"sampling settings of the adapter: {texts}"
    if dit is None and (args.kind is None or "dit" not in read_manifest(args.out)["components"]):
        return "sampling settings: unchanged, as no DiT was converted"
    if exported is not None and args.kind is None:
        save_settings(args.out, exported)
        return f"sampling settings: those of the exported checkpoint ({describe(exported)})"
    kind, reason = args.kind, "as --kind says"
    if kind is None and dit is not None:
        kind = kind_of(dit.source, entry=dit.entry, is_packed=dit.is_packed)
        reason = "detected; change it with --kind"
    settings = changed(settings_of(kind), made_for)
    save_settings(args.out, settings)
    note = "; train it with --config=ar_5b before sampling long videos" * (kind == "base")
    return f"sampling settings: {kind} ({describe(settings)}), {reason}{note}"


def _adapter_settings(args: Any, converted: "Sequence[ConvertedComponent]") -> dict[str, Any]:
    """The sampling settings of the adapter that was merged or converted."""
    from longlive_jax.interop.lora_file import LoraFile

    if args.merge_lora is not None:
        return dict(LoraFile.open(args.merge_lora).info.settings)
    adapter = next((item for item in converted if item.component.endswith("lora")), None)
    return {} if adapter is None else dict(adapter.config["settings"])


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
    # What to convert, and how to store it.
    parser.add_argument(
        "--use_ema", action="store_true", help="take generator_ema instead of generator"
    )
    parser.add_argument(
        "--heads", type=int, help="attention heads of the DiT, if there is no config.json"
    )
    parser.add_argument("--text_len", type=int, help="text tokens of the DiT (default: 512)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to store (default: the source's)")
    parser.add_argument(
        "--kind",
        choices=KINDS,
        help="what the DiT is, which decides its sampling settings: base (Wan2.2 as released: 50 "
        "steps, guidance 5), ar (before distillation: 50 steps, guidance 3), distilled (4 steps) "
        "or two_step (2 steps); default: as far as the source tells",
    )
    parser.add_argument("--merge_lora", type=Path, help="adapter to merge into the DiT's kernels")
    parser.add_argument(
        "--lora_alpha",
        type=float,
        help="alpha of the adapter that is merged or converted (default: its own, or its rank)",
    )
    parser.add_argument(
        "--role",
        choices=("generator", "critic"),
        help="the adapter of a .pt file with two that is converted (default: both)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace components that --out already has"
    )
    return parser
