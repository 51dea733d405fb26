"""`longlive train --config=configs/small_world.py:vae --workdir=DIR --out=CHECKPOINT`."""

import time
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from longlive_jax.cli.app import Parser, take_config
from longlive_jax.spec import UserError, build, nearest


def main(argv: Sequence[str]) -> int:
    """Trains the stage that the config names, resuming from `--workdir` if it holds a checkpoint."""
    config, rest = take_config(argv)
    parser = Parser("train", __doc__ or "")
    parser.add_argument("--workdir", required=True, help="metrics, pictures and resumable state")
    parser.add_argument("--out", required=True, help="checkpoint directory the result is written to")
    args = parser.parse_args(rest)
    settings = config.to_dict()
    name = settings.pop("stage", None)

    from longlive_jax.training.loop import train
    from longlive_jax.training.stages import STAGES

    if name not in STAGES:
        raise UserError(f"config.stage is {name!r}{nearest(str(name), STAGES)}")
    stage = build(STAGES[name], settings)
    workdir, out = Path(args.workdir), Path(args.out)
    logging.set_verbosity(logging.INFO)
    began = time.perf_counter()
    task = stage.task(out, workdir)
    state = train(task, workdir, loop=stage.loop, optim=stage.optim, ema=stage.ema)
    task.export(state.ema, out)
    minutes = (time.perf_counter() - began) / 60
    print(f"{name}: {int(state.step)} steps, {minutes:.1f} minutes; checkpoint in {out}, curves in {workdir}")
    return 0
