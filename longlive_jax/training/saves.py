"""Saved runs: asynchronous, sharded and atomic by Orbax; verified by fingerprints of our own.

    WORKDIR/state/<step>/{state,about}/     one save
    WORKDIR/damaged/<step>.<n>/             saves that could not be read, kept to be looked at

A save is restored onto whatever mesh the new state lies on, whole (`Saves.restore`) or only what a
sampler or another run begins from (`restore_weights`).
"""

import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
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
    """The saves of one work directory; a context manager that ends with every save on disk."""

    def __init__(self, workdir: pathlib.Path, *, keep: int = 2):
        self.workdir = workdir
        self._root = (workdir / STATE).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self._root, options=options)

    @staticmethod
    def none_in(workdir: pathlib.Path) -> bool:
        """Whether nothing was ever saved in a work directory."""
        root = workdir / STATE
        return not root.is_dir() or not any(root.iterdir())

    def __enter__(self) -> "Saves":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps that look saved, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, state: Any) -> None:
        """Begins to save; the arrays are copied before this returns, written after.

        Raises Failure if this or the save before could not be written.
        """
        if step in self._manager.all_steps():
            return
        self._check_room(state)
        about = {"arrays": _shapes(state), "fingerprints": fingerprints(state)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{STATE: ocp.args.PyTreeSave(state), ABOUT: ocp.args.JsonSave(about)}
                ),
            )
        except Exception as error:
            raise self._unsaved(step, error) from error

    def wait(self) -> None:
        """Waits for the save that is under way; raises Failure if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._unsaved(None, error) from error

    def restore(self, like: Any, *, say: Say) -> tuple[int, Any] | None:
        """Step and state of the newest good save, with the shapes and shardings of `like`.

        None if nothing was saved. A save that cannot be read, or does not match its fingerprints,
        is moved to `damaged/`, `say` is told why, and the one before is tried. `like` may be a part
        of what was saved, such as `{"ema": ...}`.

        Raises UserError if the saves are of another model, or none of them is good.
        """
        found, reasons = None, []
        for step in self.steps():
            try:
                found = self._read(step, like)
                break
            except UserError:
                raise
            except Exception as error:  # Orbax raises whatever it meets; all of it means damage
                line = str(error).strip().splitlines() or [type(error).__name__]
                reasons.append((step, line[0][:200]))
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
        return found

    def _read(self, step: int, like: Any) -> tuple[int, Any]:
        read = self._manager.restore(
            step, args=ocp.args.Composite(**{ABOUT: ocp.args.JsonRestore()})
        )
        about = read[ABOUT]
        _check_same(about["arrays"], like, self._root / str(step))
        args = ocp.checkpoint_utils.construct_restore_args(like)
        part = ocp.args.PyTreeRestore(item=like, restore_args=args, partial_restore=True)
        state = self._manager.restore(step, args=ocp.args.Composite(**{STATE: part}))[STATE]
        got, want = fingerprints(state), about["fingerprints"]
        wrong = [path for path in got if got[path] != want[path]]
        if wrong:
            raise ValueError(f"{len(wrong)} arrays differ from what was saved: {wrong[0]}")
        return step, state

    def _check_room(self, state: Any) -> None:
        need = sum(s.data.nbytes for x in jax.tree.leaves(state) for s in x.addressable_shards)
        free = shutil.disk_usage(self.workdir).free
        if free < need:
            raise Failure(
                f"{self.workdir}: a save needs up to {need / 2**30:.2f} GiB and "
                f"{free / 2**30:.2f} GiB are free; {self._left()}"
            )

    def _unsaved(self, step: int | None, error: Exception) -> Failure:
        which = "a save" if step is None else f"the save of step {step}"
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        return Failure(f"{self._root}: {which} could not be written ({why}); {self._left()}")

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


def _check_same(saved: Mapping[str, list], like: Any, where: pathlib.Path) -> None:
    """UserError naming the first arrays that were saved otherwise, or not at all."""
    wrong = [
        f"{path} is {saved.get(path, ['missing'])[0]} there and {shape[0]} here"
        for path, shape in _shapes(like).items()
        if saved.get(path) != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{where}: saved by a run of another model or optimizer ({wrong[0]}{more}); give the "
            "settings of that run, or choose a new --workdir"
        )
