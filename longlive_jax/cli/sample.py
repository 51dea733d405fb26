"""`longlive sample --script=SCRIPT [--checkpoint=DIR] [--out=DIR] [--format=mp4,gif]`.

Samples the videos of a shot script, and writes each with a strip of stills and a record. A record
is a script, too: `--script=out/sample/video.json` samples the same video again.
"""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.adapters import adapted_pipeline, read_adapters, stated_settings
from longlive_jax.cli.app import Parser
from longlive_jax.cli.effects import SampleRun, note_sample
from longlive_jax.cli.interruption import Interruption
from longlive_jax.cli.notes import print_notes
from longlive_jax.cli.options import Command, parse_command
from longlive_jax.cli.progress import ChunkBar
from longlive_jax.spec import Failure, UserError, reject_unknown

if TYPE_CHECKING:
    from longlive_jax.sampling.pipeline import Pipeline
    from longlive_jax.sampling.recorder import Recorder, VideoFiles
    from longlive_jax.sampling.script import ShotScript

MAX_SCALE = 32
"""Largest enlargement of the frames in video files."""


def main(argv: Sequence[str]) -> int:
    """Samples every video of a script.

    After Ctrl-C or SIGTERM the finished chunks are a playable video; the exit code is 130 or 143.
    """
    command = parse_command(_parser(), argv, "sample", default="small_world:sample")
    reject_unknown(command.settings, ("checkpoint", "sample"), "config")
    has_recipe = any(word.split("=")[0] in ("--config", "--config.checkpoint") for word in argv)
    with Interruption() as interruption:
        _run(command, ["longlive", "sample", *argv], interruption, has_recipe=has_recipe)
    return 0


def _parser() -> Parser:
    parser = Parser("sample", "Samples the videos of a shot script.")
    # What to sample.
    parser.add_argument(
        "--script",
        required=True,
        help=".yaml, .json, .txt, a caption folder, or the record of an earlier video",
    )
    parser.add_argument(
        "--checkpoint", help="override the config's checkpoint; may be a quantized one"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="PATH[:SCALE]",
        help="adapter to plug in: a directory of ours, PEFT's folder, a safetensors or .pt file; "
        "may be given several times",
    )
    parser.add_argument("--out", default="out/sample", type=Path, help="folder for the files")
    parser.add_argument("--seed", type=int, help="override the script's seed")
    parser.add_argument(
        "--chunks", type=int, help="chunks per video, for text files and caption folders"
    )
    parser.add_argument("--chunks_per_shot", type=int, help="chunks per shot, for caption folders")
    parser.add_argument("--batch", type=int, default=1, help="videos sampled together")
    parser.add_argument(
        "--video", help="a video file to continue; the new one begins after its last frame"
    )
    parser.add_argument(
        "--video_cuts",
        help="first frame of every shot of --video but the first, such as 48,96, at the model's "
        "frame rate",
    )
    # What to write.
    parser.add_argument(
        "--stills", type=int, default=8, help="pictures per shot in the strip (0 = no strip)"
    )
    parser.add_argument("--latents", action="store_true", help="also write [f, h, w, c] as .npy")
    add_video_options(parser)
    return parser


def add_video_options(parser: Parser) -> None:
    """Adds the options for the files of a video."""
    parser.add_argument(
        "--format", default="mp4", help="mp4, webm, gif, png, or several separated by commas"
    )
    parser.add_argument(
        "--scale",
        type=int,
        help="integer enlargement of the frames in videos (default: small ones up to 384 pixels)",
    )


def check_scale(scale: int | None) -> None:
    """Raises UserError unless `--scale` is in its range."""
    if scale is not None and not 1 <= scale <= MAX_SCALE:
        raise UserError(f"--scale must be in [1, {MAX_SCALE}], got {scale}")


def _run(
    command: Command, words: Sequence[str], interruption: Interruption, *, has_recipe: bool
) -> None:
    """Loads the model and samples one batch after the other."""
    # 1. Arguments and scripts.
    from longlive_jax.io.paths import check_writable
    from longlive_jax.io.video import parse_formats
    from longlive_jax.sampling.record import differences, read_record, run_record
    from longlive_jax.sampling.recorder import check_files

    args = command.args
    check_scale(args.scale)
    cuts = _video_cuts(args)
    formats = parse_formats(args.format)
    scripts = _scripts(args)
    out = check_writable(args.out)
    record = read_record(args.script)
    # 2. The model.
    pipe, folder = _load(command, record, has_recipe=has_recipe)
    note_sample(command.given, SampleRun(pipe.spec, scripts, args))
    for line in pipe.describe_kernels():
        print(f"dit: {line}")
    past = {"video": _read_video(args.video, pipe, scripts)}
    if cuts:
        past["video_cuts"] = cuts
    continues = {"path": args.video, "cuts": list(cuts)} if args.video else None
    facts = {"source": args.script, "continues": continues, "adapters": pipe.adapters.plugged}
    run = run_record(pipe.spec, folder, command=words, **facts)
    print_notes(() if record is None else differences(record, run))
    # 3. One batch after the other; sizes are checked before anything compiles.
    batches = [scripts[i : i + args.batch] for i in range(0, len(scripts), args.batch)]
    for batch in batches:
        check_files(pipe.engine.size_of(batch), formats, args.scale)
    for i, batch in enumerate(batches):
        first, many = i * args.batch, len(scripts) > 1
        batch_run = _Batch(batch, out, formats, run, first=first, many=many, past=past)
        _sample_batch(pipe, batch_run, args, interruption)


