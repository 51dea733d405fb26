"""The loop: resume, then step, log, evaluate and save until done.

Batches are a function of the step, so a run that stops anywhere and resumes sees what it would have
seen without the stop. With several processes all of them run this; the first one speaks and writes.
"""

import contextlib
import dataclasses
import errno
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longlive_jax.parallel.mesh import BATCH, MeshSpec, make_mesh
from longlive_jax.parallel.rules import Rules
from longlive_jax.spec import Failure
from longlive_jax.training.checkpointing import Saves
from longlive_jax.training.feed import Feed, own_rows, placed, skipped_by_all
from longlive_jax.training.metrics import MetricsLog, mean_of, peak_gib, plot_curves
from longlive_jax.training.optim import OptimSpec, make_optimizer
from longlive_jax.training.preemption import Stopped, StopRequest
from longlive_jax.training.state import WHOLE, Params, TrainState, make_state
from longlive_jax.training.step import (
    EMASpec,
    LossFn,
    Prepare,
    Weigh,
    make_train_step,
    no_preparation,
    uniform_weight,
)


@dataclasses.dataclass(frozen=True)
class LoopSpec:
    """Length and rhythm of a run, in updates.

    Attributes:
      keep: saves that stay.
      patience: updates in a row without a finite loss and gradient that stop the run.
      accumulate: parts in which a batch is worked off.
      peak_tflops: of one device; logged speeds are also given as a share of it. 0: not given.
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
                raise ValueError(f"loop.{name} is {getattr(self, name)}; give at least 1")


SAMPLES = P(BATCH)
"""Every array of a batch by its samples."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one update amounts to: tokens that go through the model, and floating point operations
    of its matrix products, forward and backward, recomputation not counted; `kinds` are parts of
    these by name."""

    tokens: int
    flops: float
    kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: parameters, a loss, a batch for every step, and what to look at on the way.

    Attributes:
      init: key -> parameters; traced, so that they are made where they stay.
      loss_fn: (params, batch, key, memory) -> (loss, (metrics, memory)).
      feed: step -> the batches from there on, which are functions of their steps: dictionaries of
        arrays with the samples first.
      evaluate: (averaged params, step, workdir) -> numbers; may write pictures to the workdir.
      export: (averaged params, directory) writes what the run was for.
      rules: how parameters lie on a mesh.
      batch_specs: how batches do: a tree of PartitionSpec that begins like a batch.
      rows: samples of a batch over all processes, where `feed` gives a process only its own.
      memory: makes what the loss remembers, at step 0; its specs are `memory_specs`.
      work: of one update, for the log.
      start: parameters from elsewhere, on the mesh already; in the place of `init`.
      place: puts this process's rows of a batch on the mesh in another way than by `batch_specs`.
      prepare: parameters -> how the loss sees them, made once an update (`step.Prepare`).
      origin: what the data are, ready for JSON: kept with every save, compared on resuming.
      weigh: what a part of a batch counts for, where one is worked off in parts.
      notes: lines to be printed before the first update.
    """

    init: Callable[[jax.Array], Params]
    loss_fn: LossFn
    feed: Callable[[int], Feed]
    evaluate: Callable[[Params, int, pathlib.Path], dict[str, float]]
    export: Callable[[Params, pathlib.Path], None]
    rules: Rules = WHOLE
    batch_specs: Any = SAMPLES
    rows: int | None = None
    memory: Callable[[], Any] = tuple
    memory_specs: Any = ()
    work: Work | None = None
    start: Callable[[], Params] | None = None
    place: Callable[[Any], Any] | None = None
    prepare: Prepare = no_preparation
    weigh: Weigh = uniform_weight
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Diverged(Failure, FloatingPointError):
    """Loss or gradient were not finite for too long."""


