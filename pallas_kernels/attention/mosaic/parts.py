"""What the kernels of both chips share: the softmax in powers of two, tiles, saved arrays."""

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
"""Logits of pairs that are not visible; minus it, the log-sum-exp of a query that sees nothing."""
_TRANSFORMS: Any = plgpu  # its classes look abstract to a type checker
SWIZZLED = (_TRANSFORMS.TilingTransform((8, 64)), _TRANSFORMS.SwizzleTransform(128))
"""How 16-bit tiles lie in shared memory."""


def swizzled(columns: int, bits: int) -> tuple[Any, ...]:
    """The same for tiles of whole rows, at most 128 bytes long."""
    swizzle = _TRANSFORMS.SwizzleTransform(columns * bits // 8)
    return _TRANSFORMS.TilingTransform((8, columns)), swizzle


@dataclasses.dataclass(frozen=True)
class Saved:
    """What both backward kernels read: the forward's arguments, its log-sum-exp, the gradient of
    its output, and the row sums of gradient times output, all padded to whole tiles."""

    q: Float[Array, "b q n d"]
    k: Float[Array, "b k n d"]
    v: Float[Array, "b k n d"]
    grad: Float[Array, "b q n d"]
    lse: Float[Array, "b n q"]
    delta: Float[Array, "b n q"]
    columns: MaskColumns


def whole(x: Array, batch: int) -> Array:
    """`x` of one sample or of all, as that of all."""
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


def tall(x, shape):
    """Numbers of columns, repeated for every row."""
    return lax.broadcast_in_dim(x, shape, [1])


def wide(x, shape):
    """Numbers of rows, repeated for every column."""
    return lax.broadcast_in_dim(x, shape, [0])
