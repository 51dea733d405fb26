"""Products of two NVFP4 matrices without a custom kernel."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from pallas_kernels.dispatch import capability
from pallas_kernels.nvfp4.format import BLOCK, NVFP4, dequantize_reference, global_scale

LowRankFactors = tuple[Float[Array, "m r"], Float[Array, "r n"]]


def reference(
    a: NVFP4,
    b: NVFP4,
    *,
    bias: Float[Array, "n"] | None = None,
    low_rank: LowRankFactors | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> Float[Array, "m n"]:
    """Computes `api.matmul` from operands dequantized to float32."""
    x, y = (dequantize_reference(c, jnp.float32) for c in (a, b))
    product = jnp.matmul(x, y.T, precision=lax.Precision.HIGHEST)
    return _finish(product, bias, low_rank, out_dtype)


def xla(
    a: NVFP4,
    b: NVFP4,
    *,
    bias: Float[Array, "n"] | None = None,
    low_rank: LowRankFactors | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> Float[Array, "m n"]:
    """Computes `api.matmul` with XLA's block-scaled product on Blackwell (capability 10.x).

    Elsewhere it multiplies code times scale, which bfloat16 represents exactly, in bfloat16.
    """
    if capability().startswith("10."):
        product = block_scaled(a, b)
    else:
        product = lax.dot_general(
            _unscaled(a), _unscaled(b), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
    return _finish(product * (global_scale(a) * global_scale(b)), bias, low_rank, out_dtype)


def block_scaled(a: NVFP4, b: NVFP4) -> Float32[Array, "m n"]:
    """The product of codes times scales, which XLA passes to cuBLAS."""
    x, y, x_scales, y_scales = (c[None] for c in (a.codes, b.codes, a.row_scales, b.row_scales))
    product = jax.nn.scaled_matmul(x, y, x_scales, y_scales, preferred_element_type=jnp.float32)
    return product[0]


def _unscaled(a: NVFP4) -> Array:
    """Code times scale in bfloat16, exact: at most six significant bits."""
    codes = a.codes.astype(jnp.bfloat16).reshape(*a.shape[:-1], -1, BLOCK)
    return (codes * a.row_scales.astype(jnp.bfloat16)[..., None]).reshape(a.shape)


def _finish(
    product: Float32[Array, "m n"],
    bias: Array | None,
    low_rank: LowRankFactors | None,
    out_dtype: jnp.dtype,
) -> Float[Array, "m n"]:
    if low_rank is not None:
        x, y = (part.astype(jnp.bfloat16) for part in low_rank)
        product += jnp.matmul(x, y, preferred_element_type=jnp.float32)
    if bias is not None:
        product += bias.astype(jnp.float32)
    return product.astype(out_dtype)
