"""Saved runs: asynchronous, sharded and atomic by Orbax; verified by fingerprints of our own.

    WORKDIR/state/<step>/{state,about}/     one save
    WORKDIR/damaged/<step>.<n>/             saves that could not be read, kept to be looked at

A save is restored onto whatever mesh the new state lies on, whole (`Saves.restore`) or only what a
sampler or another run begins from (`restore_weights`).
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

STATE, ABOUT = "state", "about"
LORA = r"(^|/)branch/[ab]$"
"""Paths of low-rank branches (`quant.low_rank.LoRAKernel`) among parameters."""
type Say = Callable[[str], None]


class Saves:
    """The saves of one work directory; a context manager that ends with every save on disk.

    `origin`, ready for JSON, is what a run comes from besides its settings' shapes; a run that goes
    on from a save with another one is told so.
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
        """Whether no save of a work directory was ever finished."""
        root = workdir / STATE
        return not root.is_dir() or not any(p.is_dir() and p.name.isdigit() for p in root.iterdir())

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self._manager.close()
        except Exception as error:  # a save that failed; it fails once more here
            if kind is None:
                raise self._unsaved(error) from error

    def steps(self) -> list[int]:
        """Steps that look saved, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any) -> None:
        """Begins to save; the arrays are copied before this returns, written after.

        Raises Failure if this or the save before could not be written.
        """
        if step in self._manager.all_steps():
            return
        self.check()
        self.check_room(state)
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
            raise self._unsaved(error) from error

    def check(self) -> None:
        """Failure if the save that was under way could not be written; does not wait for it."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._unsaved(error) from error

    def wait(self) -> None:
        """Waits for the save that is under way; raises Failure if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unsaved(error) from error

    def restore(self, like: Any, *, say: Say, whole: bool = False) -> tuple[int, Any] | None:
        """Step and state of the newest good save, with the shapes and shardings of `like`.

        None if nothing was saved. A save that cannot be read, by any of the processes, or does not
        match its fingerprints is moved to `damaged/`, `say` is told why, and the one before is
        tried. `like` may be a part of what was saved, such as `{"ema": ...}`, unless it is to be
        the `whole` of it; then `say` also hears how the run that saved differs from this one.

        Raises UserError if the saves are of another model, or none of them is good.
        """
        found, reasons = None, []
        for step in self.steps():
            state, about, why = self._read(step, like, whole)
            if why is None and (wrong := _differing(state, about["fingerprints"])):
                why = f"{len(wrong)} arrays differ from what was saved: {wrong[0]}"
            if why is None:
                found = step, state
                break
            reasons.append((step, why))
        if found is None and reasons:
            tried = "; ".join(f"step {step}: {why}" for step, why in reasons)
            raise UserError(
                f"{self._root}: no save can be read ({tried}); restore the folder from a copy, or "
                "choose a new --workdir to start over"
            )
        for step, why in reasons:
            place = self._put_aside(step)
            say(f"The save of step {step} is damaged ({why}); it was moved to {place}.")
        if reasons:
            self._manager.reload()
        if found is not None and whole:
            self._compare(about.get("origin", self._origin), found[0], say)
        return found

    def _read(self, step: int, like: Any, whole: bool) -> tuple[Any, dict[str, Any], str | None]:
        """State, what is said of it, and why one of the processes could not read it."""
        state, about, why = None, {}, None
        try:
            about = _alone(ocp.JsonCheckpointHandler).restore(
                self._root / str(step) / ABOUT, args=ocp.args.JsonRestore()
            )
            _check_whole(about)
            _check_same(about["arrays"], like, self._root / str(step), whole)
            args = ocp.checkpoint_utils.construct_restore_args(like)
            part = ocp.args.PyTreeRestore(item=like, restore_args=args, partial_restore=True)
            state = _alone(ocp.PyTreeCheckpointHandler).restore(
                self._root / str(step) / STATE, args=part
            )
        except UserError:
            raise
        except Exception as error:  # Orbax raises whatever it meets; all of it means damage
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if jax.process_count() > 1:  # all go back together, or some would wait for the others
            failed = multihost_utils.process_allgather(np.array(why is not None))
            if failed.any() and why is None:
                why = f"process {int(np.argmax(failed))} cannot read it"
        return state, about, why

    def _compare(self, origin: Mapping[str, Any], step: int, say: Say) -> None:
        for name in sorted({*origin, *self._origin}):
            before, now = origin.get(name), self._origin.get(name)
            if before != now:
                say(
                    f"{name} was {before} when step {step} was saved and is {now} now: the run "
                    "does not go on as it would have."
                )

    def check_room(self, state: Any) -> None:
        """Failure if the disk has no room for what this process writes of a save."""
        shards = (s for x in jax.tree.leaves(state) for s in x.addressable_shards)
        need = sum(s.data.nbytes for s in shards if s.replica_id == 0)
        free = shutil.disk_usage(self.workdir).free
        if free < need:
            raise Failure(
                f"{self.workdir}: a save needs up to {need / 2**30:.2f} GiB and "
                f"{free / 2**30:.2f} GiB are free; {self._left()}"
            )

    def _unsaved(self, error: Exception) -> Failure:
        which = "a save" if self._writing is None else f"the save of step {self._writing}"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        return Failure(f"{self._root}: {which} could not be written ({why}); {self._left()}")

    def unwritten(self, error: OSError) -> Failure:
        """What to raise where the work directory cannot be written."""
        return Failure(f"{self.workdir}: cannot be written ({error}); {self._left()}")

    def _left(self) -> str:
        steps = self.steps()
        kept = f"step {steps[0]} is saved" if steps else "nothing is saved yet"
        return f"make room and give the same command again ({kept})"

    def _put_aside(self, step: int) -> pathlib.Path:
        """Moves a save out of the way without overwriting anything; by the first process."""
        folder = self.workdir / "damaged"
        place = next(p for n in range(1000) if not (p := folder / f"{step}.{n}").exists())
        if jax.process_index() == 0:
            folder.mkdir(exist_ok=True)
            (self._root / str(step)).rename(place)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"put aside {step}")
        return place


def _alone(handler: Any) -> ocp.Checkpointer:
    """A reader that waits for no other process, since one that meets damage does not come."""
    this = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    return ocp.Checkpointer(
        handler(multiprocessing_options=options), multiprocessing_options=options
    )


def restore_weights(
    workdir: pathlib.Path,
    like: Any,
    *,
    part: Literal["params", "ema"] = "ema",
    only: str | None = None,
    say: Say,
) -> tuple[int, Any]:
    """The step of the newest good save, and its parameters or their average; nothing else is read.

    `like` is the tree of the parameters, as `jax.ShapeDtypeStruct` with shardings where they are to
    be read. `only` is a regular expression that is searched in their paths, such as `LORA`: what it
    does not name is returned as it is in `like`, the base of an adapter for instance, and need not
    be in the save. Raises UserError for a folder without saves, for saves of another model, and if
    `only` names nothing.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    named = {path_of(keys): leaf for keys, leaf in leaves}
    wanted = {path: x for path, x in named.items() if only is None or re.search(only, path)}
    if not wanted:
        raise UserError(f"no parameter's path matches {only!r}; the first is {next(iter(named))}")
    if Saves.none_in(workdir):
        raise UserError(f"{workdir}: holds no save of a run; give the --workdir of `train`")
    with Saves(workdir) as saves:
        found = saves.restore({part: _nested(wanted)}, say=say)
    if found is None:
        raise UserError(f"{workdir}: holds no finished save of a run; train for longer")
    step, tree = found
    read, _ = jax.tree_util.tree_flatten_with_path(tree[part])
    named |= {path_of(keys): leaf for keys, leaf in read}
    return step, jax.tree.unflatten(structure, list(named.values()))


