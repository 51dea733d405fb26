"""Finds recipes, loads them, and merges `--config.a.b=VALUE` overrides into them.

A recipe is a Python file with `get_config(ARGUMENT)`, which returns a `ConfigDict`, and usually
with `ARGUMENTS`, the words that ARGUMENT may consist of. Those that ship with the package are named
`NAME:ARGUMENT` or `configs/NAME.py:ARGUMENT` in any folder; all others are named by their path.

`ml_collections.config_flags` is not used: it accepts overrides only of keys that the file states,
while a recipe states only what differs from the dataclass defaults. Overrides are merged into the
ConfigDict, and `spec.build` checks every key and suggests the nearest known one.
"""

import ast
import dataclasses
import importlib.util
import inspect
import os
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from longlive_jax.spec import UserError, nearest

REPOSITORY = Path(__file__).resolve().parents[2]
"""Root of a checkout; in an installation, the folder of all packages."""

FOLDER = "configs"
"""Folder of the recipes: in the root of a checkout, in the package of an installation."""

KINDS = {"stage": "train", "evaluate": "evaluate", "sample": "sample", "checkpoint": "sample"}
"""Key of a recipe -> the verb that the recipe is for; the first key that it has decides."""

KIND_NAMES = {
    "train": "a training recipe",
    "evaluate": "an evaluation recipe",
    "sample": "a sampling recipe",
}


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A command line, split into its recipe, its overrides and the rest.

    Attributes:
      where: the recipe, as `NAME[:ARGUMENT]` or `FILE.py[:ARGUMENT]`; None: not given.
      overrides: dotted key and text of each `--config.KEY=VALUE`, in order.
      rest: the other arguments.
    """

    where: str | None
    overrides: tuple[tuple[str, str], ...]
    rest: list[str]

    @property
    def asks_help(self) -> bool:
        """Whether it is a request for help."""
        return bool({"-h", "--help"} & set(self.rest))


def split(argv: Sequence[str]) -> CommandLine:
    """Splits `--config=RECIPE` and `--config.a.b=VALUE` off a command line.

    `--config RECIPE` and `--config.a.b VALUE` are accepted as well. Raises UserError for one
    without a value.
    """
    where, overrides, rest = None, [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config" and not name.startswith("--config."):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
            if not value or value.startswith("--"):
                got = f", got {value}" if value else ""
                raise UserError(f"{name}: expected a value{got}; write {name}=VALUE")
        if name != "--config":
            overrides.append((name.removeprefix("--config."), value))
        elif not value:
            raise UserError(
                f"--config: expected NAME:ARGUMENT or FILE.py:ARGUMENT; {recipe_hint()}"
            )
        else:
            where = value
    return CommandLine(where, tuple(overrides), rest)


def take_config(
    argv: Sequence[str], *, default: str | None = None, verb: str | None = None
) -> tuple[ConfigDict, list[str]]:
    """The recipe of a command line with its overrides merged in, and the other arguments.

    Overrides may set keys that the recipe leaves at their defaults; `spec.build` checks them. A
    request for help needs no recipe. Raises UserError for an unknown recipe or argument, for a
    malformed override, and for a recipe that is not for `verb` ("sample", "train", "evaluate").
    """
    line = split(argv)
    where = line.where or default
    if where is None and line.asks_help:
        return ConfigDict(), line.rest
    if where is None:
        raise UserError(f"--config is missing; {recipe_hint()}")
    return load_with_overrides(where, line.overrides, verb), line.rest


def load_with_overrides(
    where: str, overrides: Sequence[tuple[str, str]], verb: str | None = None
) -> ConfigDict:
    """The recipe `where` with overrides (dotted key, text) merged in; see `take_config`."""
    config = load_config(where)
    states_stage = any(path == "stage" for path, _ in overrides)
    if verb is not None and not states_stage:
        check_kind(config, verb, where)
    for path, value in overrides:
        override(config, path, value)
    return config


def kind_of(settings: Mapping[str, Any]) -> str | None:
    """The verb that a recipe is for: "train", "evaluate", "sample", or None for none of them."""
    return next((verb for key, verb in KINDS.items() if key in settings), None)


def check_kind(settings: Mapping[str, Any], verb: str, where: str) -> None:
    """Raises UserError, with the command to use instead, for a recipe of another verb."""
    kind = kind_of(settings)
    if kind is not None and kind != verb:
        raise UserError(
            f"{where} is {KIND_NAMES[kind]}; run `longlive {kind} --config={where}`, or choose "
            f"{KIND_NAMES[verb]}"
        )


def recipe_folder() -> Path:
    """The folder of the recipes that ship with the package; UserError if it is missing."""
    folders = [Path(str(resources.files("longlive_jax"))) / FOLDER]
    if (REPOSITORY / "pyproject.toml").is_file():
        folders.append(REPOSITORY / FOLDER)
    for folder in folders:
        if any(folder.glob("[!_]*.py")):
            return folder
    raise UserError("this installation has no recipes; reinstall the package, or give a FILE.py")


def known_recipes() -> list[str]:
    """Names of the recipes that ship with the package, without arguments."""
    return sorted(path.stem for path in recipe_folder().glob("[!_]*.py"))


def recipe_arguments(path: Path) -> tuple[str, ...]:
    """ARGUMENTS of a recipe, read without importing it; empty if it states none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Assign) and getattr(targets[0], "id", "") == "ARGUMENTS":
            return tuple(ast.literal_eval(node.value))
    return ()


