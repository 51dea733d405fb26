"""`longlive train --config=configs/small_world.py:vae --workdir=DIR --out=CHECKPOINT`."""

import time
from collections.abc import Sequence

from absl import logging

from longlive_jax.cli.app import Parser, take_config
from longlive_jax.spec import UserError, build, nearest


def main(argv: Sequence[str]) -> int:
    """Trains the stage that the config names, resuming if `--workdir` holds a checkpoint."""
    config, rest = take_config(argv)
    args = _parser().parse_args(rest)
    settings = config.to_dict()
    name = settings.pop("stage", None)

    import jax

    from longlive_jax.io.checkpoint import CheckpointWriter
    from longlive_jax.io.video import check_writable
    from longlive_jax.training.loop import train
    from longlive_jax.training.stages import STAGES

    if name not in STAGES:
        raise UserError(f"config.stage is {name!r}{nearest(str(name), STAGES)}")
    stage = build(STAGES[name], settings)
    workdir, out = check_writable(args.workdir), check_writable(args.out)
    if out.resolve() in (workdir.resolve(), *workdir.resolve().parents):
        raise UserError(f"--workdir {workdir} lies in --out {out}; choose a folder beside it")
    with CheckpointWriter(out, overwrite=True):
        pass  # refuses a folder of other files now, not when the training is over
    logging.set_verbosity(logging.WARNING)  # Orbax's notes on every save are pages long
    began = time.perf_counter()
    task = stage.task(out, workdir)
    state = train(task, workdir, loop=stage.loop, optim=stage.optim, ema=stage.ema)
    task.export(jax.tree.map(lambda x: x.astype(stage.save_dtype), state.ema), out)
    minutes = (time.perf_counter() - began) / 60
    done = f"{name}: {int(state.step)} steps, {minutes:.1f} minutes"
    print(f"{done}; checkpoint in {out}, curves in {workdir}")
    return 0


def _parser() -> Parser:
    parser = Parser("train", __doc__ or "")
    parser.add_argument("--workdir", required=True, help="metrics, pictures and resumable state")
    parser.add_argument("--out", required=True, help="checkpoint directory of the result")
    return parser