def _nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Dictionaries in dictionaries from paths: any part of a tree has this form."""
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        node, (*parents, last) = tree, path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _shapes(tree: Any) -> dict[str, list]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_of(keys): [list(x.shape), str(x.dtype)] for keys, x in leaves}


def _check_same(saved: Mapping[str, list], like: Any, where: pathlib.Path, whole: bool) -> None:
    """UserError naming the first arrays that were saved otherwise, not at all, or besides."""
    here = _shapes(like)
    paths = [*here, *(path for path in saved if whole and path not in here)]
    wrong = [
        f"{path} is {_named(saved.get(path))} there and {_named(here.get(path))} here"
        for path in paths
        if saved.get(path) != here.get(path)
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{where}: saved by a run of another model, optimizer or recycling ({wrong[0]}{more}); "
            "give the settings of that run, or choose a new --workdir"
        )


def _digest(about: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _check_whole(about: Mapping[str, Any]) -> None:
    """ValueError if what is said of a save is not what was written."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    if rest.keys() == {"arrays", "fingerprints"}:
        return  # of a version that wrote no more
    if about.get("digest") != _digest(rest):
        raise ValueError("its description is not what was written")


def _named(array: list | None) -> str:
    return "missing" if array is None else f"{array[1]} {array[0]}"


def _differing(state: Any, want: Mapping[str, str]) -> list[str]:
    """Paths of arrays that are not what was saved."""
    got = fingerprints(state)
    return [path for path in got if got[path] != want[path]]
