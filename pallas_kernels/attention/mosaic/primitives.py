"""Constants, tile layouts and broadcasts that the kernels of both chips use.

The softmax is computed in base 2.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.columns import MaskColumns

LOG2_E = math.log2(math.e)
MASKED = -1e30
"""Logit of masked pairs; `-MASKED` is the log-sum-exp of fully masked queries."""
_TRANSFORMS: Any = plgpu  # its classes look abstract to a type checker
SWIZZLED = (_TRANSFORMS.TilingTransform((8, 64)), _TRANSFORMS.SwizzleTransform(128))
"""Shared-memory layout of 16-bit tiles."""


def swizzled(columns: int, bits: int) -> tuple[Any, ...]:
    """Shared-memory layout of tiles whose rows of `columns` values take at most 128 bytes."""
    swizzle = _TRANSFORMS.SwizzleTransform(columns * bits // 8)
    return _TRANSFORMS.TilingTransform((8, columns)), swizzle


@dataclasses.dataclass(frozen=True)
class BackwardInputs:
    """Inputs of both backward kernels, padded to whole tiles.

    Attributes:
      q: queries.
      k: keys.
      v: values.
      grad: gradient of the output.
      lse: base-2 log-sum-exp of the forward pass.
      delta: row sums of gradient times output.
      columns: mask columns.
    """

    q: Float[Array, "b q n d"]
    k: Float[Array, "b k n d"]
    v: Float[Array, "b k n d"]
    grad: Float[Array, "b q n d"]
    lse: Float[Array, "b n q"]
    delta: Float[Array, "b n q"]
    columns: MaskColumns


def broadcast_batch(x: Array, batch: int) -> Array:
    """Broadcasts `x` of one sample, or of all samples, to `batch` samples."""
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


def per_column(x, shape):
    """Broadcasts one value per column to all rows."""
    return lax.broadcast_in_dim(x, shape, [1])


def per_row(x, shape):
    """Broadcasts one value per row to all columns."""
    return lax.broadcast_in_dim(x, shape, [0])
