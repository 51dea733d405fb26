"""The loop: resume, then update, log, evaluate and checkpoint until done.

Batches are a function of the step, so a run that stops and resumes gets the same batches as an
uninterrupted one. In a job of several processes each runs this loop, and the first prints and
writes. The loop knows nothing about losses: a `Task` provides compiled updates (`training.update`).
"""

import contextlib
import dataclasses
import errno
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longlive_jax.spec import Failure
from longlive_jax.training.checkpointing import FROZEN, TrainCheckpoints, parameter_digests
from longlive_jax.training.feed import Feed, total_skipped
from longlive_jax.training.metrics import MetricsLog, mean_metrics, peak_gib, plot_curves
from longlive_jax.training.preemption import Stopped, StopRequest
from longlive_jax.training.state import TrainState
from longlive_jax.training.step_times import StepTimes
from longlive_jax.training.task import Task


@dataclasses.dataclass(frozen=True)
class LoopSpec:
    """Length of a run and the intervals at which it logs, evaluates and saves, in training steps.

    Attributes:
      steps: length of the run.
      log_every: steps between records of the metrics.
      eval_every: steps between evaluations (0: only at the end).
      save_every: steps between checkpoints.
      keep: number of checkpoints to keep.
      patience: consecutive non-finite updates of a group after which the run stops.
      seed: seed of the parameters, the data order and all randomness in the updates.
      accumulate: number of microbatches per batch (gradient accumulation).
      peak_tflops: peak TFLOP/s of one device, to log speed as a percentage of it (0: not logged).
    """

    steps: int = 600
    log_every: int = 20
    eval_every: int = 0
    save_every: int = 200
    keep: int = 2
    patience: int = 20
    seed: int = 0
    accumulate: int = 1
    peak_tflops: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "save_every", "keep", "patience", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} must be >= 1, got {getattr(self, name)}")


class Diverged(Failure, FloatingPointError):
    """A group's loss or gradient was not finite in too many consecutive updates."""


