"""`longlive data check DIR` and `longlive data encode --source=DIR --checkpoint=DIR --out=DIR`.

Exit codes of `check`: 0 all samples can be used, 1 some cannot, 2 none can or DIR is no dataset.
Of `encode`: 0 done (samples left out are named), 1 the disk is full or failed, 2 bad input.
"""

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
from longlive_jax.cli.meshes import mesh_of
from longlive_jax.cli.progress import ShareBars
from longlive_jax.spec import Failure, UserError, build, nearest

if TYPE_CHECKING:
    from longlive_jax.data.clips.check import Finding
    from longlive_jax.data.clips.encoding import Encoders, EncodeSpec

MOST_ROWS = 60
"""A dataset of more samples is listed by its troubles only."""


def main(argv: Sequence[str]) -> int:
    """Checks or encodes a dataset of videos."""
    actions = {"check": check, "encode": encode}
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in any encoding
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if argv[0] not in actions:
        raise UserError(f"data: unknown action {argv[0]!r}{nearest(argv[0], actions)}")
    return actions[argv[0]](argv[1:])


def check(argv: Sequence[str]) -> int:
    """Prints what of a dataset can be used, and why the rest cannot."""
    args = _check_parser().parse_args(argv)
    from longlive_jax.data.clips.check import check_samples
    from longlive_jax.data.clips.clip_plan import JoinSpec
    from longlive_jax.data.clips.dataset import find_samples

    join = build(JoinSpec, _join(args), path="data")
    size = None if args.size is None else _size(args.size)
    if args.threads < 1:
        raise UserError(f"--threads is {args.threads}; it must be at least 1")
    samples = find_samples(args.dir)
    with ShareBars() as bars:
        tick = bars.begin("reading")
        found = check_samples(
            samples,
            join,
            size=size,
            decode=args.decode,
            threads=args.threads,
            progress=tick,
        )
    good = sum(finding.usable for finding in found)
    if args.json:
        totals = {"samples": len(found), "usable": good, "unusable": len(found) - good}
        print(json.dumps(totals | {"findings": [one.values() for one in found]}, indent=1))
    else:
        _show(found)
    if not good:
        raise UserError(f"{args.dir}: none of its {len(found)} samples can be used")
    return int(good < len(found))


def encode(argv: Sequence[str]) -> int:
    """Encodes what `--out` does not hold yet."""
    args = _encode_parser().parse_args(argv)
    from longlive_jax.data.clips.dataset import find_samples, usable
    from longlive_jax.data.clips.encoders import checkpoint_encoders
    from longlive_jax.data.clips.encoding import encode_dataset
    from longlive_jax.sampling.settings import precision

    spec, dtype = _encode_spec(args), precision(args.compute)
    encoders = checkpoint_encoders(args.checkpoint, spec, dtype=dtype)
    if args.mesh is not None and args.texts_only:
        raise UserError("--mesh shares clips out, and --texts_only encodes none; give one of them")
    if args.mesh is not None:
        encoders = _over_mesh(encoders, spec, args, dtype)
    samples = find_samples(args.source)
    usable(samples, args.source)
    with ShareBars() as bars:
        ticks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in ticks:
                ticks[what] = bars.begin(what)
            ticks[what](done, total)

        try:
            made = encode_dataset(
                samples,
                args.out,
                spec=spec,
                encoders=encoders,
                texts_only=args.texts_only,
                progress=progress,
            )
        except OSError as error:
            raise Failure(
                f"{args.out}: cannot be written ({error.strerror or error}); what is finished is "
                "safe: make room and run the same command again"
            ) from error
    clips, texts = (sum(s.records for s in shards) for shards in (made.clips, made.texts))
    for name, reason in made.skipped:
        print(_plain(f"skipped {name}: {reason}"), file=sys.stderr)
    skipped = f", {len(made.skipped)} skipped" if made.skipped else ""
    print(f"{args.out}: {clips} clips, {texts} prompts{skipped}")
    return 0


def _over_mesh(encoders: "Encoders", spec: "EncodeSpec", args: Any, dtype: Any) -> "Encoders":
    """The encoders over the first devices of this machine."""
    import jax

    from longlive_jax.data.clips.sharded_encoders import over_mesh
    from longlive_jax.parallel.mesh import make_mesh

    mesh, devices = mesh_of(args.mesh), jax.devices()
    if mesh.samples != 1:
        raise UserError("--mesh: clips are encoded one after the other, over sp; data, fsdp: 1")
    if mesh.sp > len(devices):
        raise UserError(f"--mesh: sp = {mesh.sp}, and there are {len(devices)} devices; give fewer")
    method = None if args.share == "auto" else args.share
    made = make_mesh(mesh, devices[: mesh.sp])
    return over_mesh(encoders, args.checkpoint, spec, made, dtype=dtype, method=method)


