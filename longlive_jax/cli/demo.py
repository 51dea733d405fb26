"""`longlive demo [--out=out/demo] [--seed=N] [--prompt="a red circle moves left on ..."]...`."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.app import Parser

DEFAULT_SEED = 7


def main(argv: Sequence[str]) -> int:
    """Samples and judges a short multi-shot video, by default with the built-in model."""
    args = _arguments(argv)
    clock_start = time.perf_counter()

    from longlive_jax.cli.progress import ChunkBar
    from longlive_jax.io.builtin import builtin_checkpoint
    from longlive_jax.io.paths import check_writable
    from longlive_jax.sampling.pipeline import Pipeline
    from longlive_jax.small_world.demo import SCALE, StageTimer, check_world, make_demo
    from longlive_jax.small_world.demo_script import held_out_script, script_from_prompts
    from longlive_jax.spec import UserError

    scale = SCALE if args.scale is None else args.scale
    if not 1 <= scale <= 32:
        raise UserError(f"--scale must be in [1, 32], got {scale}")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must be in [0, 2**32), got {args.seed}")
    out = check_writable(Path(args.out))

    # 1. Choose the script and load the model.
    prompts, seed = args.prompt, args.seed
    script = script_from_prompts(prompts, seed) if prompts else held_out_script(seed)
    timer = StageTimer(at=clock_start)
    timer.lap("importing")
    steps = {} if args.steps is None else {"steps": args.steps}
    pipe = Pipeline.from_checkpoint(args.checkpoint or builtin_checkpoint(), **steps)
    check_world(pipe)
    timer.lap("loading")

    # 2. Sample, judge and write.
    chunks = sum(shot.chunks or 0 for shot in script.shots)
    print(
        f"{len(script.shots)} shots, {pipe.spec.steps} steps per chunk; the first chunk includes "
        "compilation"
    )
    with ChunkBar(chunks, fps=pipe.spec.fps) as bar:
        files, report = make_demo(pipe, script, out, timer=timer, scale=scale, on_chunk=bar.advance)
    print_report(report, is_builtin=args.checkpoint is None)
    for path in (files.video, files.strip, files.report):
        print(path)
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("demo", __doc__ or "")
    parser.add_argument("--out", default="out/demo", help="directory for video, strip and report")
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="seed of script and sampling noise"
    )
    parser.add_argument("--prompt", action="append", help="prompt of one shot; repeat for more")
    parser.add_argument(
        "--checkpoint", help="small-world checkpoint directory (default: the built-in model)"
    )
    parser.add_argument("--steps", type=int, help="sampling steps per chunk")
    parser.add_argument("--scale", type=int, help="enlargement of the video file")
    return parser.parse_args(argv)


def print_report(report: dict, *, is_builtin: bool) -> None:
    """Prints the report as text; `is_builtin` explains the built-in model's known limit."""
    stages = report["stages"]
    print(
        f"{report['seconds']} s of video in {sum(stages.values()):.1f} s: "
        + ", ".join(f"{stage} {value:.1f} s" for stage, value in stages.items())
    )
    for note in report["notes"]:
        print(note)
    if report["judge"] is None:
        print("Not judged, because these prompts are not small-world captions:")
        for reason in report["not_judged"]:
            print(f"  {reason}")
        return
    print("Verdict of the judge:")
    for line in report["judge"]["words"]:
        print(f"  {line}")
    if is_builtin and not keeps_identity(report["judge"]):
        print("  Changes of identity are a known limit of the built-in model (4 M parameters).")


def keeps_identity(verdict: dict) -> bool:
    """Whether subjects keep their identity in every shot and whenever they return."""
    returns = verdict["returns"]
    return all(shot["identity_held"] for shot in verdict["shots"]) and all(
        back["same_mark"] and back["same_size"] for back in returns
    )
