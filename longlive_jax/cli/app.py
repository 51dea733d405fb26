"""Dispatches verbs and reports errors; the parser of their options.

A verb is a module `longlive_jax.cli.<verb>` with `main(argv)`, imported on demand so that
`longlive --help` is instant. Exit codes: 0 success, 1 a run that could not continue (one line), 2 a
mistake in the input (one line, no traceback), 130 interrupted (after the verb has cleaned up), 141
a closed pipe. Anything else is a bug and shows its traceback.
"""

import argparse
import contextlib
import contextvars
import importlib
import inspect
import io
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from longlive_jax import __version__
from longlive_jax.cli.compilation_cache import take_compilation_cache, use_compilation_cache
from longlive_jax.spec import Failure, UserError, nearest

VERBS = {
    "sample": "sample a video from a shot script",
    "compare": "sample a script with several models or settings, and show them side by side",
    "demo": "sample a short video from the built-in model, and judge it",
    "train": "train the model of a recipe, such as --config=small_world:vae",
    "curves": "plot the metrics of several training runs in one picture",
    "evaluate": "sample held-out scripts and report how often the videos are correct",
    "convert": "convert checkpoints of other libraries, without unpickling anything",
    "data": "check a dataset of videos, or encode it to latents and text features",
    "quantize": "quantize a checkpoint to NVFP4 or FP8, for inference in a quarter of the memory",
    "export": "export a checkpoint to safetensors, with original or diffusers names",
    "bench": "measure speed and memory by stage",
    "kernels": "check the code of every GPU kernel, and prove and time it on this machine's GPU",
    "plan": "estimate memory and compute of training on other GPUs, and whether it fits",
    "settings": "list settings with type, default and meaning, of a verb or a recipe",
    "env": "print versions, devices, memory and caches, for a bug report",
    "completion": "print the completion script of a shell: bash, zsh or fish",
}
"""Verbs and their one-line descriptions."""

SUBVERBS = {
    "data": ("check", "encode"),
    "kernels": ("check", "prove"),
    "bench": ("sampler", "encode", "attention", "balanced", "nvfp4", "kernels", "kv"),
}
"""Verbs whose first argument is a verb as well, and these."""

MAX_WIDTH = 100
"""Columns that help never exceeds."""

_help_reader: contextvars.ContextVar[Callable[["Parser"], None] | None] = contextvars.ContextVar(
    "help_reader", default=None
)
"""What receives a parser instead of standard output when its help is asked for."""


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
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    if argv[0] == "help":
        return show_help(argv[1:])
    verb, rest = _known_verb(argv[0]), argv[1:]
    if not {"-h", "--help"} & set(rest):
        use_compilation_cache(verb, compilation_cache)
    return int(_module(verb).main(rest) or 0)


def show_help(words: list[str]) -> int:
    """Prints the help of a verb, or of `VERB SUBVERB`; that of all verbs without `words`.

    Raises UserError for an unknown verb.
    """
    if not words or words[0] in ("help", "-h", "--help"):
        print(usage())
        return 0
    verb, *rest = (word for word in words if word not in ("-h", "--help"))
    known = SUBVERBS.get(_known_verb(verb), ())
    if len(rest) > bool(known):
        raise UserError(f"help: unexpected argument {rest[-1]!r}; write `longlive help {verb}`")
    if rest and rest[0] not in known:
        raise UserError(f"help: {verb} has no {rest[0]!r}{nearest(rest[0], known)}")
    return int(_module(verb).main([*rest, "--help"]) or 0)


def parser_of(words: Sequence[str]) -> "Parser | None":
    """The parser of a verb or of `VERB SUBVERB`; None for one that has none.

    It is the parser whose help the verb would print.
    """
    parsers: list[Parser] = []
    token = _help_reader.set(parsers.append)
    # argparse exits after --help; a verb without a parser prints a text instead.
    try:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            _module(words[0]).main([*words[1:], "--help"])
    finally:
        _help_reader.reset(token)
    return parsers[0] if parsers else None


def _known_verb(verb: str) -> str:
    """`verb`; UserError if there is no such verb."""
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{nearest(verb, (*VERBS, 'help'))}")
    return verb