def _load(
    command: Command, record: Mapping[str, Any] | None, *, has_recipe: bool
) -> tuple["Pipeline", Path]:
    """The pipeline with its adapters, and the checkpoint directory.

    Settings are those of the command line, of its adapters, of the record, of the recipe, and of
    the checkpoint, the first that there is; adapters of the record come with its settings.
    """
    from longlive_jax.io.builtin import find_checkpoint
    from longlive_jax.sampling.record import recorded_settings

    args, settings = command.args, command.settings
    sample, checkpoint = settings.get("sample") or {}, settings.get("checkpoint")
    chosen: Collection[str] = stated_settings(command)
    if record is not None:
        sample = recorded_settings(record) | sample
        recorded = record.get("checkpoint", {}).get("path")
        checkpoint = checkpoint if has_recipe else recorded
        chosen = chosen if args.adapter is not None else set(sample)
    folder = find_checkpoint(args.checkpoint or checkpoint)
    return adapted_pipeline(folder, sample, read_adapters(args.adapter, record), chosen), folder


def _scripts(args: Any) -> list["ShotScript"]:
    from longlive_jax.sampling.inputs import with_seed
    from longlive_jax.sampling.script import read_scripts

    if args.batch < 1:
        raise UserError(f"--batch must be >= 1, got {args.batch}")
    if args.stills < 0:
        raise UserError(f"--stills must be >= 0, got {args.stills}")
    scripts = read_scripts(args.script, chunks=args.chunks, chunks_per_shot=args.chunks_per_shot)
    return scripts if args.seed is None else with_seed(scripts, args.seed)


def _read_video(path: str | None, pipe: "Pipeline", scripts: list["ShotScript"]):
    """The frames of the video to continue, uint8 at the size of the script, or None."""
    if path is None:
        return None
    from longlive_jax.io.video import read_frames

    if len(scripts) > 1:
        raise UserError(f"--video continues one video, the script describes {len(scripts)}")
    return read_frames(path, fps=pipe.spec.fps, size=pipe.engine.size_of(scripts))


def _video_cuts(args: Any) -> tuple[int, ...]:
    """The frames of `--video_cuts`. Raises UserError for anything but numbers and commas."""
    text = args.video_cuts
    if text and not args.video:
        raise UserError("--video_cuts describes a video to continue; give --video, too")
    try:
        return tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise UserError(f"--video_cuts must be frames such as 48,96, got {text!r}") from None


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Videos that are sampled together.

    Attributes:
      scripts: their scripts.
      out: folder of their files.
      formats: formats of the videos.
      run: record of the run.
      first: index of the first of them in the run.
      many: whether the run has several videos.
      past: the video to continue and its cuts, as options of `Pipeline.stream`.
    """

    scripts: list["ShotScript"]
    out: Path
    formats: tuple[str, ...]
    run: Mapping[str, Any]
    first: int
    many: bool
    past: Mapping[str, Any]


def _sample_batch(pipe: "Pipeline", batch: _Batch, args: Any, interruption: Interruption) -> None:
    """Samples one batch and writes its files, with a progress bar."""
    # 1. The stream and its files.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same remarks are among the notes
        stream = pipe.stream(batch.scripts, **batch.past)
    recorder = _recorder(batch, stream, pipe.engine.size_of(batch.scripts), args)
    bar = ChunkBar(stream.timeline.num_chunks, fps=stream.timeline.fps)
    # 2. Sample. Files are finished first and then the computations in flight.
    with contextlib.closing(stream), interruption.deferred():
        try:
            with bar:
                for chunk in interruption.waiting(stream):
                    recorder.append(chunk)
                    bar.advance(chunk.frames.shape[1], videos=chunk.frames.shape[0])
        finally:
            finish(recorder)


def _recorder(batch: _Batch, stream: Any, size: tuple[int, int], args: Any) -> "Recorder":
    """The recorder of a batch; remarks are printed."""
    from longlive_jax.sampling.record import video_record
    from longlive_jax.sampling.recorder import Recorder, file_name, video_path

    # 1. Remarks and names.
    print_notes(stream.notes)
    names = [
        file_name(script.name, batch.first + i, batch.many)
        for i, script in enumerate(batch.scripts)
    ]
    paths = (video_path(batch.out, name, form) for name in names for form in batch.formats)
    print_notes(f"replaces the existing {path}" for path in paths if path.exists())
    # 2. Records, which are also the tags of the videos.
    records = [
        video_record(batch.run, script, size, notes=stream.notes, batch=len(batch.scripts), index=i)
        for i, script in enumerate(batch.scripts)
    ]
    return Recorder(
        batch.out,
        stream.timeline,
        names,
        stills=args.stills,
        latents=args.latents,
        formats=batch.formats,
        scale=args.scale,
        records=records,
    )


def finish(recorder: "Recorder") -> None:
    """Closes a recorder and prints every file that it has written.

    Raises Failure for a file that cannot be finished, unless another exception is on its way.
    """
    is_failing = sys.exception() is not None
    try:
        recorder.close()
    except Failure:
        if not is_failing:
            raise
    finally:
        for files in recorder.videos:
            print_notes(files.notes)
            for line in file_lines(files):
                print(line)


def file_lines(files: "VideoFiles") -> list[str]:
    """The paths of a video's files, the first one with its length and size."""
    if not (paths := files.paths()):
        return []
    height, width = files.size
    enlarged = f", enlarged {files.scale} times" if files.scale > 1 else ""
    about = dict.fromkeys(files.unfinished(), "not finished, but can be played")
    if paths[0] not in about:
        about[paths[0]] = (
            f"{files.frames} frames, {files.seconds:.1f} s, {width}x{height} pixels{enlarged}"
        )
    return [f"{path}: {about[path]}" if path in about else str(path) for path in paths]
