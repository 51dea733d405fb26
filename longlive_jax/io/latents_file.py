"""Files of latents that grow chunk by chunk."""

import os
from pathlib import Path
from typing import IO

import numpy as np

from longlive_jax.spec import Failure
from longlive_jax.typing import Float

__all__ = ["LatentsFile"]


class LatentsFile:
    """A `.npy` file of latents `[f, h, w, c]` that is complete after every chunk."""

    def __init__(self, path: Path):
        self.path = path
        self._frames = 0

    def append(self, latents: Float[np.ndarray, "f h w c"]) -> None:
        """Adds latents, and then their number to the header.

        Raises Failure if the file cannot be written; its earlier latents stay readable.
        """
        latents = np.ascontiguousarray(latents)
        try:
            with self.path.open("r+b" if self._frames else "wb") as file:
                if not self._frames:
                    _write_header(file, 0, latents)
                file.seek(0, os.SEEK_END)
                file.write(latents.tobytes())
                file.flush()
                _write_header(file, self._frames + len(latents), latents)
        except OSError as error:
            raise Failure(
                f"{self.path}: cannot be written ({error.strerror or error}); free some space or "
                "choose another folder"
            ) from error
        self._frames += len(latents)


def _write_header(file: IO[bytes], frames: int, latents: np.ndarray) -> None:
    """Writes the header of `frames` frames like `latents`; it has room for a longer axis 0."""
    header = {
        "shape": (frames, *latents.shape[1:]),
        "fortran_order": False,
        "descr": np.lib.format.dtype_to_descr(latents.dtype),
    }
    file.seek(0)
    np.lib.format.write_array_header_1_0(file, header)
