"""`longlive compare MODEL MODEL ... --script=SCRIPT [--out=DIR] [--seed=N]`.

Samples one script with several models, precisions, numbers of steps or caches, from the same noise,
and writes them side by side: a strip of stills, a video, each video on its own with its record, and
a report. A model is a checkpoint and settings, such as:

    longlive compare small_world small_world,steps=2 steps=2,quant=nvfp4,name=packed \\
        --script=shots.yaml
"""

import contextlib
import dataclasses
import gc
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.adapters import stated_settings
from longlive_jax.cli.app import Parser
from longlive_jax.cli.compare_models import ComparedModel, check_comparable, find_models
from longlive_jax.cli.interruption import Interruption
from longlive_jax.cli.notes import print_notes
from longlive_jax.cli.options import parse_command
from longlive_jax.cli.progress import ChunkBar
from longlive_jax.cli.sample import add_video_options, check_scale, finish
from longlive_jax.spec import UserError, reject_unknown

if TYPE_CHECKING:
    from longlive_jax.cli.compare_files import ComparedVideo, ComparisonFiles
    from longlive_jax.sampling.pipeline import Pipeline
    from longlive_jax.sampling.script import ShotScript

MAX_STILLS = 64
"""Most pictures per shot in a strip."""


def main(argv: Sequence[str]) -> int:
    """Samples a script with every model.

    After Ctrl-C or SIGTERM the videos sampled so far can be played; the exit code is 130 or 143.
    """
    command = parse_command(_parser(), argv, "sample", default="small_world:sample")
    reject_unknown(command.settings, ("checkpoint", "sample"), "config")
    args, sample = command.args, command.settings.get("sample") or {}
    # 1. Check everything that needs no weights.
    from longlive_jax.cli.compare_files import ComparisonFiles, check_formats

    check_scale(args.scale)
    if args.stills is not None and not 1 <= args.stills <= MAX_STILLS:
        raise UserError(f"--stills must be in [1, {MAX_STILLS}], got {args.stills}")
    script = _script(args)
    checkpoint = args.checkpoint or command.settings.get("checkpoint")
    models = find_models(args.models, checkpoint, sample, stated_settings(command))
    check_comparable(models, script)
    files = ComparisonFiles(
        args.out,
        script,
        tuple(model.name for model in models),
        script.size or models[0].spec.size,
        formats=check_formats(args.format),
        scale=args.scale,
        stills=args.stills,
    )
    # 2. Sample, and write what the videos have in common.
    run = _Run(script, files, ("longlive", "compare", *argv), args.script)
    with Interruption() as interruption:
        run.sample_all(models, interruption)
    return 0


def _parser() -> Parser:
    parser = Parser("compare", __doc__ or "")
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="CHECKPOINT,KEY=VALUE,...: a checkpoint directory or small_world, settings as in "
        "--config.sample.KEY, adapter=PATH[:SCALE], and name=LABEL",
    )
    parser.add_argument(
        "--script",
        required=True,
        help="script of one video: .yaml, .json, .txt, a caption folder, or the record of a video",
    )
    parser.add_argument("--checkpoint", help="checkpoint of models that name none")
    parser.add_argument("--out", default="out/compare", type=Path, help="folder for the files")
    parser.add_argument("--seed", type=int, help="override the script's seed")
    parser.add_argument(
        "--chunks", type=int, help="chunks of the video, for text files and caption folders"
    )
    parser.add_argument("--chunks_per_shot", type=int, help="chunks per shot, for caption folders")
    parser.add_argument(
        "--stills", type=int, help="pictures per shot in the strip (default: 8 in all, or 1 each)"
    )
    add_video_options(parser)
    return parser


def _script(args: Any) -> "ShotScript":
    """The script, with the seed of the command line. Raises UserError unless it is one video."""
    from longlive_jax.sampling.inputs import with_seed
    from longlive_jax.sampling.script import read_scripts

    scripts = read_scripts(args.script, chunks=args.chunks, chunks_per_shot=args.chunks_per_shot)
    if len(scripts) > 1:
        raise UserError(f"{args.script} has {len(scripts)} videos; compare takes a script of one")
    return (scripts if args.seed is None else with_seed(scripts, args.seed))[0]


@dataclasses.dataclass(frozen=True)
class _Run:
    """A comparison.

    Attributes:
      script: what to sample.
      files: where it is written.
      command: the words of the command line.
      source: path of the script.
    """

    script: "ShotScript"
    files: "ComparisonFiles"
    command: tuple[str, ...]
    source: str

    def sample_all(self, models: Sequence[ComparedModel], interruption: Interruption) -> None:
        """Samples model by model, with one set of weights in memory at a time."""
        videos: dict[str, ComparedVideo] = {}
        with contextlib.ExitStack() as stack:
            try:
                for weights in dict.fromkeys(model.weights for model in models):
                    group = [model for model in models if model.weights == weights]
                    self._sample_group(group, videos, stack, interruption)
                    gc.collect()  # frees the weights before the next ones are loaded
            finally:
                self.files.write_report([videos[m.name] for m in models if m.name in videos])
            with interruption.deferred():
                for path in self.files.write([videos[model.name] for model in models]):
                    print(path)
        print(self.files.report_path)
        print_notes(self.files.notes)

    def _sample_group(
        self,
        models: Sequence[ComparedModel],
        videos: "dict[str, ComparedVideo]",
        stack: contextlib.ExitStack,
        interruption: Interruption,
    ) -> None:
        """Samples models that share weights, and adds their videos to `videos`."""
        from longlive_jax.sampling.pipeline import Pipeline
        from longlive_jax.sampling.settings import LOADED_WITH

        begin = time.perf_counter()
        pipe = Pipeline.from_checkpoint(models[0].folder, **models[0].settings)
        loading = time.perf_counter() - begin
        for line in pipe.describe_kernels():
            print(f"{models[0].name}: {line}")
        for model in models:
            values = {k: v for k, v in vars(model.spec).items() if k not in LOADED_WITH}
            own = Pipeline(pipe.engine.with_settings(**values), chosen=model.chosen)
            if model.adapters:
                own = own.with_adapter(*map(list, zip(*model.adapters, strict=True)))
            videos[model.name] = video = self._video(model, own, loading)
            stack.enter_context(video.spool)
            self._sample(own, video, interruption)

    def _video(self, model: ComparedModel, pipe: "Pipeline", loading: float) -> "ComparedVideo":
        """The video of a model, before it is sampled."""
        from longlive_jax.sampling.record import run_record

        run = run_record(
            pipe.spec,
            model.folder,
            command=self.command,
            source=self.source,
            adapters=pipe.adapters.plugged,
        )
        return self.files.begin(model.name, run, model.given, loading)

    def _sample(self, pipe: "Pipeline", video: "ComparedVideo", interruption: Interruption) -> None:
        """Samples a video and writes its own files, with a progress bar."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the same remarks are among the notes
            stream = pipe.stream(self.script)
        print_notes(f"{video.name}: {note}" for note in stream.notes)
        recorder = self.files.recorder(video, stream.timeline, stream.notes)
        bar = ChunkBar(stream.timeline.num_chunks, fps=stream.timeline.fps, text=video.name)
        video.begin(stream.timeline)
        with contextlib.closing(stream), interruption.deferred():
            try:
                with bar:
                    for chunk in interruption.waiting(stream):
                        recorder.append(chunk)
                        video.append(chunk.frames[0])
                        bar.advance(chunk.frames.shape[1])
            finally:
                finish(recorder)
