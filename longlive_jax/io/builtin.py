"""The checkpoint that comes with the package."""

from importlib import resources
from pathlib import Path

from longlive_jax.io.checkpoint import MANIFEST
from longlive_jax.spec import UserError


def builtin_checkpoint(name: str = "small_world") -> Path:
    """Directory of a built-in checkpoint; UserError if this copy of the package lacks it."""
    folder = Path(str(resources.files("longlive_jax") / "assets" / name))
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"the built-in checkpoint {name!r} is missing from {folder}; install the package again "
            "or name another one with --checkpoint=DIR"
        )
    return folder
