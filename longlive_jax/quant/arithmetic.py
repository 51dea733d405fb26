"""Two arithmetics for NVFP4: packed, and simulated in bfloat16.

`PackedArithmetic` multiplies packed 4-bit operands; it is for chips with block-scaled tensor cores
and for the reference. `SimulatedArithmetic` is for all other devices: it multiplies the same values
in bfloat16, which represents them exactly. Both give the same results up to the order of sums.
"""

import dataclasses
from typing import Any, Protocol

import jax.numpy as jnp

from longlive_jax.typing import Array, Float, Float32
from pallas_kernels.dispatch import Implementation, capability
from pallas_kernels.nvfp4 import (
    BLOCK,
    NVFP4,
    Rule,
    dequantize,
    matmul,
    quantize,
    rotate,
    select_implementation,
)
from pallas_kernels.nvfp4.reference import max_abs
from pallas_kernels.nvfp4.simulated import (
    SimulatedNVFP4,
    contract,
    from_packed,
    rotate_rows,
    simulate,
)

__all__ = ["Arithmetic", "arithmetic", "transpose_tiles"]

type Operand = Any
"""A quantized operand, as returned by `Arithmetic.quantize`; a pytree."""


class Arithmetic(Protocol):
    """Quantizes matrices, and multiplies them with each other and with a packed W^T [o, i]."""

    def max_abs(self, x: Float[Array, "m k"], rotated: bool) -> Float32[Array, ""]:
        """max |x|; of x with its columns rotated by the Hadamard transform if `rotated`."""

    def quantize(
        self, x: Float[Array, "m k"], rule: Rule, amax: Array, *, key: Array | None
    ) -> Operand:
        """Quantizes x in blocks along k."""

    def quantize_columns(
        self, x: Float[Array, "m k"], rule: Rule, amax: Array, *, key: Array | None, rotated: bool
    ) -> Operand:
        """Quantizes x in blocks along m, after the Hadamard transform if `rotated`."""

    def values(self, a: Operand) -> Array:
        """The values of a result of `quantize`, bfloat16 [m, k]."""

    def forward(self, x: Operand, packed: NVFP4) -> Float32[Array, "m o"]:
        """x @ W."""

    def backward(self, grad: Operand, packed: NVFP4) -> Float32[Array, "m i"]:
        """grad @ W^T."""

    def outer(self, x: Operand, grad: Operand) -> Float32[Array, "i o"]:
        """x^T @ grad, for two results of `quantize_columns`."""


def arithmetic(implementation: Implementation) -> Arithmetic:
    """The arithmetic of an implementation on the current default device."""
    chosen = select_implementation("matmul", implementation=implementation)
    blackwell = capability().startswith("10.")
    return (
        SimulatedArithmetic()
        if chosen == "xla" and not blackwell
        else PackedArithmetic(implementation)
    )


@dataclasses.dataclass(frozen=True)
class PackedArithmetic:
    """4-bit arrays throughout; W is transposed by `transpose_tiles` rather than packed twice.

    Attributes:
      implementation: implementation of quantize, dequantize and matmul.
    """

    implementation: Implementation = "auto"

    def max_abs(self, x, rotated):
        return max_abs(rotate(x.T) if rotated else x)

    def quantize(self, x, rule, amax, *, key):
        return quantize(x, rule=rule, amax=amax, key=key, implementation=self.implementation)

    def quantize_columns(self, x, rule, amax, *, key, rotated):
        return quantize(
            x,
            rule=rule,
            amax=amax,
            key=key,
            transpose=True,
            hadamard=rotated,
            implementation=self.implementation,
        )

    def values(self, a):
        return dequantize(a, jnp.bfloat16, implementation=self.implementation)

    def forward(self, x, packed):
        return self._times(x, packed)

    def backward(self, grad, packed):
        return self._times(grad, transpose_tiles(packed))

    def outer(self, x, grad):
        return self._times(x, grad)

    def _times(self, a: NVFP4, b: NVFP4) -> Array:
        return matmul(a, b, out_dtype=jnp.float32, implementation=self.implementation)


@dataclasses.dataclass(frozen=True)
class SimulatedArithmetic:
    """NVFP4 values in bfloat16, in the layout of the operands; only W is packed and transposed."""

    def max_abs(self, x, rotated):
        return max_abs(rotate_rows(x) if rotated else x)

    def quantize(self, x, rule, amax, *, key):
        return simulate(x, rule=rule, amax=amax, key=key)

    def quantize_columns(self, x, rule, amax, *, key, rotated):
        operand = rotate_rows(x) if rotated else x
        return simulate(operand, rule=rule, amax=amax, key=key, axis=0)

    def values(self, a: SimulatedNVFP4):
        return a.values.astype(jnp.bfloat16)

    def forward(self, x, packed):
        return contract(x, from_packed(packed), (1, 1))

    def backward(self, grad, packed):
        return contract(grad, from_packed(packed), (1, 0))

    def outer(self, x, grad):
        return contract(x, grad, (0, 0))


def transpose_tiles(a: NVFP4) -> NVFP4:
    """Transposes the last two axes of a matrix in tiles of 16 x 16, exactly."""
    scales = jnp.swapaxes(a.scales[..., ::BLOCK, :], -1, -2)
    scales = jnp.repeat(scales, BLOCK, axis=-2)
    return dataclasses.replace(a, codes=jnp.swapaxes(a.codes, -1, -2), scales=scales)
