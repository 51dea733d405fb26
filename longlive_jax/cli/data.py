"""`longlive data check DIR` and `longlive data encode --source=DIR --checkpoint=DIR --out=DIR`.

`encode --texts_only` stores the captions of the videos as scripts instead of clips, and
`--scripts=FILE` those of a file, with the negative prompt, for training on prompts alone.

Exit codes of `check`: 0 all samples can be used, 1 some cannot, 2 none can or DIR is not a dataset.
Exit codes of `encode`: 0 done (skipped samples are named), 1 the disk is full or failed, 2 bad
input.
"""

import argparse
import functools
import io
import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longlive_jax.cli.app import Parser
from longlive_jax.cli.data_scripts import (
    EncodeJob,
    add_script_options,
    check_script_options,
    find_scripts,
    script_job,
)
from longlive_jax.cli.meshes import parse_mesh
from longlive_jax.cli.options import parse_size
from longlive_jax.cli.progress import ProgressBars
from longlive_jax.spec import UserError, build, nearest

if TYPE_CHECKING:
    from longlive_jax.data.clips.check import SampleReport
    from longlive_jax.data.clips.dataset import VideoSample
    from longlive_jax.data.clips.encode_spec import Encoders, EncodeSpec
    from longlive_jax.data.clips.store import Manifest

MAX_ROWS = 60
"""Number of samples above which only those with a problem or a remark are listed."""


def main(argv: Sequence[str]) -> int:
    """Checks or encodes a dataset of videos."""
    actions = {"check": check, "encode": encode}
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be in any encoding
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv[0] not in actions:
        raise UserError(f"data: unknown action {argv[0]!r}{nearest(argv[0], actions)}")
    return actions[argv[0]](argv[1:])


def check(argv: Sequence[str]) -> int:
    """Reports which samples of a dataset can be used, and why the others cannot."""
    args = _check_parser().parse_args(argv)
    from longlive_jax.data.clips.check import check_samples
    from longlive_jax.data.clips.clip_plan import JoinSpec
    from longlive_jax.data.clips.dataset import find_samples

    # 1. Check the options.
    join = build(JoinSpec, _join_settings(args), path="data")
    size = None if args.size is None else parse_size(args.size)
    if args.threads < 1:
        raise UserError(f"--threads must be >= 1, got {args.threads}")
    # 2. Read every sample.
    samples = find_samples(args.dir)
    with ProgressBars() as bars:
        reports = check_samples(
            samples,
            join,
            size=size,
            decode=args.decode,
            threads=args.threads,
            progress=bars.begin("reading"),
        )
    # 3. Print the reports.
    usable = sum(report.usable for report in reports)
    if args.json:
        totals = {"samples": len(reports), "usable": usable, "unusable": len(reports) - usable}
        print(json.dumps(totals | {"findings": [r.values() for r in reports]}, indent=1))
    else:
        _print_reports(reports)
    if not usable:
        raise UserError(f"{args.dir}: none of its {len(reports)} samples can be used")
    return int(usable < len(reports))


def encode(argv: Sequence[str]) -> int:
    """Encodes the clips, or scripts, and prompts that `--out` does not have yet."""
    args = _encode_parser().parse_args(argv)
    from longlive_jax.data.clips.dataset import find_samples, usable
    from longlive_jax.data.clips.encoders import checkpoint_encoders
    from longlive_jax.io.builtin import find_checkpoint
    from longlive_jax.sampling.settings import precision

    # 1. Check the options and the dataset.
    check_script_options(args)
    args.checkpoint = find_checkpoint(args.checkpoint)
    spec, dtype = _encode_spec(args), precision(args.compute)
    encoders = checkpoint_encoders(args.checkpoint, spec, dtype=dtype)
    if args.mesh is not None:
        encoders = _shard_encoders(encoders, spec, args, dtype)
    if args.texts_only:
        job: EncodeJob = script_job(args, find_scripts(args, spec.join))
    else:
        samples = find_samples(args.source)
        usable(samples, args.source)
        job = functools.partial(_encode_clips, samples)
    # 2. Encode.
    manifest = _encode_with_progress(job, spec, encoders, args.out)
    # 3. Print what the store contains.
    for name, reason in manifest.skipped:
        print(_escape_control(f"skipped {name}: {reason}"), file=sys.stderr)
    print(f"{args.out}: {manifest.summary()}")
    return 0


