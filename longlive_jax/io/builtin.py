"""The checkpoint that ships with the package."""

from importlib import resources
from pathlib import Path

from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST
from longlive_jax.spec import UserError


def builtin_checkpoint(name: str = "small_world") -> Path:
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
