"""The loop: resume, then step, log, evaluate and save until done.

Batches are a function of the step, so a run that stops anywhere and resumes sees what it would have
seen without the stop.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longlive_jax.training.metrics import MetricsLog, mean_of, plot_curves
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.state import Params, TrainState, init_state
from longlive_jax.training.step import EMASpec, LossFn, make_train_step


@dataclasses.dataclass(frozen=True)
class LoopSpec:
    """Length and rhythm of a run, in updates. `patience` non-finite updates in a row stop it."""

    steps: int = 600
    log_every: int = 20
    eval_every: int = 0
    save_every: int = 200
    keep: int = 2
    patience: int = 20
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: parameters, a loss, a batch for every step, and what to look at on the way.

    Attributes:
      init: key -> parameters.
      loss_fn: (params, batch, key) -> (loss, metrics).
      batches: `batches[i]` is the batch of step i; a worker thread makes it while the device works.
      evaluate: (averaged params, step, workdir) -> numbers; may write pictures to the workdir.
      export: (averaged params, directory) writes what the run was for.
    """

    init: Callable[[jax.Array], Params]
    loss_fn: LossFn
    batches: Sequence[Any]
    evaluate: Callable[[Params, int, pathlib.Path], dict[str, float]]
    export: Callable[[Params, pathlib.Path], None]


def train(
    task: Task, workdir: pathlib.Path, *, loop: LoopSpec, optim: OptimSpec, ema: EMASpec
) -> TrainState:
    """Trains `task` in `workdir`, continuing from its last checkpoint if it has one.

    Raises:
      FloatingPointError: after `loop.patience` updates in a row without a finite loss and gradient.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    tx = make_optimizer(optim, loop.steps)
    state = init_state(jax.jit(task.init)(jax.random.key(loop.seed)), tx)
    options = ocp.CheckpointManagerOptions(max_to_keep=loop.keep)
    with ocp.CheckpointManager((workdir / "state").absolute(), options=options) as manager:
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
        step_fn = make_train_step(task.loss_fn, tx, ema, loop.seed)
        log = MetricsLog(workdir, resume_at=int(state.step))
        try:
            state = _run(state, step_fn, task, manager, log, loop, workdir)
        finally:
            plot_curves(log.records, workdir / "curves.png")
    return state


def _run(
    state, step_fn, task: Task, manager, log: MetricsLog, loop: LoopSpec, workdir
) -> TrainState:
    start = int(state.step)
    window: list[dict] = []
    began = time.perf_counter()
    with _progress() as bar:
        if start:
            _say(bar, f"Resumed from step {start} of {workdir}.")
        line = bar.add_task("train", total=loop.steps, completed=start, note="compiling")
        steps = range(start, loop.steps)
        for i, batch in zip(steps, _prefetched(task.batches, start), strict=False):
            state, metrics = step_fn(state, batch)
            window.append(metrics)
            done = i + 1
            if done % loop.log_every == 0 or done == loop.steps:
                values = mean_of(window)
                values["steps_per_s"] = len(window) / (time.perf_counter() - began)
                log.write(done, values)
                bar.update(line, completed=done, note=f"loss {values['loss']:.4f}")
                _stop_if_diverged(int(metrics["bad_steps"]), done, loop.patience)
                window, began = [], time.perf_counter()
            if (loop.eval_every and done % loop.eval_every == 0) or done == loop.steps:
                log.write(done, task.evaluate(state.ema, done, workdir))
                plot_curves(log.records, workdir / "curves.png")
                began = time.perf_counter()
            if done % loop.save_every == 0 or done == loop.steps:
                manager.save(done, args=ocp.args.StandardSave(state))
                began = time.perf_counter()
    return state


def _prefetched(batches: Sequence[Any], start: int):
    """Batches from `start` on, a few ahead of the device, in order."""
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=3)
    return iter(grain.MapDataset.source(batches)[start:].to_iter_dataset(options))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"))


def _say(bar: Progress, text: str) -> None:
    bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _stop_if_diverged(bad_steps: int, step: int, patience: int) -> None:
    if bad_steps >= patience:
        raise FloatingPointError(
            f"loss or gradient was not finite in the last {bad_steps} updates before step {step}; "
            "the last checkpoint is from before them: lower optim.lr, or look at the data of these "
            "steps"
        )
