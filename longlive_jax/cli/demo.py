"""`longlive demo [--out=out/demo] [--seed=N] [--prompt="a red circle moves left on ..."]...`."""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_jax.cli.app import Parser
from longlive_jax.cli.imports import uncollected_imports
from longlive_jax.cli.interruption import Interruption
from longlive_jax.cli.notes import print_notes
from longlive_jax.cli.sample import check_scale, finish
from longlive_jax.spec import Failure, UserError

if TYPE_CHECKING:
    from longlive_jax.sampling.pipeline import Pipeline
    from longlive_jax.sampling.script import ShotScript
    from longlive_jax.small_world.demo import DemoFiles, StageTimer

DEFAULT_SEED = 0
"""A seed with which the judge finds every caption and every cut right."""
EXAMPLE = "shots: [{prompt: a red circle moves left on a mint background, seconds: 4}]"
"""A script that can be written by hand."""


def main(argv: Sequence[str]) -> int:
    """Samples and judges a short multi-shot video, by default with the built-in model.

    After Ctrl-C or SIGTERM the finished chunks are a playable video; the exit code is 130 or 143.
    """
    args = _arguments(argv)
    clock_start = time.perf_counter()
    # The judge's matrix products are small, so the threads of NumPy's BLAS would mostly wait for
    # each other, and busily. OpenBLAS reads this when NumPy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with Interruption() as interruption:
        _run(args, ["longlive", "demo", *argv], interruption, clock_start)
    return 0


def _run(
    args: argparse.Namespace, command: Sequence[str], interruption: Interruption, clock: float
) -> None:
    """Loads the model, samples, and prints what was written and how good it is."""
    # 1. Choose the script and load the model.
    with uncollected_imports():
        from longlive_jax.io.builtin import find_checkpoint
        from longlive_jax.io.paths import check_writable
        from longlive_jax.sampling.pipeline import Pipeline
        from longlive_jax.sampling.record import run_record
        from longlive_jax.small_world.demo import StageTimer, check_world
        from longlive_jax.small_world.demo_script import held_out_script, script_from_prompts

    check_scale(args.scale)
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed must be in [0, 2**32), got {args.seed}")
    check_writable(args.out)
    prompts, seed = args.prompt, args.seed
    script = script_from_prompts(prompts, seed) if prompts else held_out_script(seed)
    timer = StageTimer(at=clock)
    timer.lap("importing")
    steps = {} if args.steps is None else {"steps": args.steps}
    folder = find_checkpoint(args.checkpoint)
    pipe = Pipeline.from_checkpoint(folder, **steps)
    check_world(pipe)
    timer.lap("loading")

    # 2. Sample, judge and write.
    print(
        f"{len(script.shots)} shots, {pipe.spec.steps} steps per chunk; the first chunk includes "
        "compilation"
    )
    run = run_record(pipe.spec, folder, command=command)
    files, report = _make(pipe, script, run, args, timer, interruption)
    for path in filter(None, (files.gif, files.report)):
        print(path)
    is_builtin = folder.resolve() == find_checkpoint().resolve()
    print_report(report, is_builtin=is_builtin)
    print(f"Your own shots: write them to shots.yaml, such as {EXAMPLE}")
    print(f"and run {_program()} sample --script=shots.yaml")


def _make(
    pipe: "Pipeline",
    script: "ShotScript",
    run: dict[str, Any],
    args: argparse.Namespace,
    timer: "StageTimer",
    interruption: Interruption,
) -> tuple["DemoFiles", dict[str, Any]]:
    """`make_demo` with a progress bar; signals leave finished files."""
    from longlive_jax.cli.progress import ChunkBar
    from longlive_jax.small_world.demo import DemoHooks, make_demo

    chunks = sum(shot.chunks or 0 for shot in script.shots)
    bar = ChunkBar(chunks, fps=pipe.spec.fps)
    hooks = DemoHooks(on_chunk=bar.advance, wait=interruption.waiting, finish=finish)
    try:
        with interruption.deferred(), bar:
            return make_demo(
                pipe, script, args.out, timer=timer, run=run, scale=args.scale, gif=args.gif,
                hooks=hooks,
            )  # fmt: skip
    except OSError as error:  # the writers of videos raise Failures; this is the report
        raise Failure(
            f"{args.out}: cannot be written ({error.strerror or error}); free some space or choose "
            "another folder with --out"
        ) from error


def _program() -> str:
    """How the user starts this program."""
    if shutil.which("longlive"):
        return "longlive"
    script = Path(".venv/bin/longlive")
    return str(script) if script.exists() else f"{Path(sys.executable).name} -m longlive_jax"


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser("demo", __doc__ or "")
    parser.add_argument(
        "--out", default="out/demo", type=Path, help="folder for video, strip, record and report"
    )
    parser.add_argument(
        "--seed", type=int, default=DEFAULT_SEED, help="seed of script and sampling noise"
    )
    parser.add_argument("--prompt", action="append", help="prompt of one shot; repeat for more")
    parser.add_argument(
        "--checkpoint", help="small-world checkpoint directory (default: the built-in model)"
    )
    parser.add_argument("--steps", type=int, help="sampling steps per chunk")
    parser.add_argument("--scale", type=int, help="integer enlargement of the video (default: 6)")
    parser.add_argument(
        "--gif", action="store_true", help="also write video.gif, looping, with captions"
    )
    return parser.parse_args(argv)


def print_report(report: dict, *, is_builtin: bool) -> None:
    """Prints the report as text; `is_builtin` explains the built-in model's known limit."""
    stages = report["stages"]
    print(
        f"{report['seconds']} s of video in {sum(stages.values()):.1f} s: "
        + ", ".join(f"{stage} {value:.1f} s" for stage, value in stages.items())
    )
    print_notes(report["notes"])
    if report["judge"] is None:
        print("Not judged, because these prompts are not small-world captions:")
        for reason in report["not_judged"]:
            print(f"  {reason}")
        return
    print("The judge, which reads the pixels without a model:")
    for line in report["judge"]["words"]:
        print(f"  {line}")
    if is_builtin and not keeps_identity(report["judge"]):
        print(
            "  (A known limit of the built-in model, of 4 M parameters: it does not keep identity.)"
        )


def keeps_identity(verdict: dict) -> bool:
    """Whether subjects keep their identity in every shot and whenever they return."""
    returns = verdict["returns"]
    return all(shot["identity_held"] for shot in verdict["shots"]) and all(
        back["same_mark"] and back["same_size"] for back in returns
    )
