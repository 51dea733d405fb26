"""Dispatches verbs, reports errors, and loads config files with overrides.

A verb is a module `longlive_jax.cli.<verb>` with `main(argv)`, imported on demand so that
`longlive --help` is instant. Exit codes: 0 success, 1 a run that could not continue (one line), 2 a
mistake in the input (one line, no traceback), 130 interrupted (after the verb has cleaned up), 141
a closed pipe. Anything else is a bug and shows its traceback.

`ml_collections.config_flags` is not used: it accepts overrides only of keys that the file states,
while a config here states only what differs from the dataclass defaults. Overrides are merged into
the ConfigDict, and `spec.build` checks every key and suggests the nearest known one.
"""

import argparse
import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ml_collections import ConfigDict

from longlive_jax import __version__
from longlive_jax.cli.compilation_cache import take_compilation_cache, use_compilation_cache
from longlive_jax.spec import Failure, UserError, nearest

VERBS = {
    "sample": "sample a video from a shot script",
    "demo": "sample a short video from the built-in model, and judge it",
    "train": "train the model of a config: --config=configs/small_world.py:vae",
    "curves": "plot the metrics of several training runs in one picture",
    "evaluate": "sample held-out scripts and report how often the videos are correct",
    "convert": "convert checkpoints of other libraries, without unpickling anything",
    "data": "check a dataset of videos, or encode it to latents and text features",
    "quantize": "quantize a checkpoint to NVFP4 or FP8, for inference in a quarter of the memory",
    "export": "export a checkpoint to safetensors, with original or diffusers names",
    "bench": "measure speed and memory by stage",
    "kernels": "check the code and the results of every GPU kernel",
    "plan": "estimate memory and compute of training on other GPUs, and whether it fits",
}
"""Verbs and their one-line descriptions."""

REPOSITORY = Path(__file__).resolve().parents[2]


def run(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (by default this process's) and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        cache, argv = take_compilation_cache(argv)
        return dispatch(argv, cache)
    except UserError as error:
        print(f"longlive: {error}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"longlive: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("longlive: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) is gone; redirect stdout so that the flush at exit cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as end:  # raised by argparse after --help
        return end.code if isinstance(end.code, int) else int(end.code is not None)


def dispatch(argv: list[str], compilation_cache: str | None = None) -> int:
    """Calls the verb named by `argv[0]`. Raises UserError if it is unknown."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
    if not {"-h", "--help"} & set(rest):
        use_compilation_cache(verb, compilation_cache)
    code = importlib.import_module(f"longlive_jax.cli.{verb}").main(rest)
    return int(code or 0)


def usage() -> str:
    """Returns the text of `longlive --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in VERBS.items()]
    return "\n".join(
        [
            "usage: longlive <verb> [options]   (longlive <verb> --help)",
            "",
            "verbs:",
            *lines,
            "",
            "--compilation_cache=off|FOLDER: where compiled programs are kept for later runs",
        ]
    )


class Parser(argparse.ArgumentParser):
    """An `argparse` parser whose errors are UserErrors and suggest the nearest option."""

    def __init__(self, verb: str, description: str, **settings: Any):
        super().__init__(
            prog=f"longlive {verb}", description=description, allow_abbrev=False, **settings
        )

    def parse_args(self, args=None, namespace=None):
        """Parses all arguments. Raises UserError for an unknown one."""
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            name = extra[0].split("=")[0]
            actions = self._option_string_actions.items()
            options = [o for o, action in actions if o.startswith("--") and _is_public(action)]
            kind = "option" if name.startswith("-") else "argument"
            hint = nearest(name, options) if kind == "option" else ""
            raise UserError(f"{self.prog}: unknown {kind} {name!r}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage and exiting."""
        raise UserError(f"{self.prog}: {message}")


def _is_public(action: argparse.Action) -> bool:
    """Whether an option appears in the help."""
    return action.help != argparse.SUPPRESS


def take_config(argv: Sequence[str], *, default: str | None = None) -> tuple[ConfigDict, list[str]]:
    """Splits `--config=FILE.py[:ARG]` and `--config.a.b=VALUE` off a command line.

    Returns the file's `get_config(ARG)` with the overrides merged in, and the other arguments.
    Overrides may set keys that the file leaves at their defaults; `spec.build` checks them. FILE is
    relative to the current folder or the repository root. A request for help needs no config.
    Raises UserError for a missing file, an unknown argument, or a malformed override.
    """
    # 1. Split the arguments.
    where, overrides, rest = default, [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config" and not name.startswith("--config."):
            rest.append(word)
            continue
        if not equals:
            value = next(words, "")
        if not value and name == "--config":
            raise UserError("--config: expected FILE.py or FILE.py:ARGUMENT")
        if name == "--config":
            where = value
        else:
            overrides.append((name.removeprefix("--config."), value))
    # 2. Load the config and apply the overrides.
    if where is None and {"-h", "--help"} & set(rest):
        return ConfigDict(), rest
    if where is None:
        raise UserError(f"--config is missing; expected one of: {', '.join(known_configs())}")
    config = load_config(where)
    for path, value in overrides:
        override(config, path, value)
    return config, rest


def load_config(where: str) -> ConfigDict:
    """Returns `get_config(ARG)` of `FILE.py:ARG`, unlocked.

    Raises UserError for a missing file or an unknown argument.
    """
    name, _, argument = where.partition(":")
    module = _load_module(find_config(name))
    known = getattr(module, "ARGUMENTS", None)
    for word in filter(None, argument.split(",")):
        if known is not None and word.split("=")[0] not in known:
            raise UserError(f"{name}: unknown argument {word!r}{nearest(word, known)}")
    try:
        config = module.get_config(argument)
    except ValueError as error:
        raise UserError(f"{name}:{argument}: {error}") from error
    config.unlock()
    return config


def known_configs() -> list[str]:
    """Returns the config files of the repository, as `configs/x.py`."""
    return sorted(f"configs/{p.name}" for p in (REPOSITORY / "configs").glob("[!_]*.py"))


def find_config(name: str) -> Path:
    """Returns the path of a config file, in the current folder or the repository.

    Raises UserError if there is none.
    """
    for path in (Path(name), REPOSITORY / name):
        if path.is_file() and path.suffix == ".py":
            return path
    raise UserError(f"--config: no config file {name!r}{nearest(name, known_configs())}")


def _load_module(path: Path) -> ModuleType:
    source = importlib.util.spec_from_file_location(f"longlive_config_{path.stem}", path)
    if source is None or source.loader is None:
        raise UserError(f"--config: {path} is not a Python file")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config: {path} has no get_config(arg)")
    return module


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets the dotted `path` of `config` to the value of `text`, creating parents as needed.

    Raises UserError if the path is malformed, or contradicts the config's structure.
    """
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
    if isinstance(node.get(leaf), ConfigDict) and parse_value(text) is not None:
        raise UserError(f"--config.{path}: is a group of {', '.join(sorted(node[leaf]))}")
    value = text if isinstance(node.get(leaf), str) else parse_value(text)
    with node.ignore_type():
        node[leaf] = value


def parse_value(text: str) -> Any:
    """Parses Python literals and true/false/none in any case; returns other text unchanged."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