def train(
    task: Task,
    workdir: pathlib.Path,
    *,
    loop: LoopSpec,
    optim: OptimSpec,
    ema: EMASpec,
    mesh: Mesh | None = None,
) -> TrainState:
    """Trains `task` in `workdir`, continuing from its last good save if it has one.

    `mesh` defaults to the first device. SIGTERM or Ctrl-C end the run after the update under way,
    which is saved.

    Raises:
      Diverged: after `loop.patience` updates in a row without a finite loss and gradient; the last
        good state is saved.
      Stopped: after a signal.
      Failure: a save could not be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(MeshSpec(), jax.devices()[:1]) if mesh is None else mesh
    run = _Run(task, workdir, loop, mesh)
    tx = make_optimizer(optim, loop.steps)

    state, where = make_state(
        lambda: task.init(jax.random.key(loop.seed)),
        tx,
        mesh,
        task.rules,
        memory=task.memory,
        memory_specs=task.memory_specs,
        start=task.start if Saves.none_in(workdir) else None,
    )
    origin = {"seed": loop.seed, "accumulate": loop.accumulate, **task.origin}
    with (
        Saves(workdir, keep=loop.keep, origin=origin) as saves,
        run.progress(),
        StopRequest(run.say) as stop,
    ):
        state = run.resumed(saves, state)
        saves.check_room(state)
        step_fn = run.step_fn(tx, ema, where)
        return run.until_done(state, step_fn, saves, stop)


class _Run:
    """One call of `train`: where it is, and what it says."""

    def __init__(self, task: Task, workdir: pathlib.Path, loop: LoopSpec, mesh: Mesh):
        self.task, self.workdir, self.loop, self.mesh = task, workdir, loop, mesh
        self.first = jax.process_index() == 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        note = TextColumn("{task.fields[note]}")
        self._bar = Progress(*columns, TimeRemainingColumn(), note, disable=not self.first)
        self._line = self._bar.add_task("train", total=loop.steps, note="compiling")

    @contextlib.contextmanager
    def progress(self):
        with self._bar:
            yield

    def say(self, text: str) -> None:
        if self.first:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def resumed(self, saves: Saves, state: TrainState) -> TrainState:
        """The state of the last good save, or `state` if there is none."""
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        if (found := saves.restore(like, say=self.say, whole=True)) is not None:
            step, state = found
            self.say(f"Resumed from step {step} of {self.workdir}.")
        for note in self.task.notes:
            self.say(note)
        return state

    def step_fn(self, tx: optax.GradientTransformation, ema: EMASpec, where: TrainState):
        """The update, to states that lie at `where`."""
        task, loop = self.task, self.loop
        return make_train_step(
            task.loss_fn,
            tx,
            ema,
            loop.seed,
            accumulate=loop.accumulate,
            shardings=where,
            prepare=task.prepare,
            weigh=task.weigh,
        )

    def until_done(self, state: TrainState, step_fn, saves: Saves, stop: StopRequest) -> TrainState:
        """Steps, logs, evaluates and saves."""
        start, loop = int(state.step), self.loop
        log = MetricsLog(self.workdir, resume_at=start, write=self.first)
        window = _Window(self)
        self._bar.update(self._line, completed=start)
        try:
            if self._due(start) and not log.evaluated(start):  # a stop came before it
                self._evaluate(state, start, log)
                window = _Window(self)
            for done, batch, feed in self._batches(start):
                state, metrics = step_fn(state, self._place(batch))
                window.add(metrics)
                last = done == loop.steps
                asked = stop.after(done)
                if done % loop.log_every == 0 or last or asked:
                    self._record(done, window.close(feed), log)
                    saves.check()
                if window.bad_steps() >= loop.patience:
                    self._diverge(state, done, window.bad_steps(), saves)
                if done % loop.save_every == 0 or last or asked:
                    with window.paused():
                        saves.save(done, state)
                if self._due(done) and (last or not asked):
                    with window.paused():
                        self._evaluate(state, done, log)
                if asked and not last:
                    self._leave(asked, done, saves)
            saves.wait()
            self._plot(log)
        except BaseException as error:
            with contextlib.suppress(OSError):  # what ended the run is said, not this
                self._plot(log)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise saves.unwritten(error) from error
            raise
        finally:
            log.close()
        return state

    def _due(self, step: int) -> bool:
        """Whether an evaluation belongs to a step."""
        every = self.loop.eval_every
        return step > 0 and (step == self.loop.steps or (every > 0 and step % every == 0))

    def _evaluate(self, state: TrainState, done: int, log: MetricsLog) -> None:
        log.write(done, self.task.evaluate(state.ema, done, self.workdir))
        self._plot(log)

    def _record(self, done: int, values: dict[str, float], log: MetricsLog) -> None:
        log.write(done, values)
        self._bar.update(self._line, completed=done, note=f"loss {values['loss']:.4f}")

    def _batches(self, start: int) -> Iterator[tuple[int, Any, Feed]]:
        """Every step that is left, its batch, and where that came from."""
        if start < self.loop.steps:
            with self.task.feed(start) as feed:
                for done, batch in zip(range(start + 1, self.loop.steps + 1), feed, strict=False):
                    yield done, batch, feed

    def _place(self, batch: Any) -> Any:
        task = self.task
        if task.place is not None:
            return task.place(batch)
        rows = len(jax.tree.leaves(batch)[0]) if task.rows is None else task.rows
        return placed(batch, task.batch_specs, self.mesh, rows=rows, first=self.first_row)

    @property
    def first_row(self) -> int:
        """Of a batch, the first that `feed` gives this process."""
        return 0 if self.task.rows is None else own_rows(self.mesh, self.task.rows).start

    def _plot(self, log: MetricsLog) -> None:
        if self.first:
            plot_curves({"": log.records}, self.workdir / "curves.png")

    def _leave(self, number: int, done: int, saves: Saves) -> None:
        saves.wait()
        raise Stopped(
            f"stopped by signal {number} after step {done}, which is saved in {self.workdir}; "
            "the same command goes on from there",
            128 + number,
        )

    def _diverge(self, state: TrainState, step: int, bad_steps: int, saves: Saves) -> None:
        saves.save(step, state)
        saves.wait()
        raise Diverged(
            f"loss or gradient was not finite in {bad_steps} updates in a row before step {step}; "
            "none of them was applied, and the state before them is saved: lower optim.lr, or look "
            "at the data of these steps"
        )


class _Window:
    """Updates since the last record: their metrics, and the time they took."""

    def __init__(self, run: _Run):
        self._task, self._loop, self._devices = run.task, run.loop, run.mesh.size
        self._first_row = run.first_row
        self._metrics: list[dict] = []
        self._unseen: list[jax.Array] = []
        self._bad_steps = 0
        self._waited, self._spent, self._began = 0.0, 0.0, time.perf_counter()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        self._metrics.append(metrics)
        self._unseen.append(metrics["bad_steps"])

    def bad_steps(self) -> int:
        """The most updates in a row that were not applied, as far as known: looking at them waits
        for the device, so this does every `patience` updates, and at a record."""
        if len(self._unseen) >= self._loop.patience or not self._metrics:
            self._bad_steps = max((int(n) for n in jax.device_get(self._unseen)), default=0)
            self._unseen = []
        return self._bad_steps

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is not the updates', but what the device has yet to do of these is."""
        jax.block_until_ready(self._metrics[-1:])
        self._spent += time.perf_counter() - self._began
        try:
            yield
        finally:
            self._began = time.perf_counter()

    def close(self, feed: Feed) -> dict[str, float]:
        """Means, speed and memory of the window; `data_wait` is the share of time that this process
        spent in waiting for batches. Waits for the device; all processes call it."""
        values = mean_of(self._metrics)
        rate = len(self._metrics) / (self._spent + time.perf_counter() - self._began)
        values["steps_per_s"] = rate
        values["data_wait"] = (feed.waited - self._waited) * rate / len(self._metrics)
        if self._task.work is not None:
            flops = rate * self._task.work.flops
            values["tokens_per_s"] = rate * self._task.work.tokens
            values["tflops_per_s"] = flops / 1e12
            for kind, part in self._task.work.kinds.items():
                values[f"tflops_per_s_{kind}"] = rate * part / 1e12
            if self._loop.peak_tflops:
                peak = 1e12 * self._loop.peak_tflops * self._devices
                values["percent_of_peak"] = 100 * flops / peak
        values["skipped"] = skipped_by_all(feed.skipped, self._first_row)
        values |= peak_gib()
        self._metrics, self._waited = [], feed.waited
        self._spent, self._began = 0.0, time.perf_counter()
        return values
