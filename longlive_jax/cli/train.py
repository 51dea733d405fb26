"""`longlive train --config=configs/small_world.py:vae --workdir=DIR --out=CHECKPOINT`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from longlive_jax.cli.app import Parser, take_config
from longlive_jax.spec import UserError, build, nearest


def main(argv: Sequence[str]) -> int:
    """Trains the stage that the config names, resuming if `--workdir` holds a save."""
    config, rest = take_config(argv)
    args = _parser().parse_args(rest)
    if args.hosts is None:
        return _train(config.to_dict(), args)
    from longlive_jax.parallel.hosts import Hosts, join, leave_at_once

    try:
        hosts = Hosts.parse(args.hosts)
    except ValueError as error:
        raise UserError(f"--hosts: {error}") from error
    join(hosts)
    return leave_at_once(lambda: _train(config.to_dict(), args))


def _train(settings: dict[str, Any], args: Any) -> int:
    import jax

    from longlive_jax.cli.stages import STAGES
    from longlive_jax.parallel.hosts import first_process, readable
    from longlive_jax.training.loop import train

    name = settings.pop("stage", None)
    if name not in STAGES:
        raise UserError(f"config.stage is {name!r}{nearest(str(name), STAGES)}")
    stage = build(STAGES[name], settings)
    mesh = _mesh(stage.mesh)
    workdir, out = _places(args)
    logging.set_verbosity(logging.WARNING)  # Orbax's notes on every save are pages long
    began = time.perf_counter()
    task = stage.task(out, workdir, mesh)
    state = train(task, workdir, stage.loop)
    weights = readable(state.weights)
    if first_process():
        task.export(jax.tree.map(lambda x: x.astype(stage.save_dtype), weights), out)
        minutes = (time.perf_counter() - began) / 60
        done = f"{name}: {int(state.step)} steps, {minutes:.1f} minutes"
        print(f"{done}; checkpoint in {out}, curves in {workdir}")
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("exported")  # who leaves early is taken for dead
    return 0


def _mesh(spec: Any) -> Any:
    """The mesh over all devices; over the first one if no mesh was asked for."""
    import jax

    from longlive_jax.parallel.mesh import make_mesh

    devices = jax.devices()
    if spec.size == 1 and len(devices) > 1 and jax.process_count() == 1:
        axes = "config.mesh.data, .fsdp and .sp"
        print(f"Training on 1 of {len(devices)} devices; {axes} say how to use them all.")
        devices = devices[:1]
    try:
        return make_mesh(spec, devices)
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error


def _places(args: Any) -> tuple[Path, Path]:
    """Work directory and checkpoint directory, checked before anything is computed."""
    from longlive_jax.io.checkpoint import CheckpointWriter
    from longlive_jax.io.paths import check_writable

    workdir, out = check_writable(args.workdir), check_writable(args.out)
    if out.resolve() in (workdir.resolve(), *workdir.resolve().parents):
        raise UserError(f"--workdir {workdir} lies in --out {out}; choose a folder beside it")
    with CheckpointWriter(out, overwrite=True):
        pass  # refuses a folder of other files now, not when the training is over
    return workdir, out


def _parser() -> Parser:
    parser = Parser("train", __doc__ or "")
    parser.add_argument("--workdir", required=True, help="metrics, pictures and resumable state")
    parser.add_argument("--out", required=True, help="checkpoint directory of the result")
    parser.add_argument(
        "--hosts",
        help="for several processes: auto (Slurm, MPI, Kubernetes) or HOST:PORT,PROCESSES,INDEX",
    )
    return parser
