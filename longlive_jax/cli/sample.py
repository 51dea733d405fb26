"""`longlive sample --config=FILE.py --script=SCRIPT [--checkpoint=DIR] [--out=DIR]`.

A shot script to a video.
"""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.app import REPOSITORY, Parser, take_config
from longlive_jax.cli.progress import ChunkBar
from longlive_jax.spec import UserError, reject_unknown

if TYPE_CHECKING:
    from longlive_jax.sampling.pipeline import Pipeline
    from longlive_jax.sampling.script import ShotScript
    from longlive_jax.sampling.stream import Stream


def main(argv: Sequence[str]) -> int:
    """Samples every video of a script file; Ctrl-C keeps the finished chunks."""
    parser = _parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    config, rest = take_config(argv, default="configs/small_world.py:sample")
    args = parser.parse_args(rest)
    settings = config.to_dict()
    reject_unknown(settings, ("checkpoint", "sample"), "config")
    scripts = _scripts(args)
    from longlive_jax.io.paths import check_writable
    from longlive_jax.sampling.pipeline import Pipeline

    out = check_writable(args.out)
    folder = _checkpoint(args.checkpoint or settings.get("checkpoint"))
    pipe = Pipeline.from_checkpoint(folder, **(settings.get("sample") or {}))
    for line in pipe.describe_kernels():
        print(f"dit: {line}")
    video = _given_video(args.video, pipe, scripts)
    batches = [scripts[i : i + args.batch] for i in range(0, len(scripts), args.batch)]
    for batch in batches:
        pipe.size_of(batch)  # before anything compiles
    for i, batch in enumerate(batches):
        _film(pipe, batch, out, args, first=i * args.batch, many=len(scripts) > 1, video=video)
    return 0


def _parser() -> Parser:
    parser = Parser("sample", "A shot script to a video.")
    parser.add_argument("--script", required=True, help=".yaml, .json, .txt, or caption folder")
    parser.add_argument(
        "--checkpoint", help="in place of the config's; packed ones run as they are"
    )
    parser.add_argument("--out", default="out/sample", type=Path, help="folder for the files")
    parser.add_argument("--seed", type=int, help="in place of the script's")
    parser.add_argument("--chunks", type=int, help="length of each video, for text and captions")
    parser.add_argument("--chunks_per_shot", type=int, help="length of each shot, for captions")
    parser.add_argument("--batch", type=int, default=1, help="videos sampled together")
    parser.add_argument("--video", help="a video file to be continued")
    parser.add_argument(
        "--stills", type=int, default=8, help="pictures a shot in the strip; 0: none"
    )
    parser.add_argument("--latents", action="store_true", help="also write [f, h, w, c] as .npy")
    return parser


def _scripts(args: Any) -> list["ShotScript"]:
    from longlive_jax.sampling.script import read_scripts

    if args.batch < 1 or args.stills < 0:
        raise UserError(f"--batch {args.batch} must be at least 1 and --stills {args.stills} 0")
    scripts = read_scripts(args.script, chunks=args.chunks, chunks_per_shot=args.chunks_per_shot)
    if args.seed is None:
        return scripts
    return [
        dataclasses.replace(script, seed=(args.seed + i) % 2**32)
        for i, script in enumerate(scripts)
    ]


def _checkpoint(name: Any) -> Path:
    """The checkpoint directory, from the current folder or the repository root."""
    if not isinstance(name, str) or not name:
        raise UserError("config: missing key 'checkpoint', the directory that convert made")
    path = Path(name)
    return path if path.exists() or path.is_absolute() else REPOSITORY / path


def _given_video(path: str | None, pipe: "Pipeline", scripts: list["ShotScript"]):
    if path is None:
        return None
    from longlive_jax.io.video import read_video

    if len(scripts) > 1:
        raise UserError(f"--video continues one video, the script describes {len(scripts)}")
    return read_video(path, fps=pipe.spec.fps, size=pipe.size_of(scripts))


def _film(pipe, batch, out: Path, args: Any, *, first: int, many: bool, video) -> None:
    """Samples and writes one batch, with a progress bar."""
    from longlive_jax.sampling.recorder import Recording, file_name

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same remarks come as notes
        stream = pipe.stream(batch, video=video)
    for note in stream.notes:
        print(f"note: {note}", file=sys.stderr)
    names = [file_name(script.name, first + i, many) for i, script in enumerate(batch)]
    recording = Recording(out, stream.plan, names, stills=args.stills, latents=args.latents)
    try:
        with contextlib.closing(stream), recording:
            for frames in _shown(stream):
                recording.append(frames, stream.latents)
    finally:
        for take in recording.takes:
            if take.frames:
                seconds = take.frames / stream.plan.fps
                print(f"{take.path}: {take.frames} frames, {seconds:.1f} s")


def _shown(stream: "Stream") -> Iterator[Any]:
    """The chunks of a stream, with a bar: chunk, seconds of video, frames a second."""
    with ChunkBar(stream.plan.chunks, fps=stream.plan.fps) as bar:
        for chunk in stream:
            yield chunk
            bar.advance(chunk.shape[1], videos=chunk.shape[0])
