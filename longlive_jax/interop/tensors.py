"""Lazily read tensors: shape and dtype are known, the values are read on demand."""

import dataclasses
import math
import os
from collections.abc import Callable

import numpy as np

from longlive_jax.spec import UserError

__all__ = ["LazyTensor", "pread"]


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file.

    Attributes:
      shape: shape of the tensor.
      dtype: element type.
      read: function that reads the values into a new C-contiguous array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def pread(path: str | os.PathLike, offset: int, size: int) -> bytearray:
    """Reads `size` bytes at `offset`; raises UserError if the file is too short.

    The file is not memory-mapped, since mapped pages count as resident memory of the process and
    would grow to the size of the file.
    """
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise UserError(
                    f"{path}: ends {size - done} bytes early; copy or download the file again"
                )
            done += count
    return buffer