def _encode_clips(samples: "list[VideoSample]", out: Path, **options: Any) -> "Manifest":
    from longlive_jax.data.clips.encoding import encode_dataset

    return encode_dataset(samples, out, **options)


def _encode_with_progress(
    job: "EncodeJob", spec: "EncodeSpec", encoders: "Encoders", out: Path
) -> "Manifest":
    """Encodes with one progress bar per stage. Raises Failure if `out` cannot be written."""
    from longlive_jax.data.clips.encoding import resumable

    with ProgressBars() as bars:
        ticks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in ticks:
                ticks[stage] = bars.begin(stage)
            ticks[stage](done, total)

        with resumable(out):
            return job(out, spec=spec, encoders=encoders, progress=progress)


def _shard_encoders(encoders: "Encoders", spec: "EncodeSpec", args: Any, dtype: Any) -> "Encoders":
    """The encoders, sharded over the first devices of this machine."""
    import jax

    from longlive_jax.data.clips.sharded_encoders import shard_encoders
    from longlive_jax.parallel.mesh import make_mesh

    mesh_spec, devices = parse_mesh(args.mesh), jax.devices()
    if mesh_spec.samples != 1:
        raise UserError(
            "--mesh: data and fsdp must be 1, because clips are encoded one at a time, each "
            f"sharded over sp, got data={mesh_spec.data}, fsdp={mesh_spec.fsdp}"
        )
    if mesh_spec.sp > len(devices):
        raise UserError(
            f"--mesh: sp must be <= {len(devices)}, the number of devices, got {mesh_spec.sp}"
        )
    method = None if args.vae_parallel == "auto" else args.vae_parallel
    mesh = make_mesh(mesh_spec, devices[: mesh_spec.sp])
    return shard_encoders(encoders, args.checkpoint, spec, mesh, dtype=dtype, method=method)


def _encode_spec(args: Any) -> "EncodeSpec":
    """The options as a spec; missing ones have the values that the checkpoint is sampled with."""
    from longlive_jax.data.clips.encode_spec import EncodeSpec
    from longlive_jax.io.checkpoint import read_manifest
    from longlive_jax.sampling.settings import spec_for

    defaults = spec_for(args.checkpoint)
    dit = read_manifest(args.checkpoint)["components"].get("dit", {})
    join = _join_settings(args) | {
        "chunk_frames": defaults.chunk_frames if args.chunk is None else args.chunk,
        "cut_prefix": defaults.cut_prefix,
        "min_latents": args.min_latents,
    }
    size = defaults.size if args.size is None else parse_size(args.size)
    settings = {
        "join": join,
        "size": size,
        "windows": args.windows,
        "text_len": dit.get("text_len", 512) if args.text_len is None else args.text_len,
        "dtype": args.dtype,
        "text_dtype": args.text_dtype,
        "shard": args.shard,
    }
    return build(EncodeSpec, settings, path="data")


def _join_settings(args: Any) -> dict[str, Any]:
    """Joining rules that `check` and `encode` have in common."""
    names = ("chunks", "max_chunks_per_shot", "pad", "single_shot")
    return {"chunk_frames": args.chunk} | {name: getattr(args, name) for name in names}