def train(task: Task, workdir: pathlib.Path, loop: LoopSpec) -> TrainState:
    """Trains `task` in `workdir`, resuming from its newest intact checkpoint if it has one.

    SIGTERM or Ctrl-C end the run after the current step, which is checkpointed.

    Raises:
      Diverged: after `loop.patience` consecutive non-finite updates of a group; the last good state
        is checkpointed.
      Stopped: after a signal.
      Failure: a checkpoint could not be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    run = _Run(task, workdir, loop)
    origin = {"seed": loop.seed, "accumulate": loop.accumulate, **task.about.origin}
    if task.frozen:
        origin[FROZEN] = parameter_digests(task.frozen)
    with (
        TrainCheckpoints(workdir, keep=loop.keep, origin=origin) as checkpoints,
        run.progress(),
        StopRequest(run.notify) as stop,
    ):
        state = run.initial_state(checkpoints)
        checkpoints.check_disk_space(state)
        return run.until_done(state, checkpoints, stop)


class _Run:
    """One call of `train`, with its progress bar and messages."""

    def __init__(self, task: Task, workdir: pathlib.Path, loop: LoopSpec):
        self.task, self.workdir, self.loop = task, workdir, loop
        self.num_devices = task.trainer.mesh.size
        self.first = jax.process_index() == 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        note = TextColumn("{task.fields[note]}")
        self._bar = Progress(*columns, TimeRemainingColumn(), note, disable=not self.first)
        self._line = self._bar.add_task("train", total=loop.steps, note="compiling")
        self._losses: dict[str, float] = {}  # the latest of every group

    @contextlib.contextmanager
    def progress(self):
        with self._bar:
            yield

    def notify(self, text: str) -> None:
        if self.first:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def initial_state(self, checkpoints: TrainCheckpoints) -> TrainState:
        """The state of the newest intact checkpoint, or that of step 0."""
        trainer = self.task.trainer
        resumed = checkpoints.restore(trainer.abstract, notify=self.notify, complete=True)
        if resumed is not None:
            step, state = resumed
            self.notify(f"Resumed from step {step} of {self.workdir}.")
        else:
            state = trainer.init()
        for note in self.task.about.notes:
            self.notify(note)
        return state

    def until_done(
        self, state: TrainState, checkpoints: TrainCheckpoints, stop: StopRequest
    ) -> TrainState:
        """Updates, logs, evaluates and checkpoints until the end of the run."""
        start = int(state.step)
        log = MetricsLog(self.workdir, resume_at=start, write=self.first)
        self._bar.update(self._line, completed=start)
        try:
            if self._evaluates_at(start) and not log.has_evaluation(start):  # interrupted before it
                self._evaluate(state, start, log)
            with StepTimes() as times:
                state = self._steps(state, log, checkpoints, stop, times)
            checkpoints.wait()
            self._plot(log)
        except BaseException as error:
            with contextlib.suppress(OSError):  # report what ended the run, not a failed plot
                self._plot(log)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise checkpoints.unwritable(error) from error
            raise
        finally:
            log.close()
        return state

    def _steps(
        self,
        state: TrainState,
        log: MetricsLog,
        checkpoints: TrainCheckpoints,
        stop: StopRequest,
        times: StepTimes,
    ) -> TrainState:
        """Runs the remaining steps."""
        task, loop, window = self.task, self.loop, _Window(self, times)
        for step, batch, feed in self._batches(int(state.step)):
            # 1. Enqueue the update, without waiting for it.
            names = task.updates_at(step - 1)
            update, batch = task.trainer.program(names), task.batches.put(batch)
            enqueued = time.perf_counter()
            state, metrics = update(state, task.frozen, batch)
            window.add(metrics, names, enqueued)
            last, stopping = step == loop.steps, stop.after(step)

            # 2. Log.
            if step % loop.log_every == 0 or last or stopping:
                self._record(step, window.close(feed), log)
                checkpoints.check()
            bad_steps, counter = window.bad_steps()
            if bad_steps >= loop.patience:
                checkpoints.save(step, state)
                checkpoints.wait()
                raise _diverged(step, bad_steps, counter)

            # 3. Checkpoint, then evaluate, outside the measured time.
            if step % loop.save_every == 0 or last or stopping:
                with window.paused():
                    checkpoints.save(step, state)
            if self._evaluates_at(step) and (last or not stopping):
                with window.paused():
                    self._evaluate(state, step, log)
            if stopping and not last:
                self._leave(stopping, step, checkpoints)
        return state

    def _evaluates_at(self, step: int) -> bool:
        every = self.loop.eval_every
        return step > 0 and (step == self.loop.steps or (every > 0 and step % every == 0))

    def _evaluate(self, state: TrainState, step: int, log: MetricsLog) -> None:
        log.write(step, self.task.evaluate(state.weights, step, self.workdir))
        self._plot(log)

    def _record(self, step: int, values: dict[str, float], log: MetricsLog) -> None:
        log.write(step, values)
        self._losses |= {key: x for key, x in values.items() if key.endswith("loss")}
        note = ", ".join(f"{key} {x:.4f}" for key, x in self._losses.items())
        self._bar.update(self._line, completed=step, note=note)

    def _batches(self, start: int) -> Iterator[tuple[int, Any, Feed]]:
        """Yields each remaining step: its number, counted from 1, its batch, and the feed."""
        if start < self.loop.steps:
            with self.task.batches.feed(start) as feed:
                for step, batch in zip(range(start + 1, self.loop.steps + 1), feed, strict=False):
                    yield step, batch, feed

    def _plot(self, log: MetricsLog) -> None:
        if self.first:
            plot_curves({"": log.records}, self.workdir / "curves.png")

    def _leave(self, number: int, step: int, checkpoints: TrainCheckpoints) -> None:
        checkpoints.wait()
        raise Stopped(
            f"stopped by signal {number} after step {step}; its checkpoint is in {self.workdir}. "
            "Rerun the same command to resume.",
            128 + number,
        )


def _diverged(step: int, bad_steps: int, counter: str) -> Diverged:
    """The error for a group whose counter, "bad_steps" or "<group>_bad_steps", is too high."""
    group = counter.removesuffix("bad_steps").removesuffix("_")
    of_group = f" of {group}" if group else ""
    return Diverged(
        f"loss or gradient{of_group} was not finite in {bad_steps} consecutive updates before step "
        f"{step}. None was applied, and the state without them is checkpointed. Lower optim.lr, or "
        "inspect the data of these steps."
    )


class _Window:
    """The steps since the last record, with their metrics and duration."""

    def __init__(self, run: _Run, times: StepTimes):
        # Steps of one kind last as long as `steps_per_s` says.
        self._times = None if run.task.updates is None else times
        self._cost, self._loop = run.task.about.cost, run.loop
        self._first_row = run.task.batches.first_row
        self._devices = run.num_devices
        self._metrics: list[dict] = []
        self._unread: list[dict[str, jax.Array]] = []
        self._bad_steps = (0, "")
        self._waited, self._spent, self._began = 0.0, 0.0, time.perf_counter()

    def add(self, metrics: dict[str, jax.Array], names: tuple[str, ...], enqueued: float) -> None:
        """A step updated the groups `names`; see `StepTimes.add`."""
        self._metrics.append(metrics)
        if self._times is not None:
            self._times.add(f"seconds_{'_and_'.join(names)}", enqueued, metrics)
        self._unread.append({key: x for key, x in metrics.items() if key.endswith("bad_steps")})

    def bad_steps(self) -> tuple[int, str]:
        """Most consecutive skipped updates of any group when last read, and the metric's name.

        Reading waits for the device, so it happens at records and every `patience` steps.
        """
        if len(self._unread) >= self._loop.patience or not self._metrics:
            counts = [(int(n), k) for step in jax.device_get(self._unread) for k, n in step.items()]
            self._bad_steps = max(counts, default=(0, ""))
            self._unread = []
        return self._bad_steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock inside the context, after waiting for the updates already enqueued."""
        jax.block_until_ready(self._metrics[-1:])
        self._spent += time.perf_counter() - self._began
        try:
            yield
        finally:
            self._began = time.perf_counter()

    def close(self, feed: Feed) -> dict[str, float]:
        """Means, speed and memory of the window, after waiting for the device.

        `data_wait` is the fraction of time that this process waited for batches. All processes must
        call it.
        """
        values = mean_metrics(self._metrics)
        rate = len(self._metrics) / (self._spent + time.perf_counter() - self._began)
        values["steps_per_s"] = rate
        values["data_wait"] = (feed.waited - self._waited) * rate / len(self._metrics)
        values |= self._speed(rate)
        values["skipped"] = total_skipped(feed.skipped, self._first_row)
        values |= peak_gib()
        values |= {} if self._times is None else self._times.means()
        self._metrics, self._waited = [], feed.waited
        self._spent, self._began = 0.0, time.perf_counter()
        return values

    def _speed(self, rate: float) -> dict[str, float]:
        """Tokens and FLOPs per second at `rate` steps per second, if the task knows its cost."""
        if self._cost is None:
            return {}
        flops = rate * self._cost.flops
        values = {"tokens_per_s": rate * self._cost.tokens, "tflops_per_s": flops / 1e12}
        for kind, part in self._cost.kinds.items():
            values[f"tflops_per_s_{kind}"] = rate * part / 1e12
        if self._loop.peak_tflops:
            peak = 1e12 * self._loop.peak_tflops * self._devices
            values["percent_of_peak"] = 100 * flops / peak
        return values
