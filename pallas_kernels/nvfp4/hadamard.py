"""The random Hadamard transform over groups of 16, which spreads outliers (paper, section 2.2)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.nvfp4.format import round_to

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Signs of the published recipe."""
GROUP_SIZE = len(SIGNS)

_SYLVESTER = np.array(
    [[(-1) ** (i & j).bit_count() for j in range(GROUP_SIZE)] for i in range(GROUP_SIZE)],
    np.float32,
)


def matrix(signs: Sequence[int] | Array = SIGNS) -> Float[Array, "16 16"]:
    """diag(signs) times Sylvester's Hadamard matrix over 4, in float32.

    It is orthogonal with entries +-1/4, exact in bfloat16. The caller draws random signs (+-1).
    """
    return jnp.asarray(signs, jnp.float32)[:, None] * (_SYLVESTER / 4)


def rotate(
    x: Float[Array, "*rows k"], signs: Sequence[int] | Array = SIGNS
) -> BFloat16[Array, "*rows k"]:
    """Multiplies every group of 16 along the last axis by `matrix(signs)`, rounded to bfloat16.

    Rotating the contraction axis of both operands leaves their product unchanged. Raises ValueError
    if the axis is not a multiple of 16.
    """
    if x.shape[-1] % GROUP_SIZE:
        raise ValueError(
            f"the axis must be a multiple of {GROUP_SIZE}, got {x.shape[-1]}; pad it with zeros"
        )
    kind = jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32  # products are exact
    groups = x.astype(kind).reshape(*x.shape[:-1], -1, GROUP_SIZE)
    rotated = jnp.matmul(
        groups,
        matrix(signs).astype(kind),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return round_to(rotated, jnp.bfloat16).reshape(x.shape)


def rotate_rows(x: Float[Array, "m k"]) -> BFloat16[Array, "m k"]:
    """`rotate(x.T).T` without transposing: rotates groups of 16 rows."""
    groups = x.astype(jnp.float32).reshape(-1, GROUP_SIZE, x.shape[1])
    rotated = jnp.einsum("gtk,ts->gsk", groups, matrix(), precision=lax.Precision.HIGHEST)
    return rotated.astype(jnp.bfloat16).reshape(x.shape)
