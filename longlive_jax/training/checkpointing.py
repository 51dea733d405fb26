"""Checkpoints of a training run: asynchronous, sharded and atomic by Orbax, verified by checksums.

    WORKDIR/state/<step>/{state,about}/     one checkpoint
    WORKDIR/damaged/<step>.<n>/             checkpoints that could not be read, kept for inspection

A checkpoint can be restored onto any mesh, completely (`TrainCheckpoints`) or only the weights of a
group (`restore_weights`). Checkpoints of earlier versions, which had a single group of parameters,
are restored into a current state (`training.upgrade`).
"""

import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from longlive_jax.parallel.rules import path_of
from longlive_jax.spec import Failure, UserError
from longlive_jax.training.fingerprints import fingerprints
from longlive_jax.training.upgrade import earlier_layout, earlier_path, is_earlier
from longlive_jax.typing import Params

STATE, ABOUT = "state", "about"
LORA = r"(^|/)branch/[ab]$"
"""Paths of low-rank branches (`quant.low_rank.LoRAKernel`) among parameters."""

FROZEN = "frozen"
"""Key of the origin: digests of the run's frozen parameters, by name."""

type Notify = Callable[[str], None]
"""Prints a line for the user."""


class TrainCheckpoints:
    """The checkpoints of one work directory; a context manager that on exit waits for all of them.

    `origin`, ready for JSON, identifies the data and settings of a run. If it has changed when the
    run resumes, the difference is reported; a run over other frozen parameters is refused.
    """

    def __init__(
        self, workdir: pathlib.Path, *, keep: int = 2, origin: Mapping[str, Any] | None = None
    ):
        self.workdir, self._origin = workdir, dict(origin or {})
        self._writing: int | None = None
        self._root = (workdir / STATE).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self._root, options=options)

    @staticmethod
    def none_in(workdir: pathlib.Path) -> bool:
        """Whether a work directory has no finished checkpoint."""
        root = workdir / STATE
        return not root.is_dir() or not any(p.is_dir() and p.name.isdigit() for p in root.iterdir())

    def __enter__(self) -> "TrainCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self._manager.close()
        except Exception as error:  # a failed write is raised once more here
            if kind is None:
                raise self._not_written(error) from error

    def steps(self) -> list[int]:
        """Steps with a checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any) -> None:
        """Starts a checkpoint: copies the arrays before it returns, and writes them afterwards.

        Raises Failure if this or the previous checkpoint could not be written.
        """
        if step in self._manager.all_steps():
            return
        self.check()
        self.check_disk_space(state)
        about = {
            "arrays": _shapes(state),
            "fingerprints": fingerprints(state),
            "origin": self._origin,
        }
        about["digest"] = _digest(about)
        try:
            self._manager.wait_until_finished()
            self._writing = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.PyTreeSave(state), ABOUT: ocp.args.JsonSave(about)}
                ),
            )
        except Exception as error:
            raise self._not_written(error) from error

    def check(self) -> None:
        """Raises Failure if the checkpoint in progress has already failed; does not wait for it."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._not_written(error) from error

    def wait(self) -> None:
        """Waits for the checkpoint in progress; raises Failure if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def restore(
        self, like: Any, *, notify: Notify, complete: bool = False
    ) -> tuple[int, Any] | None:
        """Step and state of the newest intact checkpoint, with the shapes and shardings of `like`.

        A checkpoint that any of the processes cannot read, or that does not match its checksums, is
        moved to `damaged/`, reported through `notify`, and the previous one is used. `like` may be
        a part of the state, such as `{"groups": ...}`, unless `complete`; then `notify` also
        reports how this run's origin differs.

        Returns None if there is no checkpoint. Raises UserError if the checkpoints are of another
        model, or were trained over other frozen parameters, or if none of them is intact.
        """
        restored, failures = None, []
        for step in self.steps():
            state, about, reason = self._read(step, like, complete)
            if reason is None:
                restored = step, state
                break
            failures.append((step, reason))
        if restored is None and failures:
            tried = "; ".join(f"step {step}: {reason}" for step, reason in failures)
            raise UserError(
                f"{self._root}: no checkpoint can be read ({tried}). Restore the folder from a "
                "copy, or choose a new --workdir to start over."
            )
        for step, reason in failures:
            folder = self._move_aside(step)
            notify(
                f"The checkpoint of step {step} is damaged ({reason}); it was moved to {folder}."
            )
        if failures:
            self._manager.reload()
        if restored is not None and complete:
            self._compare(about.get("origin", self._origin), restored[0], notify)
        return restored

    def _read(self, step: int, like: Any, complete: bool) -> tuple[Any, dict[str, Any], str | None]:
        """The state, its description, and why one of the processes could not read it (or None)."""
        # 1. What this process reads.
        state, about, reason = None, {}, None
        try:
            about = _reader(ocp.JsonCheckpointHandler).restore(
                self._root / str(step) / ABOUT, args=ocp.args.JsonRestore()
            )
            _check_description(about)
            state = self._read_arrays(step, like, about, complete)
        except UserError:
            raise
        except Exception as error:  # Orbax may raise any error; all of them mean damage
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        # 2. All processes fall back together, or some would wait for the others.
        if jax.process_count() > 1:
            failed = multihost_utils.process_allgather(np.array(reason is not None))
            if failed.any() and reason is None:
                reason = f"process {int(np.argmax(failed))} cannot read it"
        # 3. The checksums, which all processes compute together.
        if reason is None and (damaged := _damaged(state, about)):
            reason = f"{len(damaged)} arrays differ from what was saved: {damaged[0]}"
        return state, about, reason

    def _read_arrays(self, step: int, like: Any, about: Mapping[str, Any], complete: bool) -> Any:
        """The arrays of `like`, each read from its path in the checkpoint."""
        layout = earlier_layout(like) if is_earlier(about["arrays"]) else like
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        paths = _stored_paths(like, about)
        stored = {path: leaf for path, (_, leaf) in zip(paths.values(), leaves, strict=True)}
        _check_same(about["arrays"], stored, self._root / str(step), complete)

        args = ocp.checkpoint_utils.construct_restore_args(layout)
        part = ocp.args.PyTreeRestore(item=layout, restore_args=args, partial_restore=True)
        tree = _reader(ocp.PyTreeCheckpointHandler).restore(
            self._root / str(step) / STATE, args=part
        )
        arrays = {path_of(keys): x for keys, x in jax.tree_util.tree_flatten_with_path(tree)[0]}
        return jax.tree.unflatten(structure, [arrays[path] for path in paths.values()])

    def _compare(self, origin: Mapping[str, Any], step: int, notify: Notify) -> None:
        self._check_frozen(origin.get(FROZEN, {}), step)
        for name in sorted({*origin, *self._origin}):
            before, now = origin.get(name), self._origin.get(name)
            if before != now:
                notify(
                    f"{name} was {before} when step {step} was checkpointed and is {now} now: the "
                    "run does not continue as it would have."
                )

    def _check_frozen(self, digests: Mapping[str, str], step: int) -> None:
        """Raises UserError if frozen parameters are not those that the run began with.

        What was trained over them would not fit.
        """
        own = self._origin.get(FROZEN, {})
        if changed := sorted(k for k in {*digests, *own} if digests.get(k) != own.get(k)):
            raise UserError(
                f"{self._root}: frozen parameters are not those of step {step}: "
                f"{', '.join(changed)}. Give the checkpoints and the precision of that run, or "
                "choose a new --workdir."
            )

    def check_disk_space(self, state: Any) -> None:
        """Raises Failure if the disk lacks space for this process's part of a checkpoint."""
        shards = (s for x in jax.tree.leaves(state) for s in x.addressable_shards)
        need = sum(s.data.nbytes for s in shards if s.replica_id == 0)
        free = shutil.disk_usage(self.workdir).free
        if free < need:
            raise Failure(
                f"{self.workdir}: a checkpoint needs up to {need / 2**30:.2f} GiB and "
                f"{free / 2**30:.2f} GiB are free. {self._remedy()}"
            )

    def _not_written(self, error: Exception) -> Failure:
        name = (
            "a checkpoint" if self._writing is None else f"the checkpoint of step {self._writing}"
        )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        return Failure(f"{self._root}: {name} could not be written ({reason}). {self._remedy()}")

    def unwritable(self, error: OSError) -> Failure:
        """The error to raise where the work directory cannot be written."""
        return Failure(f"{self.workdir}: cannot be written ({error}). {self._remedy()}")

    def _remedy(self) -> str:
        steps = self.steps()
        newest = f"step {steps[0]}" if steps else "none"
        return f"Free disk space and rerun the same command (newest checkpoint: {newest})."

    def _move_aside(self, step: int) -> pathlib.Path:
        """Moves a checkpoint to `damaged/` without overwriting anything; by the first process."""
        folder = self.workdir / "damaged"
        target = next(p for n in range(1000) if not (p := folder / f"{step}.{n}").exists())
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            (self._root / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"move damaged {step}")
        return target