def _encode_spec(args: Any) -> "EncodeSpec":
    """The options; what is not said is as the checkpoint's model is used."""
    from longlive_jax.data.clips.encoding import EncodeSpec
    from longlive_jax.io.checkpoint import read_manifest
    from longlive_jax.sampling.settings import spec_for

    own = spec_for(args.checkpoint)
    dit = read_manifest(args.checkpoint)["components"].get("dit", {})
    join = _join(args) | {
        "chunk_frames": own.chunk_frames if args.chunk is None else args.chunk,
        "cut_prefix": own.cut_prefix,
        "min_latents": args.min_latents,
    }
    size = own.size if args.size is None else _size(args.size)
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


def _size(text: str) -> tuple[int, int]:
    from longlive_jax.sampling.script import check_size

    try:
        height, width = (int(edge) for edge in text.lower().split("x"))
    except ValueError:
        raise UserError(f"--size: {text!r} is not HEIGHTxWIDTH, such as 704x1280") from None
    check_size(height, width)
    return height, width


def _join(args: Any) -> dict[str, Any]:
    names = ("chunks", "max_chunks_per_shot", "pad", "single_shot")
    return {"chunk_frames": args.chunk} | {name: getattr(args, name) for name in names}


def _show(found: "Sequence[Finding]") -> None:
    table = Table("sample", "shots", "seconds", "size", "fps", "chunks", "")
    for column in table.columns[1:6]:
        column.justify = "right"
    troubled = [one for one in found if one.reason or one.remarks]
    for one in found if len(found) <= MOST_ROWS else troubled:
        state = [f"unusable: {one.reason}"] * (not one.usable)
        table.add_row(
            Text(_plain(one.name)),
            str(one.shots),
            f"{one.seconds:.1f}",
            " ".join(one.sizes),
            " ".join(f"{rate:g}" for rate in one.rates),
            str(one.chunks),
            Text("\n".join(map(_plain, [*state, *one.remarks])) or "ok"),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a file or a pipe has no edge to wrap at
    if table.rows:
        console.print(table)
    good = [one for one in found if one.usable]
    seconds = sum(one.seconds for one in good)
    print(f"{len(good)} of {len(found)} samples can be used: {seconds / 60:.1f} minutes")


def _plain(text: str) -> str:
    """Control characters as escapes: a name from elsewhere must not steer the terminal."""
    hidden = ("Cc", "Cs")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in hidden else c
        for c in text
    )


def _check_parser() -> Parser:
    parser = Parser("data check", "What of a dataset can be used, and why the rest cannot.")
    parser.add_argument("dir", type=Path, help="folder with video/ and caption/, or a .jsonl file")
    parser.add_argument("--chunks", type=int, default=1, help="that a sample must fill")
    parser.add_argument("--chunk", type=int, default=8, help="latents of a chunk")
    _add_rules(parser)
    parser.add_argument("--size", help="HEIGHTxWIDTH that pictures must fit (default: not checked)")
    parser.add_argument("--decode", action="store_true", help="decode every frame (slow)")
    parser.add_argument("--threads", type=int, default=4, help="files read at once")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    return parser


def _encode_parser() -> Parser:
    parser = Parser("data encode", "Latents and text features of a dataset; resumes if stopped.")
    parser.add_argument("--source", type=Path, required=True, help="the dataset, as for check")
    parser.add_argument("--checkpoint", type=Path, required=True, help="its VAE and text encoder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the encoded clips")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels (default: the checkpoint's)")
    parser.add_argument("--chunks", type=int, default=12, help="of a clip")
    parser.add_argument("--chunk", type=int, help="latents of a chunk (default: the checkpoint's)")
    _add_rules(parser)
    parser.add_argument("--min_latents", type=int, default=1, help="real ones of a padded clip")
    parser.add_argument(
        "--windows", type=int, default=1, help="clips of a sample, in a row; 0: all it fills"
    )
    parser.add_argument("--text_len", type=int, help="rows of text (default: the checkpoint's)")
    parser.add_argument("--dtype", default="float16", help="latents at rest: float16 or float32")
    parser.add_argument(
        "--text_dtype", default="float32", help="text at rest: bfloat16, float16 or float32"
    )
    parser.add_argument(
        "--compute", choices=("auto", "float32", "bfloat16"), default="auto", help="of the models"
    )
    parser.add_argument("--mesh", help="sp=N: share each clip out over N devices")
    parser.add_argument(
        "--share",
        choices=("auto", "tails", "halo"),
        default="auto",
        help="with --mesh: exchange layers' tails, encode a halo, or (auto) the cheaper",
    )
    parser.add_argument("--shard", type=int, default=64, help="clips of a file")
    parser.add_argument(
        "--texts_only",
        action="store_true",
        help="no clips, but every prompt that one could have: to train on the videos themselves",
    )
    return parser


def _add_rules(parser: Parser) -> None:
    parser.add_argument(
        "--max_chunks_per_shot", type=int, default=0, help="then skip a second: a virtual cut"
    )
    parser.add_argument("--pad", action="store_true", help="use short samples, padded and masked")
    parser.add_argument("--single_shot", action="store_true", help="a clip stays in one shot")
