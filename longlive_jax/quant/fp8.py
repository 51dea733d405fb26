"""FP8 matrices for GPUs without FP4 units: E4M3 with one scale per matrix row and one per token.

The operands of the product are FP8, so XLA uses FP8 tensor cores, through cuBLASLt or its own
kernel, whichever is faster on the chip. Both scales multiply the sums afterwards. Casts saturate at
448, where a plain cast to float8_e4m3fn gives NaN.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from longlive_jax.quant.low_rank import LowRank
from longlive_jax.typing import Array, Float, Float32

__all__ = ["Fp8Kernel", "dequantize_rows", "matmul_rows", "pack_fp8", "quantize_rows"]

F8 = jnp.float8_e4m3fn
E4M3_MAX = 448.0


def quantize_rows(x: Float[Array, "*rows k"]) -> tuple[Array, Float32[Array, "*rows"]]:
    """E4M3 codes `[*rows, k]`, rounded to nearest even, and one scale per row: x ~ code * scale.

    A row of zeros has scale 0. NaN and infinity make the whole row NaN.
    """
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / E4M3_MAX
    unit = jnp.where(scale == 0, 1.0, scale)[..., None]
    return jnp.clip(x / unit, -E4M3_MAX, E4M3_MAX).astype(F8), scale


def dequantize_rows(codes: Array, scale: Float32[Array, "*rows"]) -> Float32[Array, "*rows k"]:
    """The values `code * scale`."""
    return codes.astype(jnp.float32) * scale[..., None]


def matmul_rows(
    x: Array,
    x_scale: Float32[Array, "m"],
    w: Array,
    w_scale: Float32[Array, "n"],
    *,
    out_dtype: DTypeLike = jnp.bfloat16,
) -> Float[Array, "m n"]:
    """`[m, k] x [n, k]` in FP8, accumulated in float32, times both scales.

    With `out_dtype` bfloat16 the sums are rounded to bfloat16 before they are scaled. A result of
    7040 x 3072 is then written and read at half the bytes, for one more rounding error of 1/512.
    """
    contract = (((1,), (1,)), ((), ()))
    sums = lax.dot_general(x, w, contract, preferred_element_type=jnp.dtype(out_dtype))
    scaled = sums.astype(jnp.float32) * x_scale[:, None] * w_scale[None]
    return scaled.astype(out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_product(
    quantize_gradient: bool, x: Float[Array, "m i"], codes: Array, scales: Float32[Array, "o"]
) -> Float[Array, "m o"]:
    """`x @ W` in the dtype of `x`, from quantized `x`."""
    return matmul_rows(*quantize_rows(x), codes, scales, out_dtype=x.dtype)


def _frozen_forward(quantize_gradient, x, codes, scales):
    return _frozen_product(quantize_gradient, x, codes, scales), (codes, scales)


def _frozen_backward(quantize_gradient, saved, grad):
    codes, scales = saved
    if not quantize_gradient:
        values = dequantize_rows(codes, scales).astype(grad.dtype)
        dx = jnp.matmul(grad, values, preferred_element_type=jnp.float32)
        return dx.astype(grad.dtype), None, None
    # The scales of W's rows are along this product's contraction, so they belong to dy.
    rows = quantize_rows(grad.astype(jnp.float32) * scales)
    ones = jnp.ones(codes.shape[1], jnp.float32)
    return matmul_rows(*rows, codes.T, ones, out_dtype=grad.dtype), None, None


_frozen_product.defvjp(_frozen_forward, _frozen_backward)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "branch"],
    meta_fields=["quantize_gradient"],
)
@dataclasses.dataclass(frozen=True)
class Fp8Kernel:
    """An FP8 kernel `[*layers, i, o]`, stored transposed.

    Attributes:
      codes: float8_e4m3fn `[*layers, o, i]`.
      scales: float32 `[*layers, o]`.
      branch: unmerged LoRA in high precision, or None.
      quantize_gradient: whether dx is an FP8 product too.
    """

    codes: Array
    scales: Float32[Array, "*layers o"]
    branch: LowRank | None = None
    quantize_gradient: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original kernel, `[*layers, i, o]`."""
        *layers, outputs, inputs = self.codes.shape
        return (*layers, inputs, outputs)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales on the device."""
        return self.codes.size + 4 * self.scales.size

    def product(self, x: Float[Array, "... i"], bias: Float[Array, "o"]) -> Float[Array, "... o"]:
        """`x @ kernel + bias` in the dtype of `x`; the scale of each token is computed here.

        The gradient is that of the dequantized matrix at unquantized activations: dx = dy W^T. With
        `quantize_gradient` dy, times the scales of W's rows, is rounded to E4M3 with one scale per
        token, to nearest; W is transposed where it is used. The matrix is frozen and has none.
        """
        rows = x.reshape(-1, x.shape[-1])
        y = _frozen_product(self.quantize_gradient, rows, self.codes, self.scales)
        if self.branch is not None:
            y = y + self.branch(rows)
        return (y + bias.astype(x.dtype)).reshape(*x.shape[:-1], -1)

    def dequantized(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*layers i o"]:
        """The kernel as an array, without its branch."""
        return jnp.swapaxes(dequantize_rows(self.codes, self.scales), -1, -2).astype(dtype)


def pack_fp8(kernel: Float[Array, "*layers i o"]) -> Fp8Kernel:
    """Quantizes a kernel to FP8, one layer after the other."""
    if kernel.ndim > 2:
        return lax.map(pack_fp8, kernel)
    return Fp8Kernel(*quantize_rows(kernel.T))
