"""Frames of a video in a temporary file, so that a long video need not be in memory."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from longlive_jax.spec import Failure
from longlive_jax.typing import UInt8

__all__ = ["FrameSpool"]


class FrameSpool:
    """Uncompressed frames `[f, h, w, 3]` of one size; a context manager that deletes its file.

    Attributes:
      frames: number of frames so far.
    """

    def __init__(self, folder: Path):
        self.frames = 0
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._shape: tuple[int, ...] = ()

    def append(self, frames: UInt8[np.ndarray, "f h w 3"]) -> None:
        """Adds frames. Raises Failure if the disk is full or fails."""
        self._shape = frames.shape[1:]
        try:
            self._file.seek(self.frames * frames[0].nbytes)
            self._file.write(np.ascontiguousarray(frames).data)
        except OSError as error:
            raise Failure(
                f"{self._folder}: cannot be written ({error.strerror or error}); free some space "
                "or choose another folder"
            ) from error
        self.frames += len(frames)

    def read(self, indices: Sequence[int]) -> UInt8[np.ndarray, "f h w 3"]:
        """The frames of these indices."""
        size = int(np.prod(self._shape))
        images = []
        for index in indices:
            self._file.seek(index * size)
            images.append(np.frombuffer(self._file.read(size), np.uint8).reshape(self._shape))
        return np.stack(images)

    def close(self) -> None:
        """Deletes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
