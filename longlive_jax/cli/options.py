"""Plain options for the settings people reach for first, such as `--steps` for `sample.steps`.

`parse_command` parses the command line of a verb that takes `--config`: the recipe, overrides,
plain options and the verb's own options. Type, choices and help of a plain option are those of its
setting, read off the dataclass.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from longlive_jax.cli.app import Parser, help_width
from longlive_jax.cli.meshes import parse_mesh
from longlive_jax.cli.recipes import (
    load_with_overrides,
    parse_value,
    recipe_hint,
    set_value,
    split,
)
from longlive_jax.cli.setting_groups import find_group, recipe_group
from longlive_jax.cli.setting_rows import SettingRow, filled, settings_table
from longlive_jax.spec import UserError

type Targets = tuple[str, ...]

PLAIN_OPTIONS: dict[str, dict[str, Targets]] = {
    "sample": {
        "steps": ("sample.steps",),
        "guidance": ("sample.guidance",),
        "size": ("sample.size",),
        "fps": ("sample.fps",),
        "solver": ("sample.solver",),
        "negative_prompt": ("sample.negative_prompt",),
        "kv": ("sample.kv",),
        "quant": ("sample.quant.policy",),
        "dtype": ("sample.dtype",),
    },
    "train": {
        "steps": ("loop.steps",),
        "batch": ("batch", "windows.batch"),
        "lr": ("optim.lr",),
        "seed": ("loop.seed",),
        "mesh": ("mesh",),
    },
    "evaluate": {
        "steps": ("evaluate.sample.steps",),
        "guidance": ("evaluate.sample.guidance",),
        "solver": ("evaluate.sample.solver",),
        "batch": ("evaluate.batch",),
    },
}
"""Verb -> option -> the setting that it sets: the first of these that the recipe's stage has."""

OWN_OPTIONS = {"checkpoint"}
"""Options of the verbs themselves that take precedence over a setting of the same name."""

STAGE_OF_HELP = "clips"
"""The stage whose settings describe the plain options of `train`."""

DEST = "setting:{}"
"""Attribute of the parsed arguments that holds a plain option."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
      settings: the recipe, with overrides and plain options merged in.
      args: the verb's own options.
      given: dotted setting, or own option, -> how the command line states it, such as `--steps`;
        without settings that only the recipe sets.
    """

    settings: dict[str, Any]
    args: argparse.Namespace
    given: Mapping[str, str]


def parse_command(
    parser: Parser, argv: Sequence[str], verb: str, *, default: str | None = None
) -> Command:
    """Parses the command line of a verb that takes `--config`; prints the help if asked to.

    Args:
      parser: parser of the verb's own options; plain options are added to it.
      argv: the command line after the verb.
      verb: key of `PLAIN_OPTIONS`.
      default: recipe to use without `--config`.

    Raises UserError for a mistake in any of them, and for a plain option that contradicts an
    override.
    """
    # 1. Split and parse.
    line = split(argv)
    where = line.where or default
    parser.closing = lambda: settings_help(verb, line.where, default)
    add_plain_options(parser, verb, default)
    if where is None and not line.asks_help:
        raise UserError(f"--config is missing; {recipe_hint()}")
    args = parser.parse_args(line.rest)
    assert where is not None
    values = {name: vars(args).pop(DEST.format(name)) for name in PLAIN_OPTIONS[verb]}
    values = {name: value for name, value in values.items() if value is not None}
    for name in PARSED_LATER.keys() & values.keys():
        values[name] = PARSED_LATER[name](values[name])
    # 2. Load the recipe, and apply overrides and plain options.
    config = load_with_overrides(where, line.overrides, verb)
    stated = dict(line.overrides)
    for name in OWN_OPTIONS & vars(args).keys():
        if vars(args)[name] is not None:
            _check_agreement(f"--{name}", name, vars(args)[name], stated)
    own = {word.split("=")[0] for word in line.rest if word.startswith("--")}
    given = {word: word for word in own} | {path: f"--config.{path}" for path in stated}
    for name, value in values.items():
        path = _target(name, PLAIN_OPTIONS[verb][name], config)
        _check_agreement(f"--{name}", path, value, stated)
        set_value(config, path, value)
        given[path] = f"--{name}"
    return Command(config.to_dict(), args, given)


