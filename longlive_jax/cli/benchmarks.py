"""The benchmarks of `longlive bench` as a table of `Benchmark`s.

Options are spelt out here, and settings and code are named by import path, so that `--help` imports
nothing heavy.
"""

import argparse
import contextlib
import dataclasses
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.bench_tables import (
    Report,
    show_attention,
    show_encode,
    show_kv,
    show_nested,
    show_nvfp4,
)
from longlive_jax.spec import UserError, build, nearest


@dataclasses.dataclass(frozen=True)
class Option:
    """A command-line option that sets one field of a benchmark's settings.

    Attributes:
      name: name of the field.
      type: parser of the option's text; bool for a flag without text.
      help: meaning of the option, for `--help`.
      flag: name on the command line; default: `--name`.
    """

    name: str
    type: Callable[[str], Any]
    help: str
    flag: str = ""

    def add_to(self, parser: Parser) -> None:
        """Adds the option to a parser; its value is None where it is not given."""
        flag = self.flag or f"--{self.name}"
        if self.type is bool:
            parser.add_argument(
                flag, dest=self.name, action="store_true", default=None, help=self.help
            )
            return
        metavar = flag.removeprefix("--").upper()
        parser.add_argument(flag, dest=self.name, type=self.type, metavar=metavar, help=self.help)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A verb of `longlive bench`.

    Attributes:
      name: the word after `longlive bench`.
      summary: one line for the list of benchmarks.
      about: description for `--help`.
      spec: import path `module:class` of the dataclass of its settings.
      options: its options, in the order of `--help`; one for each field of `spec`.
      run: settings -> report, ready for JSON.
      show: prints a report for people.
      defaults: settings that replace the defaults of `spec` on this machine.
    """

    name: str
    summary: str
    about: str
    spec: str
    options: tuple[Option, ...]
    run: Callable[[Any], Report]
    show: Callable[[Report], None]
    defaults: Callable[[], Mapping[str, Any]] = dict

    def main(self, argv: Sequence[str]) -> int:
        """Runs the benchmark on a command line, prints the report, and returns exit code 0."""
        # 1. Parse the options.
        parser = Parser(f"bench {self.name}", self.about)
        for option in self.options:
            option.add_to(parser)
        parser.add_argument("--json", action="store_true", help="print JSON only")
        parser.add_argument("--out", type=Path, help="also write the JSON to this file")
        args = parser.parse_args(argv)
        # 2. Check settings and output before anything is measured.
        values = ((option.name, getattr(args, option.name)) for option in self.options)
        options = {name: value for name, value in values if value is not None}
        cls = pkgutil.resolve_name(self.spec)
        spec: Any = build(cls, {**self.defaults(), **options}, path="bench")
        if args.out is not None:
            from longlive_jax.io.paths import check_writable

            check_writable(args.out.parent)
        # 3. Run and report.
        report = self.run(spec)
        text = json.dumps(report, indent=1)
        if args.out is not None:
            args.out.write_text(text + "\n")
        if args.json:
            print(text)
        else:
            self.show(report)
        return 0


def deferred(path: str) -> Callable[..., Any]:
    """The function at import path `module:name`, imported when it is first called."""

    def call(*args: Any) -> Any:
        return pkgutil.resolve_name(path)(*args)

    return call


def numbers(separator: str) -> Callable[[str], list[int]]:
    """A parser of integers with a separator between them."""

    def parse(text: str) -> list[int]:
        try:
            return [int(word) for word in text.split(separator)]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected whole numbers separated by {separator!r}, got {text!r}"
            ) from None

    return parse


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """Options of `longlive bench sampler`.

    Attributes:
      checkpoint: directory of the model; None: the built-in one.
      model: name of a model whose single denoising call is timed instead.
      steps: sampler steps per chunk; None: the checkpoint's.
      chunks: chunks per video.
      batch: videos sampled at once.
    """

    checkpoint: str | None = None
    model: str | None = None
    steps: int | None = None
    chunks: int = 40
    batch: int = 1


def run_sampler(options: SamplerOptions) -> Report:
    """Times sampling stage by stage, or one call of a larger DiT with random weights."""
    if options.model:
        from longlive_jax.bench.dit_call import MODEL_SPECS, bench_call

        if options.model not in MODEL_SPECS:
            known = nearest(options.model, MODEL_SPECS)
            raise UserError(f"--model: unknown model {options.model!r}{known}")
        return bench_call(MODEL_SPECS[options.model])
    from longlive_jax.bench.sampler import BenchSpec, bench_sampler
    from longlive_jax.io.builtin import builtin_checkpoint

    settings = {"chunks": options.chunks, "batch": options.batch, "steps": options.steps}
    spec = build(BenchSpec, settings, path="bench")
    return bench_sampler(options.checkpoint or builtin_checkpoint(), spec)


def run_encode(spec: Any) -> Report:
    """Counts the cost of encoding; UserError for clips that do not split over the devices."""
    from longlive_jax.bench.encode_cost import encode_cost

    try:
        return encode_cost(spec)
    except ValueError as error:
        raise UserError(f"bench: {error}") from error


def run_balanced(spec: Any) -> Report:
    """Times both layouts on `spec.sp` devices; UserError if there are fewer.

    A CPU is split into as many devices, unless JAX has been initialized already.
    """
    import jax

    from longlive_jax.bench.balanced import bench_balanced

    with contextlib.suppress(RuntimeError):  # JAX has been initialized
        jax.config.update("jax_num_cpu_devices", spec.sp)  # no effect on accelerators
    if jax.device_count() < spec.sp:
        raise UserError(
            f"--sp must be <= {jax.device_count()}, the number of devices, got {spec.sp}"
        )
    return bench_balanced(spec)


def kv_defaults() -> dict[str, str]:
    """The built-in checkpoint."""
    from longlive_jax.io.builtin import builtin_checkpoint

    return {"checkpoint": str(builtin_checkpoint())}


SAMPLER_BENCHMARK = Benchmark(
    name="sampler",
    summary="sampling, stage by stage",
    about=(
        "`longlive bench sampler [--checkpoint=DIR | --model=mid] [--steps=4] [--json] "
        "[--out=FILE]`. Times sampling stage by stage, or one denoising call of a larger DiT with "
        "random weights."
    ),
    spec="longlive_jax.cli.benchmarks:SamplerOptions",
    options=(
        Option("checkpoint", str, "directory of the model (default: the built-in one)"),
        Option("model", str, "time one denoising call of this model instead: mid, 5b"),
        Option("steps", int, "sampler steps per chunk (default: the checkpoint's)"),
        Option("chunks", int, "chunks per video (default: 40)"),
        Option("batch", int, "videos sampled at once (default: 1)"),
    ),
    run=run_sampler,
    show=show_nested,
)

ENCODE_BENCHMARK = Benchmark(
    name="encode",
    summary="VAE encoding cost of each device of a mesh (counted, not timed)",
    about=(
        "`longlive bench encode [--sp=4] [--frames=96,192,384] [--size=704x1280] [--json]`. Counts "
        "what encoding a clip over a mesh costs each device, by method."
    ),
    spec="longlive_jax.bench.encode_cost:EncodeCostSpec",
    options=(
        Option("latents", numbers(","), "comma-separated clip lengths, latent frames", "--frames"),
        Option("sp", int, "devices that share a clip"),
        Option("size", numbers("x"), "HEIGHTxWIDTH of a clip in pixels"),
    ),
    run=run_encode,
    show=show_encode,
)

ATTENTION_BENCHMARK = Benchmark(
    name="attention",
    summary="attention alone, by implementation",
    about=(
        "`longlive bench attention [--seconds=16] [--chunk=8] [--heads=24] [--width=128] "
        "[--json]`. Times teacher-forcing attention with every implementation that runs on this "
        "machine, and PyTorch's compiled flex_attention if PyTorch and a CUDA device are "
        "available. Default sizes are those of a 16-second video of the 5B model on a GPU, and "
        "small ones elsewhere."
    ),
    spec="longlive_jax.bench.attention:AttentionSpec",
    options=(
        Option("seconds", float, "length of the video; 6 latent frames per second"),
        Option("chunk_frames", int, "latent frames per chunk", "--chunk"),
        Option("rows", int, "rows of tokens in a frame"),
        Option("columns", int, "columns of tokens in a frame"),
        Option("heads", int, "attention heads"),
        Option("width", int, "channels per head"),
        Option("dtype", str, "bfloat16 or float32"),
        Option("repeats", int, "number of timed calls"),
        Option("product", int, "size of the square matrix product that sets the reference rate"),
    ),
    run=deferred("longlive_jax.bench.attention:bench_attention"),
    show=show_attention,
    defaults=deferred("longlive_jax.bench.attention:default_settings"),
)

BALANCED_BENCHMARK = Benchmark(
    name="balanced",
    summary="Balanced SP against contiguous SP",
    about=(
        "`longlive bench balanced [--sp=4] [--chunks=8] [--json]`. Times an update, from frames to "
        "gradient, with Balanced SP and with the contiguous SP baseline. Without accelerators the "
        "devices are simulated and share the CPU cores."
    ),
    spec="longlive_jax.bench.balanced:BalancedSpec",
    options=(
        Option("sp", int, "devices that share a clip"),
        Option("chunks", int, "chunks per clip"),
        Option("chunk_frames", int, "latent frames per chunk", "--chunk"),
        Option("size", int, "height and width of the clip in pixels"),
        Option("dim", int, "width of the DiT"),
        Option("layers", int, "layers of the DiT"),
        Option("repeats", int, "number of timed calls"),
    ),
    run=run_balanced,
    show=show_nested,
)

NVFP4_BENCHMARK = Benchmark(
    name="nvfp4",
    summary="NVFP4 and FP8, one operation at a time",
    about=(
        "`longlive bench nvfp4 [--rows=7040] [--inputs=3072] [--outputs=14336] [--json]`. Times "
        "quantization, dequantization, matrix products, attention over a packed cache and linears "
        "in FP8 and NVFP4, with every implementation that runs on this machine. Default sizes are "
        "those of the 5B model on a GPU, and small ones elsewhere. `--bytes` instead counts the "
        "bytes that one linear of 7040x3072x3072 moves, by implementation and phase, in programs "
        "compiled for `--chip`, which need not be present; it takes minutes."
    ),
    spec="longlive_jax.bench.nvfp4:NVFP4Spec",
    options=(
        Option("rows", int, "tokens that are multiplied by a matrix"),
        Option("inputs", int, "input size of the matrix; a multiple of 16"),
        Option("outputs", int, "output size of the matrix"),
        Option("slots", int, "packed chunks in the cache"),
        Option("tokens", int, "tokens per chunk"),
        Option("heads", int, "attention heads"),
        Option("width", int, "channels per head; a multiple of 16"),
        Option("calls", int, "calls between two waits for the device"),
        Option("repeats", int, "number of measurements"),
        Option("product", int, "size of the matrix product that sets the compute limit"),
        Option("copy", int, "MiB copied to set the bandwidth limit"),
        Option("bytes", bool, "count the bytes of a linear in compiled programs, and time nothing"),
        Option("chip", str, "GPU to compile for, with --bytes (default: gb200)"),
    ),
    run=deferred("longlive_jax.bench.nvfp4:bench_nvfp4"),
    show=show_nvfp4,
    defaults=deferred("longlive_jax.bench.nvfp4:default_settings"),
)

KERNELS_BENCHMARK = Benchmark(
    name="kernels",
    summary="every kernel of this GPU, its limit and its peers",
    about=(
        "`longlive bench kernels [--kernel=NAME] [--json]`. Times the kernels of this machine's "
        "GPU at the sizes of the 5B model, next to the data sheet's limit, cuDNN, XLA, cuBLAS and "
        "installed libraries. Results are not checked: `longlive kernels prove` does."
    ),
    spec="longlive_jax.bench.kernel_times:KernelTimesSpec",
    options=(Option("kernel", str, "only this kernel"),),
    run=deferred("longlive_jax.bench.kernel_times:bench_kernels"),
    show=show_nested,
)

KV_BENCHMARK = Benchmark(
    name="kv",
    summary="error and size of an NVFP4 KV cache, by smoothing",
    about=(
        "`longlive bench kv [--checkpoint=DIR] [--chunks=5] [--json]`. Measures what keys and "
        "values in NVFP4 cost: the error of attention's output and the bytes, for every smoothing "
        "of keys, on keys with outlier channels and on those of a model in mid-video."
    ),
    spec="longlive_jax.bench.kv_quant:KVSpec",
    options=(
        Option("checkpoint", str, "directory of the model (default: the built-in one)"),
        Option("chunks", int, "chunks of the video that fill the cache"),
        Option("tokens", int, "tokens per synthetic chunk"),
        Option("heads", int, "heads of the synthetic attention"),
        Option("width", int, "channels per synthetic head; a multiple of 16"),
        Option("outliers", int, "outlier channels per head"),
    ),
    run=deferred("longlive_jax.bench.kv_quant:bench_kv"),
    show=show_kv,
    defaults=kv_defaults,
)

BENCHMARKS = {
    x.name: x
    for x in (
        SAMPLER_BENCHMARK,
        ENCODE_BENCHMARK,
        ATTENTION_BENCHMARK,
        BALANCED_BENCHMARK,
        NVFP4_BENCHMARK,
        KERNELS_BENCHMARK,
        KV_BENCHMARK,
    )
}
"""Every benchmark by its name."""
