"""The checkpoint and the adapter that ship with the package."""

import os
from importlib import resources
from pathlib import Path

from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST
from longlive_jax.spec import UserError

BUILTIN = "small_world"
"""Name of the built-in checkpoint."""

BUILTIN_ADAPTER = "small_world_4_steps"
"""Name of the built-in adapter, which distils the built-in checkpoint to 4 steps."""


def find_checkpoint(name: str | os.PathLike | None = None) -> Path:
    """The directory of a checkpoint, given by its path or by the built-in one's name.

    None is the built-in one. A folder in the current directory takes precedence over a name.
    Raises UserError if there is no such directory.
    """
    if name is None:
        return builtin_checkpoint()
    if not isinstance(name, str | os.PathLike):
        raise UserError(f"checkpoint must be a directory or {BUILTIN!r}, got {name!r}")
    folder = Path(name)
    if folder.is_dir():
        return folder
    if str(name) == BUILTIN:
        return builtin_checkpoint()
    raise UserError(
        f"checkpoint {str(name)!r} is not a directory; choose one written by `longlive convert` or "
        f"`longlive train`, or {BUILTIN!r}, the built-in one"
    )


def find_adapter(path: str | os.PathLike) -> Path:
    """The path of an adapter, or that of the built-in one by its name."""
    if str(path) == BUILTIN_ADAPTER and not Path(path).exists():
        return builtin_checkpoint(BUILTIN_ADAPTER)
    return Path(path)


def builtin_checkpoint(name: str = BUILTIN) -> Path:
    """The directory of a built-in checkpoint.

    Raises UserError if it is missing from this installation.
    """
    folder = Path(str(resources.files("longlive_jax") / "assets" / name))
    if not (folder / CHECKPOINT_MANIFEST).is_file():
        raise UserError(
            f"the built-in checkpoint {name!r} is missing from {folder}; reinstall the package, "
            "or choose another checkpoint with --checkpoint=DIR"
        )
    return folder