def add_config_option(parser: Parser | argparse._ArgumentGroup, default: str | None = None) -> None:
    """Adds `--config` to the help; `recipes.split` takes it off the command line."""
    text = "NAME:ARGUMENT of a recipe (see `longlive settings`), or FILE.py:ARGUMENT"
    parser.add_argument("--config", metavar="RECIPE", default=default, help=text)


def add_plain_options(parser: Parser, verb: str, default: str | None = None) -> None:
    """Adds `--config` and the plain options of a verb, as a group of its help."""
    rows = _rows(verb)
    group = parser.add_argument_group("recipe and common settings")
    add_config_option(group, default)
    for name, targets in PLAIN_OPTIONS[verb].items():
        row = rows[targets[0]]
        choices = row.type.split(" | ") if " | " in row.type else None
        group.add_argument(
            f"--{name}",
            dest=DEST.format(name),
            type=PARSERS.get(row.type, str),
            choices=choices,
            metavar=None if choices else _metavar(name, row),
            help=row.meaning.rstrip(".").replace("%", "%%"),
        )


def settings_help(verb: str, where: str | None, default: str | None) -> str:
    """The settings of a verb as text for its help, with the values of the recipe `where`."""
    chosen = where or default
    group = find_group(verb) if chosen is None else recipe_group(chosen)
    title = "all settings, set with --config.SETTING=VALUE"
    title += ":" if chosen is None else f"; values of {chosen}:"
    width = help_width()
    table, notes = settings_table(group.rows, width=width), filled(group.notes, width=width)
    return "\n".join([title, "", table, "", notes])


def _rows(verb: str) -> dict[str, SettingRow]:
    """The settings that plain options of a verb may set, by path."""
    group = find_group(STAGE_OF_HELP if verb == "train" else verb)
    rows = {row.path: row for row in group.rows}
    if verb == "evaluate":
        rows |= {f"evaluate.{row.path}": row for row in find_group("sample").rows}
    return rows


def _target(name: str, targets: Targets, config: ConfigDict) -> str:
    """The setting that a plain option sets; UserError if the recipe's stage has none of them."""
    from longlive_jax.cli.stages import STAGES

    stage = config.get("stage")
    if stage not in STAGES or len(targets) == 1:
        return targets[0]
    paths = {row.path for row in find_group(str(stage)).rows}
    for path in targets:
        if path in paths:
            return path
    raise UserError(
        f"--{name}: stage {stage!r} has no such setting; `longlive settings {stage}` lists its own"
    )


def _check_agreement(option: str, path: str, value: Any, stated: Mapping[str, str]) -> None:
    """Raises UserError if an override sets the same setting, or a part of it, to another value."""
    for other, text in stated.items():
        is_same = other == path and parse_value(text) in (value, str(value))
        is_same = is_same or (other == path and text == value)
        overlaps = f"{other}.".startswith(f"{path}.") or f"{path}.".startswith(f"{other}.")
        if overlaps and not is_same:
            raise UserError(f"{option} contradicts --config.{other}={text}; give one of them")


def _metavar(name: str, row: SettingRow) -> str:
    names = {
        "size": "HxW",
        "quant": "POLICY",
        "mesh": "AXIS=N,..",
        "float": "NUMBER",
        "int": "N",
        "str": "TEXT",
    }
    return names.get(name) or names.get(row.type, "VALUE")


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _mesh_axes(text: str) -> dict[str, int]:
    """The axes of `data=2,sp=4`; those that are not named have size 1."""
    return dataclasses.asdict(parse_mesh(text))


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of `--size`; UserError for anything but `HEIGHTxWIDTH` of a legal size."""
    from longlive_jax.sampling.script import check_size, read_size

    size = read_size(text, "--size")
    check_size(*size)
    return size


PARSERS: dict[str, Callable[[str], Any]] = {"int": _whole_number, "float": _number}
"""Type of a setting -> parser of its text; others are strings."""

PARSED_LATER: dict[str, Callable[[str], Any]] = {"size": parse_size, "mesh": _mesh_axes}
"""Plain options whose parser raises UserErrors, which argparse would swallow."""
