"""`longlive demo [--out=out/demo] [--seed=N] [--prompt="a red circle moves left on ..."]...`."""

import time
from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.app import Parser

DEFAULT_SEED = 7


def main(argv: Sequence[str]) -> int:
    """A multi-shot video from the built-in model into `--out`, and the judge's opinion of it."""
    parser = Parser("demo", __doc__ or "")
    parser.add_argument("--out", default="out/demo", help="folder for video, strip and report")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="of the story and the noise")
    parser.add_argument("--prompt", action="append", help="a shot of your own; may be repeated")
    parser.add_argument("--checkpoint", help="another small-world model than the built-in one")
    parser.add_argument("--steps", type=int, help="model calls per chunk")
    parser.add_argument("--scale", type=int, help="enlargement of the video file")
    args = parser.parse_args(argv)
    clock_start = time.perf_counter()

    from longlive_jax.cli.progress import ChunkBar
    from longlive_jax.io.builtin import builtin_checkpoint
    from longlive_jax.io.video import check_writable
    from longlive_jax.sampling.pipeline import Pipeline
    from longlive_jax.small_world.demo import SCALE, Clock, check_world, film
    from longlive_jax.small_world.demo_script import held_out_story, story_of
    from longlive_jax.spec import UserError

    scale = SCALE if args.scale is None else args.scale
    if not 1 <= scale <= 32:
        raise UserError(f"--scale is {scale}; choose 1 to 32")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}; it must lie in [0, 2**32)")
    out = check_writable(Path(args.out))
    script = story_of(args.prompt, args.seed) if args.prompt else held_out_story(args.seed)
    clock = Clock(at=clock_start)
    clock.lap("importing")
    steps = {} if args.steps is None else {"steps": args.steps}
    pipe = Pipeline.from_checkpoint(args.checkpoint or builtin_checkpoint(), **steps)
    check_world(pipe)
    clock.lap("loading")
    chunks = sum(shot.chunks or 0 for shot in script.shots)
    print(f"{len(script.shots)} shots, {pipe.spec.steps} steps a chunk; the first one compiles")
    with ChunkBar(chunks, fps=pipe.spec.fps) as bar:
        files, report = film(pipe, script, out, clock=clock, scale=scale, on_chunk=bar.advance)
    show(report)
    for path in (files.video, files.strip, files.report):
        print(path)
    return 0


def show(report: dict) -> None:
    """The report in words."""
    stages = report["stages"]
    print(
        f"{report['seconds']} s of video in {sum(stages.values()):.1f} s: "
        + ", ".join(f"{stage} {value:.1f} s" for stage, value in stages.items())
    )
    for note in report["notes"]:
        print(note)
    if report["judge"] is None:
        print("The judge knows only captions of the small world and says nothing of this:")
        for reason in report["not_judged"]:
            print(f"  {reason}")
        return
    print("The judge says:")
    for line in report["judge"]["words"]:
        print(f"  {line}")