def _print_reports(reports: "Sequence[SampleReport]") -> None:
    """Prints a table of samples, and their totals."""
    # 1. Fill the table.
    table = Table("sample", "shots", "seconds", "size", "fps", "chunks", "")
    for column in table.columns[1:6]:
        column.justify = "right"
    notable = [report for report in reports if report.reason or report.remarks]
    for report in reports if len(reports) <= MAX_ROWS else notable:
        state = [f"unusable: {report.reason}"] * (not report.usable)
        table.add_row(
            Text(_escape_control(report.name)),
            str(report.shots),
            f"{report.seconds:.1f}",
            " ".join(report.sizes),
            " ".join(f"{rate:g}" for rate in report.rates),
            str(report.chunks),
            Text("\n".join(map(_escape_control, [*state, *report.remarks])) or "ok"),
        )
    # 2. Print it.
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # files and pipes do not need lines to wrap
    if table.rows:
        console.print(table)
    usable = [report for report in reports if report.usable]
    seconds = sum(report.seconds for report in usable)
    print(f"{len(usable)} of {len(reports)} samples can be used: {seconds / 60:.1f} minutes")


def _escape_control(text: str) -> str:
    """Escapes control characters, so that a foreign name cannot control the terminal."""
    categories = ("Cc", "Cs")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in categories else c
        for c in text
    )


def _check_parser() -> Parser:
    parser = Parser("data check", "Report which samples can be used, and why the others cannot.")
    parser.add_argument(
        "dir",
        type=Path,
        help="folder of clips with captions (a.mp4, a.txt) or of video/ and caption/, or a .jsonl",
    )
    parser.add_argument("--chunks", type=int, default=1, help="minimum chunks per sample")
    parser.add_argument("--chunk", type=int, default=8, help="latent frames per chunk")
    _add_join_options(parser)
    parser.add_argument("--size", help="HEIGHTxWIDTH that frames must fit (default: not checked)")
    parser.add_argument("--decode", action="store_true", help="decode every frame (slow)")
    parser.add_argument("--threads", type=int, default=4, help="samples checked at once")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser


def _encode_parser() -> Parser:
    parser = Parser("data encode", "Encode a dataset to latents and text features; resumable.")
    add = parser.add_argument
    # Paths.
    add("--source", type=Path, help="dataset, as for `data check`")
    add(
        "--checkpoint",
        required=True,
        help="checkpoint with VAE and text encoder; small_world is the built-in one",
    )
    add("--out", type=Path, required=True, help="folder for the encoded clips")
    # Clips.
    add("--size", help="HEIGHTxWIDTH in pixels (default: the checkpoint's)")
    add("--chunks", type=int, default=12, help="chunks per clip")
    add("--chunk", type=int, help="latent frames per chunk (default: the checkpoint's)")
    _add_join_options(parser)
    add("--min_latents", type=int, default=1, help="minimum real (unpadded) latent frames")
    add("--windows", type=int, default=1, help="clips per sample (0 = as many as fit)")
    add("--text_len", type=int, help="text tokens per prompt (default: the checkpoint's)")
    add_script_options(parser)
    # Storage and computation.
    add("--dtype", default="float16", help="storage dtype of latents: float16 or float32")
    add(
        "--text_dtype",
        default="float32",
        help="storage dtype of text features: bfloat16, float16 or float32",
    )
    add("--shard", type=int, default=64, help="clips per file")
    dtypes = ("auto", "float32", "bfloat16")
    add("--compute", choices=dtypes, default="auto", help="compute dtype of VAE and text encoder")
    add("--mesh", help="sp=N: shard each clip over N devices")
    _add_vae_parallel(parser)
    return parser


def _add_vae_parallel(parser: Parser) -> None:
    methods = ("auto", "halo", "tails")
    parser.add_argument(
        "--vae_parallel",
        choices=methods,
        default="auto",
        help="sharding with --mesh: encode a halo of frames, exchange the layers' causal padding "
        "(tails), or the cheaper of the two (auto)",
    )
    hidden = argparse.SUPPRESS  # the former name of the option
    parser.add_argument(
        "--share", dest="vae_parallel", choices=methods, default=hidden, help=hidden
    )


def _add_join_options(parser: Parser) -> None:
    parser.add_argument(
        "--max_chunks_per_shot",
        type=int,
        default=0,
        help="chunks before a virtual cut, which skips one second (0 = no limit)",
    )
    parser.add_argument("--pad", action="store_true", help="pad and mask short samples")
    parser.add_argument("--single_shot", action="store_true", help="keep each clip in one shot")