def recipe_kinds(name: str) -> dict[str, str | None]:
    """Argument -> verb, for the arguments of a recipe that ships with the package."""
    arguments = recipe_arguments(recipe_folder() / f"{name}.py") or ("",)
    return {x: kind_of(load_config(f"{name}:{x}" if x else name).to_dict()) for x in arguments}


def recipe_summary(name: str) -> str:
    """First line of the docstring of a recipe that ships with the package."""
    text = (recipe_folder() / f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def parse_name(where: str) -> tuple[str, str]:
    """Name or path, and argument, of `NAME[:ARGUMENT]` or `FILE.py[:ARGUMENT]`."""
    path = re.fullmatch(r"(.*\.py)(?::(.*))?", where, re.DOTALL)
    if path is not None:
        return path[1], path[2] or ""
    name, _, argument = where.partition(":")
    return name, argument


def find_config(name: str) -> Path:
    """The file of a recipe, by its name or path.

    Raises UserError, with the nearest known recipe, if there is none.
    """
    # 1. A path: the user's own file, else a recipe that ships with the package.
    path = Path(os.path.expanduser(name))  # a Path's own raises for an unknown user
    if path.suffix == ".py" and path.is_file():
        return path
    shipped = name
    if path.suffix == ".py" and path.parent.as_posix() == FOLDER:
        shipped = path.stem
    # 2. A name.
    if shipped in known_recipes():
        return recipe_folder() / f"{shipped}.py"
    if path.is_file():
        raise UserError(f"--config: {name} is not a Python file; a recipe ends in .py")
    local = [p for p in (f"{name}.py", f"{FOLDER}/{name}.py") if Path(p).is_file()]
    if local:
        raise UserError(f"--config: no recipe {name!r}; for the file write --config={local[0]}")
    hint = _nearest_and_all(path.stem, known_recipes())
    raise UserError(f"--config: no recipe or file {name!r}{hint}")


def load_config(where: str) -> ConfigDict:
    """`get_config(ARGUMENT)` of `NAME:ARGUMENT` or `FILE.py:ARGUMENT`, unlocked.

    Raises UserError for an unknown recipe or argument, and for a file that raises anything.
    """
    name, argument = parse_name(where)
    path = find_config(name)
    make, known = _load_module(path, name)
    # 1. Check the argument.
    for word in filter(None, argument.split(",")):
        if known is not None and word.split("=")[0] not in known:
            raise UserError(f"{name}: unknown argument {word!r}{_nearest_and_all(word, known)}")
    takes_argument = bool(inspect.signature(make).parameters)
    if argument and not takes_argument:
        raise UserError(f"{name}: get_config() takes no argument, got {argument!r}")
    # 2. Call it.
    config = _guarded(lambda: make(argument) if takes_argument else make(), where, path)
    if isinstance(config, dict):
        config = _guarded(lambda: ConfigDict(config), where, path)
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise UserError(f"{name}: get_config must return a ConfigDict or a dict, got {kind}")
    config.unlock()
    return config


def _load_module(path: Path, name: str) -> tuple[Callable[..., Any], Sequence[str] | None]:
    """`get_config` of a file, and its ARGUMENTS or None."""
    source = importlib.util.spec_from_file_location(f"longlive_config_{path.stem}", path)
    if source is None or source.loader is None:
        raise UserError(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(source)
    loader = source.loader
    _guarded(lambda: loader.exec_module(module), name, path)
    make = getattr(module, "get_config", None)
    if not callable(make):
        raise UserError(f"--config: {path} has no function get_config(argument)")
    return make, getattr(module, "ARGUMENTS", None)


def _guarded(call: Callable[[], Any], where: str, path: Path) -> Any:
    """`call()`; whatever a user's file raises becomes a UserError of one line."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) and reason:  # what the file says to its user
            raise UserError(f"{where}: {reason}") from error
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path.absolute())]
        lines = [error.lineno] if isinstance(error, SyntaxError) else lines
        at = f", line {lines[-1]}" if lines else ""
        reason = error.msg if isinstance(error, SyntaxError) else reason
        raise UserError(f"{where}: {type(error).__name__}: {reason} ({path}{at})") from error


def recipe_hint() -> str:
    """The known recipes, for error messages."""
    return f"recipes: {', '.join(known_recipes())}"


def _nearest_and_all(word: str, known: Sequence[str]) -> str:
    """The nearest of `known`, and all of them."""
    hint, names = nearest(word, known), ", ".join(sorted(known))
    return f"{hint} Known: {names}" if hint.endswith("?") else hint


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets the dotted `path` of `config` to the value of `text`, creating parents as needed.

    A `size` may also be HEIGHTxWIDTH. Raises UserError if the path is malformed, or contradicts
    the config's structure.
    """
    node, leaf = _descend(config, path)
    if isinstance(node.get(leaf), ConfigDict) and parse_value(text) is not None:
        keys = ", ".join(sorted(node[leaf]))
        has = f" of {keys}" if keys else ""
        raise UserError(f"--config.{path}: is a group{has}; set --config.{path}.NAME=VALUE")
    value = text if isinstance(node.get(leaf), str) else parse_value(text)
    if leaf == "size" and re.fullmatch(r"\d+x\d+", text):
        value = tuple(int(edge) for edge in text.split("x"))
    set_value(config, path, value)


def set_value(config: ConfigDict, path: str, value: Any) -> None:
    """Sets the dotted `path` of `config`, creating parents as needed; UserError as `override`."""
    node, leaf = _descend(config, path)
    with node.ignore_type():
        node[leaf] = value


def _descend(config: ConfigDict, path: str) -> tuple[ConfigDict, str]:
    """The group that holds the dotted `path`, created if it is missing, and the last key."""
    *parents, leaf = path.split(".")
    if not all((*parents, leaf)):
        raise UserError(f"--config.{path}: empty key")
    node: Any = config
    for i, key in enumerate(parents):
        if node.get(key) is None:
            node[key] = ConfigDict()
        node = node[key]
        if not isinstance(node, ConfigDict):
            raise UserError(f"--config.{path}: {'.'.join(parents[: i + 1])} has no keys below it")
    return node, leaf


def parse_value(text: str) -> Any:
    """Parses Python literals and true/false/none in any case; returns other text unchanged."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
