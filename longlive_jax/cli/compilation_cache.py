"""Turns on the persistent compilation cache for a command, before JAX is imported.

    longlive --compilation_cache=off VERB ...       # compiles everything anew
    longlive --compilation_cache=FOLDER VERB ...    # another folder

JAX reads its settings from the environment when it is imported, so `longlive --help` need not
import it, and the processes that a command starts use the same folder.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from longlive_jax.cli.notes import print_notes
from longlive_jax.io.compilation_cache import compilation_cache_folder
from longlive_jax.io.paths import check_writable
from longlive_jax.spec import UserError

OPTION = "--compilation_cache"
FOLDER = "JAX_COMPILATION_CACHE_DIR"
ENABLED = "JAX_ENABLE_COMPILATION_CACHE"
VERBS = ("sample", "demo", "train", "evaluate", "data", "quantize")
"""Verbs that use the cache; the others measure compilation, or compile nothing."""
KEEP_ALL = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Small programs are kept too: hundreds of them add up to seconds."""


def take_compilation_cache(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of `--compilation_cache` or None, and the other arguments.

    Raises UserError if the option has no value.
    """
    value, rest, words = None, [], iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if name != OPTION:
            rest.append(word)
            continue
        value = text if equals else next(words, "")
        if not value or (value.startswith("--") and not equals):
            raise UserError(f"{OPTION}: expected off or a folder, got {value or 'nothing'}")
    return value, rest


def use_compilation_cache(verb: str, choice: str | None) -> None:
    """Sets JAX's environment variables, unless JAX is imported already.

    Args:
      verb: verb of the command.
      choice: `off`, a folder, or None for `$JAX_COMPILATION_CACHE_DIR` or the user's cache folder.

    Says where the folder is when it is created. Without a folder that can be written, it says why
    and compiled programs are not kept. Raises UserError for a given folder that cannot be written.
    """
    if verb not in VERBS:
        if choice is not None:
            print_notes(
                [f"{OPTION} has no effect on {verb}; only {', '.join(VERBS)} use the cache"]
            )
        return
    if "jax" in sys.modules:
        if choice is not None:
            print_notes([f"{OPTION} has no effect, because this process has imported JAX"])
        return
    # 1. The user's choice.
    if choice == "off":
        os.environ[ENABLED] = "false"
        return
    if choice is not None:
        os.environ[FOLDER] = str(check_writable(choice).resolve())
    if os.environ.get(ENABLED, "").lower() in ("false", "0", "no", "off"):
        return
    os.environ.update({name: os.environ.get(name, value) for name, value in KEEP_ALL.items()})
    if FOLDER in os.environ:
        return
    # 2. The default folder.
    try:
        folder = compilation_cache_folder()
        is_new = not folder.is_dir()
        check_writable(folder)
    # RuntimeError: there is no home folder. OSError: the system does not name the CPU.
    except (UserError, RuntimeError, OSError) as error:
        print_notes([f"compiled programs are not kept: {error}"])
        return
    os.environ[FOLDER] = str(folder)
    if is_new:
        where = f"compiled programs are kept in {_short(folder)}, so later runs start faster"
        print_notes([f"{where} ({OPTION}=off keeps none)"])


def _short(folder: Path) -> str:
    """The path with `~` for the home folder."""
    try:
        return f"~/{folder.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(folder)
