"""A tensor in a file: shape and type now, bytes when asked for."""

import dataclasses
import math
import os
from collections.abc import Callable

import numpy as np

from longlive_jax.spec import UserError

__all__ = ["LazyTensor", "pread"]


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype are known; `read()` returns a fresh C-contiguous array each time."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size of what `read` returns."""
        return math.prod(self.shape) * self.dtype.itemsize


def pread(path: str | os.PathLike, offset: int, size: int) -> bytearray:
    """`size` bytes at `offset`, or UserError when the file ends before.

    A plain read and no memory map: mapped pages would count as resident memory of the process
    until the whole file is in it.
    """
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                raise UserError(
                    f"{path}: ends {size - done} bytes early; copy or download it again"
                )
            done += count
    return buffer
