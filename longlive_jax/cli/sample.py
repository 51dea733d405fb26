"""`longlive sample --script=SCRIPT [--config=RECIPE] [--checkpoint=DIR] [--out=DIR]`.

Samples the videos of a shot script.
"""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.effects import SampleRun, note_sample
from longlive_jax.cli.options import parse_command
from longlive_jax.cli.progress import ChunkBar
from longlive_jax.spec import UserError, reject_unknown

if TYPE_CHECKING:
    from longlive_jax.sampling.pipeline import Pipeline
    from longlive_jax.sampling.script import ShotScript
    from longlive_jax.sampling.stream import Chunk, Stream


def main(argv: Sequence[str]) -> int:
    """Samples every video of a script; after Ctrl-C the finished chunks are a playable video."""
    # 1. Arguments, config and scripts.
    command = parse_command(_parser(), argv, "sample", default="small_world:sample")
    settings, args = command.settings, command.args
    reject_unknown(settings, ("checkpoint", "sample"), "config")
    scripts = _scripts(args)
    from longlive_jax.io.builtin import find_checkpoint
    from longlive_jax.io.paths import check_writable
    from longlive_jax.sampling.pipeline import Pipeline

    # 2. The model.
    out = check_writable(args.out)
    folder = find_checkpoint(args.checkpoint or settings.get("checkpoint"))
    pipe = Pipeline.from_checkpoint(folder, **(settings.get("sample") or {}))
    note_sample(command.given, SampleRun(pipe.spec, scripts, args))
    for line in pipe.describe_kernels():
        print(f"dit: {line}")
    video = _read_video(args.video, pipe, scripts)
    # 3. One batch after the other; sizes are checked before anything compiles.
    batches = [scripts[i : i + args.batch] for i in range(0, len(scripts), args.batch)]
    for batch in batches:
        pipe.engine.size_of(batch)
    for i, batch in enumerate(batches):
        first, many = i * args.batch, len(scripts) > 1
        _sample_batch(pipe, batch, out, args, first=first, many=many, video=video)
    return 0


def _parser() -> Parser:
    parser = Parser("sample", "Samples the videos of a shot script.")
    parser.add_argument("--script", required=True, help=".yaml, .json, .txt or a caption folder")
    parser.add_argument(
        "--checkpoint", help="override the config's checkpoint; may be a quantized one"
    )
    parser.add_argument("--out", default="out/sample", type=Path, help="folder for the files")
    parser.add_argument("--seed", type=int, help="override the script's seed")
    parser.add_argument(
        "--chunks", type=int, help="chunks per video, for text files and caption folders"
    )
    parser.add_argument("--chunks_per_shot", type=int, help="chunks per shot, for caption folders")
    parser.add_argument("--batch", type=int, default=1, help="videos sampled together")
    parser.add_argument("--video", help="a video file to continue")
    parser.add_argument(
        "--stills", type=int, default=8, help="pictures per shot in the strip (0 = no strip)"
    )
    parser.add_argument("--latents", action="store_true", help="also write [f, h, w, c] as .npy")
    return parser


def _scripts(args: Any) -> list["ShotScript"]:
    from longlive_jax.sampling.script import read_scripts

    if args.batch < 1:
        raise UserError(f"--batch must be >= 1, got {args.batch}")
    if args.stills < 0:
        raise UserError(f"--stills must be >= 0, got {args.stills}")
    scripts = read_scripts(args.script, chunks=args.chunks, chunks_per_shot=args.chunks_per_shot)
    if args.seed is None:
        return scripts
    return [
        dataclasses.replace(script, seed=(args.seed + i) % 2**32)
        for i, script in enumerate(scripts)
    ]


def _read_video(path: str | None, pipe: "Pipeline", scripts: list["ShotScript"]):
    """The frames of the video to continue, or None."""
    if path is None:
        return None
    from longlive_jax.io.video import read_video

    if len(scripts) > 1:
        raise UserError(f"--video continues one video, the script describes {len(scripts)}")
    return read_video(path, fps=pipe.spec.fps, size=pipe.engine.size_of(scripts))


def _sample_batch(pipe, batch, out: Path, args: Any, *, first: int, many: bool, video) -> None:
    """Samples one batch and writes its files, with a progress bar."""
    from longlive_jax.sampling.recorder import Recorder, file_name

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same remarks are among the notes
        stream = pipe.stream(batch, video=video)
    for note in stream.notes:
        print(f"note: {note}", file=sys.stderr)
    names = [file_name(script.name, first + i, many) for i, script in enumerate(batch)]
    recorder = Recorder(out, stream.timeline, names, stills=args.stills, latents=args.latents)
    try:
        with contextlib.closing(stream), recorder:
            for chunk in _with_progress(stream):
                recorder.append(chunk)
    finally:
        for files in recorder.videos:
            if files.frames:
                seconds = files.frames / stream.timeline.fps
                print(f"{files.path}: {files.frames} frames, {seconds:.1f} s")


def _with_progress(stream: "Stream") -> Iterator["Chunk"]:
    """The chunks of a stream, with a bar: chunk, seconds of video, frames per second."""
    with ChunkBar(stream.timeline.num_chunks, fps=stream.timeline.fps) as bar:
        for chunk in stream:
            yield chunk
            bar.advance(chunk.frames.shape[1], videos=chunk.frames.shape[0])
