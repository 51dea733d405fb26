"""`longlive train --config=small_world:vae --workdir=DIR --out=CHECKPOINT`."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from longlive_jax.cli.app import Parser
from longlive_jax.cli.effects import note_train
from longlive_jax.cli.options import Command, parse_command
from longlive_jax.spec import UserError, build, nearest

FOLDERS = {
    "workdir": "the folder for metrics, pictures and checkpoints of the run, such as "
    "--workdir=runs/first",
    "out": "the checkpoint directory for the trained model, such as --out=checkpoints/first",
}


def main(argv: Sequence[str]) -> int:
    """Trains the stage of a config; resumes if `--workdir` has a checkpoint."""
    command = parse_command(_parser(), argv, "train")
    args = command.args
    for name in ("workdir", "out"):
        if not getattr(args, name):
            raise UserError(f"longlive train: --{name} is missing: {FOLDERS[name]}")
    if args.hosts is None:
        return _train(command)
    from longlive_jax.parallel.hosts import Hosts, abort_on_failure, join

    try:
        hosts = Hosts.parse(args.hosts)
    except ValueError as error:
        raise UserError(f"--hosts: {error}") from error
    join(hosts)
    return abort_on_failure(lambda: _train(command))


def _train(command: Command) -> int:
    """Trains in this process, which is one of several with `--hosts`."""
    import jax

    from longlive_jax.cli.stages import STAGES
    from longlive_jax.io.completeness import describe_missing
    from longlive_jax.parallel.hosts import gather_to_hosts, is_first_process
    from longlive_jax.training.loop import train

    # 1. Check the config and the folders.
    settings, args = command.settings, command.args
    name = settings.pop("stage", None)
    if name not in STAGES:
        raise UserError(f"unknown config.stage {name!r}{nearest(str(name), STAGES)}")
    stage = build(STAGES[name], settings)
    if is_first_process():
        note_train(command.given, stage)
    mesh = _mesh(stage.mesh)
    workdir, out = _check_folders(args)
    # 2. Train.
    logging.set_verbosity(logging.WARNING)  # Orbax logs many lines about every checkpoint
    began = time.perf_counter()
    task = stage.task(out, workdir, mesh)
    state = train(task, workdir, stage.loop)
    # 3. Export the weights.
    weights = gather_to_hosts(state.weights)
    if is_first_process():
        notes = task.export(jax.tree.map(lambda x: x.astype(stage.save_dtype), weights), out)
        minutes = (time.perf_counter() - began) / 60
        adapts = getattr(stage, "lora", None) is not None  # its notes say how to use it
        done = f"{name}: {int(state.step)} steps, {minutes:.1f} minutes"
        print(f"{done}; {'adapter' if adapts else 'checkpoint'} in {out}, curves in {workdir}")
        after = () if adapts else _next_step(out, describe_missing(out))
        print("\n".join([*(notes or ()), *after]))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        # A process that exits before the others counts as failed.
        multihost_utils.sync_global_devices("exported")
    return 0


def _next_step(out: Path, missing: str) -> tuple[str, ...]:
    """The command that uses a checkpoint, or what it still lacks; nothing for adapters alone."""
    from longlive_jax.io.completeness import PARTS, missing_parts

    if len(missing_parts(out)) == len(PARTS):
        return ()
    if missing:
        return (f"{out} {missing}",)
    folder = shlex.quote(str(out))
    return (f"sample from it: longlive sample --checkpoint={folder} --script=SCRIPT",)


def _mesh(spec: Any) -> Any:
    """The mesh over all devices, or over the first one if the config sets no mesh."""
    import jax

    from longlive_jax.parallel.mesh import make_mesh

    devices = jax.devices()
    if spec.size == 1 and len(devices) > 1 and jax.process_count() == 1:
        axes = "--config.mesh.data, .fsdp and .sp"
        print(f"Training on 1 of {len(devices)} devices. Set {axes} to use all of them.")
        devices = devices[:1]
    try:
        return make_mesh(spec, devices)
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from error


def _check_folders(args: Any) -> tuple[Path, Path]:
    """The work directory and the checkpoint directory, checked before anything is computed.

    Raises UserError if one of them cannot be used.
    """
    from longlive_jax.io.checkpoint import CheckpointWriter
    from longlive_jax.io.paths import check_writable

    workdir, out = check_writable(args.workdir), check_writable(args.out)
    if out.resolve() in (workdir.resolve(), *workdir.resolve().parents):
        raise UserError(f"--workdir {workdir} is inside --out {out}; choose a folder outside it")
    with CheckpointWriter(out, overwrite=True):
        pass  # refuses a folder with other files before training rather than after it
    return workdir, out


def _parser() -> Parser:
    parser = Parser("train", "Train the stage of a config; resumes if --workdir has a checkpoint.")
    parser.add_argument("--workdir", help="folder for metrics, pictures and checkpoints (required)")
    parser.add_argument("--out", help="checkpoint directory for the trained model (required)")
    parser.add_argument(
        "--hosts",
        help="processes of the run: auto (Slurm, MPI, Kubernetes) or HOST:PORT,PROCESSES,INDEX",
    )
    return parser
