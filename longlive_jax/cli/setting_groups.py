"""Groups of settings: those of a verb, of a training stage, and of a recipe with its values."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from longlive_jax.cli.recipes import KIND_NAMES, kind_of, known_recipes, load_config
from longlive_jax.cli.setting_rows import SettingRow, describe, marked, value_text
from longlive_jax.spec import UserError, build, nearest, reject_unknown

RECIPE_MARK, CHECKPOINT_MARK = "*", "+"
"""Marks of values that a recipe sets, and of those that its checkpoint stores."""


@dataclasses.dataclass(frozen=True)
class SettingGroup:
    """Settings that are listed together.

    Attributes:
      name: name for `longlive settings NAME`.
      summary: one line.
      rows: the settings, with the path that follows `--config.`.
      notes: lines to print after the settings.
    """

    name: str
    summary: str
    rows: tuple[SettingRow, ...]
    notes: tuple[str, ...] = ()


def group_names() -> list[str]:
    """Names of all groups: verbs with settings, and `train STAGE` for every stage."""
    from longlive_jax.cli.stages import STAGES

    return ["sample", "evaluate", "train", *(f"train {stage}" for stage in STAGES)]


def find_group(name: str) -> SettingGroup:
    """The group of this name, `STAGE` being short for `train STAGE`; UserError if there is none."""
    from longlive_jax.cli.stages import STAGES

    stage = name.removeprefix("train ")
    if name == "sample":
        return _sample_group()
    if name == "evaluate":
        return _evaluate_group()
    if name == "train":
        return _train_group()
    if stage in STAGES:
        cls = STAGES[stage]
        return SettingGroup(f"train {stage}", _summary(cls), tuple(describe(cls)))
    raise UserError(f"settings: unknown group {name!r}{nearest(name, group_names())}")


def all_groups() -> Iterator[SettingGroup]:
    """Every group, in the order of `group_names`."""
    return (find_group(name) for name in group_names())


def _sample_group() -> SettingGroup:
    from longlive_jax.sampling.settings import SampleSpec

    meaning = "checkpoint directory, or small_world, the built-in one."
    checkpoint = SettingRow("checkpoint", "str", "small_world", meaning)
    rows = (checkpoint, *describe(SampleSpec, prefix="sample."))
    notes = ("A checkpoint's own settings replace these defaults, and a recipe's replace those.",)
    return SettingGroup("sample", _summary(SampleSpec), rows, notes)


def _evaluate_group() -> SettingGroup:
    from longlive_jax.small_world.cases import EvaluateSpec

    notes = ("evaluate.sample.NAME is a setting of `longlive settings sample`, such as steps.",)
    rows = tuple(describe(EvaluateSpec, prefix="evaluate."))
    return SettingGroup("evaluate", _summary(EvaluateSpec), rows, notes)


def _train_group() -> SettingGroup:
    from longlive_jax.cli.stages import STAGES
    from longlive_jax.training.stages.stage import RunSpec

    stages = ", ".join(STAGES)
    rows = (SettingRow("stage", " | ".join(STAGES), "required", "what to train"),)
    notes = (
        f"`longlive settings STAGE` lists these and the stage's own, for {stages}.",
        "With the values of a recipe: `longlive settings RECIPE`, or `longlive train "
        "--config=RECIPE --help`.",
    )
    summary = "Settings that all stages have."
    return SettingGroup("train", summary, rows + tuple(describe(RunSpec)), notes)


def recipe_group(where: str) -> SettingGroup:
    """The settings of a recipe's verb, with the values and marks of the recipe.

    Raises UserError for an unknown recipe, and for one with wrong settings.
    """
    settings = load_config(where).to_dict()
    kind = kind_of(settings)
    if kind is None:
        raise UserError(f"{where}: is not a recipe; it must set stage, sample or evaluate")
    rows, notes = {"sample": _sample_rows, "evaluate": _evaluate_rows, "train": _train_rows}[kind](
        settings
    )
    rows = marked(rows, dict(_leaves(settings)), RECIPE_MARK)
    summary = f"{where} is {KIND_NAMES[kind]}: longlive {kind} --config={where}"
    legend = f"{RECIPE_MARK} is set by the recipe; values without a mark are defaults."
    return SettingGroup(where, summary, tuple(rows), (legend, *notes))


type RowsAndNotes = tuple[list[SettingRow], tuple[str, ...]]


def _sample_rows(settings: Mapping[str, Any]) -> RowsAndNotes:
    """Rows with the settings that the checkpoint stores, and those of the recipe."""
    from longlive_jax.io.builtin import find_checkpoint
    from longlive_jax.sampling.settings import SampleSpec, checkpoint_settings, spec_for

    reject_unknown(settings, ("checkpoint", "sample"), "config")
    checkpoint, changes = settings.get("checkpoint"), settings.get("sample") or {}
    own: Mapping[str, Any] = {}
    try:
        folder = find_checkpoint(checkpoint)
    except UserError as error:
        spec, note = build(SampleSpec, changes, path="sample"), f"{error}."
    else:
        spec, own = spec_for(folder, changes), checkpoint_settings(folder)
        note = f"{CHECKPOINT_MARK} is stored in the checkpoint {str(checkpoint)!r}."
    group = find_group("sample")
    first = dataclasses.replace(group.rows[0], default=str(checkpoint))
    rows = [first, *describe(SampleSpec, prefix="sample.", values=spec)]
    return marked(rows, [f"sample.{key}" for key in own], CHECKPOINT_MARK), (note,)


def _evaluate_rows(settings: Mapping[str, Any]) -> RowsAndNotes:
    from longlive_jax.small_world.cases import EvaluateSpec

    reject_unknown(settings, ("evaluate",), "config")
    spec = build(EvaluateSpec, settings["evaluate"] or {}, path="config.evaluate")
    return describe(EvaluateSpec, prefix="evaluate.", values=spec), find_group("evaluate").notes


def _train_rows(settings: Mapping[str, Any]) -> RowsAndNotes:
    from longlive_jax.cli.stages import STAGES

    values = dict(settings)
    name = values.pop("stage")
    if name not in STAGES:
        raise UserError(f"unknown config.stage {name!r}{nearest(str(name), STAGES)}")
    first = dataclasses.replace(find_group("train").rows[0], default=name)
    cls = STAGES[name]
    try:
        return [first, *describe(cls, values=build(cls, values))], ()
    except UserError as error:  # the command line has to complete the recipe
        reject_unknown(values, [f.name for f in dataclasses.fields(cls)], "config")
        stated = {path: value_text(value) for path, value in _leaves(values)}
        rows = [
            dataclasses.replace(row, default=stated.get(row.path, row.default))
            for row in describe(cls)
        ]
        return [first, *rows], (f"To be completed: {error}.",)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of all values in a nested mapping, and the values."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _summary(cls: type) -> str:
    """The first line of a class's docstring."""
    return (cls.__doc__ or "").strip().splitlines()[0]


def is_recipe(name: str) -> bool:
    """Whether a word names a recipe rather than a group."""
    return name.split(":")[0] in known_recipes() or ".py" in name or ":" in name or "/" in name
