"""Output paths, checked before a long computation starts."""

import tempfile
from pathlib import Path

from longlive_jax.spec import UserError

__all__ = ["check_writable"]


def check_writable(folder: str | Path) -> Path:
    """Creates `folder` if it is missing and checks that files can be written in it.

    Raises UserError if the folder cannot be created or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder"
        ) from error
    return folder