def _module(verb: str) -> Any:
    """The module of a verb."""
    return importlib.import_module(f"longlive_jax.cli.{verb}")


def usage() -> str:
    """Returns the text of `longlive --help`."""
    verbs = VERBS | {"help": "print the help of a verb: longlive help sample"}
    width = max(map(len, verbs))
    lines = [f"  {verb:<{width}}  {text}" for verb, text in verbs.items()]
    return "\n".join(
        [
            "usage: longlive VERB [options]   (longlive VERB --help lists the options)",
            "       longlive -h | --help | -V | --version",
            "",
            "verbs:",
            *lines,
            "",
            "--compilation_cache=off|FOLDER: where compiled programs are kept for later runs",
            "Start with `longlive demo`. Recipes and settings: `longlive settings`.",
        ]
    )


def help_width() -> int:
    """Columns of help: those of the terminal, between 60 and `MAX_WIDTH`."""
    return max(60, min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns))


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs one by one, keeps indented lines, and names the defaults of options."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=help_width())

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """The description: paragraphs are filled, those with an indented line are kept."""
        paragraphs = inspect.cleandoc(text).split("\n\n")
        return "\n\n".join(
            textwrap.indent(paragraph, indent)
            if "\n " in f"\n{paragraph}"
            else textwrap.fill(paragraph, width, initial_indent=indent, subsequent_indent=indent)
            for paragraph in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        """The help of an option, with its default if that says something."""
        text, default = action.help or "", action.default
        is_plain = default in (None, False, "", argparse.SUPPRESS) or isinstance(default, list)
        if is_plain or not action.option_strings or "default" in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An `argparse` parser whose errors are UserErrors and suggest the nearest option."""

    def __init__(self, verb: str, description: str, **settings: Any):
        super().__init__(
            prog=f"longlive {verb}",
            description=description,
            allow_abbrev=False,
            **{"formatter_class": HelpFormatter} | settings,
        )
        self.verb = verb
        self.words: list[str] = []
        self.closing: Callable[[], str] | None = None
        """Text after the options in the help; called only when the help is printed."""

    def format_help(self) -> str:
        """The help, with the closing text."""
        text = super().format_help()
        return text if self.closing is None else f"{text}\n{self.closing()}\n"

    def print_help(self, file: Any = None) -> None:
        """Prints the help, or hands this parser to `parser_of`."""
        reader = _help_reader.get()
        if reader is None:
            super().print_help(file)
        else:
            reader(self)

    def parse_args(self, args=None, namespace=None):
        """Parses all arguments. Raises UserError for an unknown one."""
        self.words = list(sys.argv[1:] if args is None else args)
        parsed, extra = self.parse_known_args(args, namespace)
        if extra:
            name = extra[0].split("=")[0]
            actions = self._option_string_actions.items()
            options = [o for o, action in actions if o.startswith("--") and is_public(action)]
            kind = "option" if name.startswith("-") else "argument"
            hint = nearest(name, options) if kind == "option" else ""
            raise UserError(f"{self.verb}: unknown {kind} {name!r}{hint}")
        return parsed

    def public_actions(self) -> list[argparse.Action]:
        """The options and arguments in the help, without the help itself."""
        return [x for x in self._actions if is_public(x) and x.dest != "help"]

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage and exiting."""
        raise UserError(f"{self.verb}: {self._explained(message)}")

    def _explained(self, message: str) -> str:
        """argparse's message in this program's words, with a remedy."""
        option, _, reason = message.removeprefix("argument ").partition(": ")
        if reason == "expected one argument":
            return f"{option} needs a value; write {option}=VALUE"
        missing = message.partition("arguments are required: ")[2]
        if not missing.startswith("--"):
            return message
        stray = next((word for word in self.words if not word.startswith("-")), None)
        first = missing.split(", ")[0]
        hint = f"write {first}={'VALUE' if stray is None else stray}"
        return f"{missing} {'are' if ', ' in missing else 'is'} missing; {hint}"


def is_public(action: argparse.Action) -> bool:
    """Whether an option appears in the help."""
    return action.help != argparse.SUPPRESS
