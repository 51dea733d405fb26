"""Invertible changes of axes between PyTorch's weight layouts and ours."""

import dataclasses
from collections.abc import Callable

import numpy as np

from longlive_jax.io.arrays import Shape

__all__ = ["TRANSFORMS", "Transform", "transformed_shape"]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A change of axes and its inverse; both return views where NumPy can.

    Attributes:
      forward: function from the PyTorch tensor to our layout.
      inverse: function from our layout to the PyTorch tensor.
      rank: number of axes of the PyTorch tensor, or None if any.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    rank: int | None = None


def _permute(*axes: int) -> Transform:
    inverse = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda x: x.transpose(axes), lambda x: x.transpose(inverse), len(axes))


def _squeeze(*unit_axes: int, transpose: bool = False) -> Transform:
    """Drops the given axes, which must have length 1, then optionally swaps the other two."""

    def forward(x: np.ndarray) -> np.ndarray:
        x = np.squeeze(x, axis=unit_axes)
        return x.T if transpose else x

    def inverse(x: np.ndarray) -> np.ndarray:
        return np.expand_dims(x.T if transpose else x, unit_axes)

    rank = len(unit_axes) + (2 if transpose else 1)
    return Transform(forward, inverse, rank)


def _patch_to_linear(x: np.ndarray) -> np.ndarray:
    """Conv3d weight [e, c, 1, 2, 2] -> [(ph pw c), e]."""
    e, c, frames, rows, columns = x.shape
    if (frames, rows, columns) != (1, 2, 2):
        raise ValueError(f"patch size must be (1, 2, 2), got {(frames, rows, columns)}")
    return x.transpose(2, 3, 4, 1, 0).reshape(4 * c, e)


def _linear_to_patch(x: np.ndarray) -> np.ndarray:
    """The inverse of `_patch_to_linear`."""
    return x.reshape(1, 2, 2, x.shape[0] // 4, x.shape[1]).transpose(4, 3, 0, 1, 2)


def _conv3d_to_time(x: np.ndarray) -> np.ndarray:
    """Conv3d weight [o, i, t, 1, 1] -> [t, i, o]."""
    return np.squeeze(x, axis=(3, 4)).transpose(2, 1, 0)


def _time_to_conv3d(x: np.ndarray) -> np.ndarray:
    """The inverse of `_conv3d_to_time`."""
    return x.transpose(2, 1, 0)[..., None, None]


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(lambda x: x, lambda x: x),
    "linear": _permute(1, 0),  # [out, in] -> [in, out]
    "conv2d": _permute(2, 3, 1, 0),  # OIHW -> HWIO
    "conv3d": _permute(2, 3, 4, 1, 0),  # OIDHW -> DHWIO
    "pointwise2d": _squeeze(2, 3, transpose=True),  # [out, in, 1, 1] -> [in, out]
    "pointwise3d": _squeeze(2, 3, 4, transpose=True),  # [out, in, 1, 1, 1] -> [in, out]
    # [out, in, t, 1, 1] -> [t, in, out]
    "time_conv": Transform(_conv3d_to_time, _time_to_conv3d, 5),
    # [e, c, 1, 2, 2] -> [(ph pw c), e]
    "patch_embedding": Transform(_patch_to_linear, _linear_to_patch, 5),
    "gamma2d": _squeeze(1, 2),  # [c, 1, 1] -> [c]
    "gamma3d": _squeeze(1, 2, 3),  # [c, 1, 1, 1] -> [c]
    # [1, n, e] -> [n, e]
    "drop_first": Transform(lambda x: np.squeeze(x, axis=0), lambda x: x[None], 3),
}


def transformed_shape(transform: str, shape: Shape) -> Shape:
    """The shape of a PyTorch tensor after a named transform, computed without data.

    Raises ValueError if the transform does not apply to tensors of this shape.
    """
    change = TRANSFORMS[transform]
    if change.rank is not None and len(shape) != change.rank:
        raise ValueError(f"must have {change.rank} axes, got {len(shape)}")
    if transform == "patch_embedding":
        if tuple(shape[2:]) != (1, 2, 2):
            raise ValueError(f"patch size must be (1, 2, 2), got {tuple(shape[2:])}")
        return (4 * shape[1], shape[0])
    return change.forward(np.broadcast_to(np.zeros((), np.uint8), shape)).shape
