"""The random Hadamard transform over runs of 16, which spreads outliers (paper 2.2)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.nvfp4.format import rounded

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""The signs of the published recipe."""
RUN = len(SIGNS)

_SYLVESTER = np.array(
    [[(-1) ** (i & j).bit_count() for j in range(RUN)] for i in range(RUN)], np.float32
)


def matrix(signs: Sequence[int] | Array = SIGNS) -> Float[Array, "16 16"]:
    """diag(signs) times the Hadamard matrix of Sylvester over 4, float32: orthogonal, entries
    +-1/4, exact in bfloat16. Random signs are +-1 drawn by the caller."""
    return jnp.asarray(signs, jnp.float32)[:, None] * (_SYLVESTER / 4)


def rotate(
    x: Float[Array, "*rows k"], signs: Sequence[int] | Array = SIGNS
) -> BFloat16[Array, "*rows k"]:
    """Every run of 16 along the last axis times `matrix(signs)`, rounded to bfloat16.

    The same rotation of both operands' contraction axis leaves their product as it is. Raises
    ValueError if the axis is no multiple of 16.
    """
    if x.shape[-1] % RUN:
        raise ValueError(f"an axis of {x.shape[-1]} has no whole runs of {RUN}; pad it with zeros")
    kind = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32  # all products are exact
    runs = x.astype(kind).reshape(*x.shape[:-1], -1, RUN)
    turned = jnp.matmul(
        runs,
        matrix(signs).astype(kind),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return rounded(turned, jnp.bfloat16).reshape(x.shape)