def _reader(handler: Any) -> ocp.Checkpointer:
    """A reader without barriers, which a process that meets damage would never reach."""
    this = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    return ocp.Checkpointer(
        handler(multiprocessing_options=options), multiprocessing_options=options
    )


def restore_weights(
    workdir: pathlib.Path,
    like: Params,
    *,
    group: str,
    part: Literal["params", "ema"] = "ema",
    only: str | None = None,
    notify: Notify,
) -> tuple[int, Params]:
    """Step of the newest intact checkpoint, and a group's parameters or EMA; reads nothing else.

    Args:
      workdir: the `--workdir` of a run.
      like: tree of the parameters, as `jax.ShapeDtypeStruct` with the shardings to read them to.
      group: name of the group.
      part: "params" for the parameters, or "ema" for their EMA.
      only: regular expression searched in the paths, such as `LORA`. Other leaves (the base of an
        adapter, for instance) are returned as they are in `like` and need not be stored.
      notify: called with a line about each damaged checkpoint.

    Raises UserError for a folder without checkpoints, for checkpoints of another model, and if
    `only` matches no path.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    named = {path_of(keys): leaf for keys, leaf in leaves}
    wanted = {path: x for path, x in named.items() if only is None or re.search(only, path)}
    if not wanted:
        raise UserError(f"no parameter's path matches {only!r}; the first is {next(iter(named))}")
    if TrainCheckpoints.none_in(workdir):
        raise UserError(f"{workdir}: has no checkpoint of a run; give the --workdir of `train`")
    with TrainCheckpoints(workdir) as checkpoints:
        restored = checkpoints.restore({"groups": {group: {part: _nested(wanted)}}}, notify=notify)
    if restored is None:
        raise UserError(f"{workdir}: has no finished checkpoint of a run; train for longer")
    step, tree = restored
    read, _ = jax.tree_util.tree_flatten_with_path(tree["groups"][group][part])
    named |= {path_of(keys): leaf for keys, leaf in read}
    return step, jax.tree.unflatten(structure, list(named.values()))


def parameter_digests(frozen: Mapping[str, Params]) -> dict[str, str]:
    """A digest of every named tree of parameters, 16 hexadecimal digits, equal on every mesh."""
    return {name: _digest(fingerprints(params)) for name, params in frozen.items()}


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from paths, a form that any part of a tree can take."""
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        node, (*parents, last) = tree, path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _shapes(tree: Any) -> dict[str, list]:
    """Shape and dtype of every array, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_of(keys): [list(x.shape), str(x.dtype)] for keys, x in leaves}


def _check_same(
    saved: Mapping[str, list], wanted: Mapping[str, Any], folder: pathlib.Path, complete: bool
) -> None:
    """Raises UserError for the first array that differs, is missing or (if `complete`) is extra."""
    here = {path: [list(x.shape), str(x.dtype)] for path, x in wanted.items()}
    paths = [*here, *(path for path in saved if complete and path not in here)]
    wrong = [
        f"{path} is {_named(saved.get(path))} there and {_named(here.get(path))} here"
        for path in paths
        if saved.get(path) != here.get(path)
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder}: checkpoint of another model, optimizer or recycling ({wrong[0]}{more}). "
            "Give the settings of that run, or choose a new --workdir."
        )


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _check_description(about: Mapping[str, Any]) -> None:
    """Raises ValueError if the description of a checkpoint is not what was written."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    if rest.keys() == {"arrays", "fingerprints"}:
        return  # written by a version without a digest
    if about.get("digest") != _digest(rest):
        raise ValueError("its description is not what was written")


def _named(array: list | None) -> str:
    return "missing" if array is None else f"{array[1]} {array[0]}"


def _stored_paths(like: Any, about: Mapping[str, Any]) -> dict[str, str]:
    """Path in the checkpoint of every leaf of `like`, by its path there."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(like)
    paths = [path_of(keys) for keys, _ in leaves]
    earlier = is_earlier(about["arrays"])
    return {path: earlier_path(path) if earlier else path for path in paths}


def _damaged(state: Any, about: Mapping[str, Any]) -> list[str]:
    """Paths in the checkpoint of arrays whose checksum is not the stored one.

    A collective: every process must call it.
    """
    expected, actual = about["fingerprints"], fingerprints(state)
    paths = _stored_paths(state, about)
    return [paths[path] for path in actual if actual[path] != expected[paths[path]]]
