"""The two ways to compute with NVFP4: packed, or as the values it holds.

`Packed` is for chips with block-scaled tensor cores and for the oracle: four-bit arrays, products
of packed operands. `Simulated` is for all others: the same values in bfloat16, which holds them
exactly, through the bfloat16 product. Both give the same numbers but for the order of sums.
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
    which,
)
from pallas_kernels.nvfp4.reference import largest
from pallas_kernels.nvfp4.units import Units, contract, rotate_rows, simulate, units_of

__all__ = ["Arithmetic", "arithmetic", "turned"]

type Operand = Any
"""What an arithmetic's `quantize` gives, a pytree."""


class Arithmetic(Protocol):
    """Quantizes matrices and multiplies them with a packed W^T [o, i] and with each other."""

    def largest(self, x: Float[Array, "m k"], rotated: bool) -> Float32[Array, ""]:
        """max |x|; `rotated`: of its rows after the Hadamard transform."""

    def quantize(
        self, x: Float[Array, "m k"], rule: Rule, amax: Array, *, key: Array | None
    ) -> Operand:
        """In blocks along k."""

    def across(
        self, x: Float[Array, "m k"], rule: Rule, amax: Array, *, key: Array | None, rotated: bool
    ) -> Operand:
        """In blocks along m, `rotated` first."""

    def values(self, a: Operand) -> Array:
        """bfloat16 [m, k] of what `quantize` gave."""

    def forward(self, x: Operand, packed: NVFP4) -> Float32[Array, "m o"]:
        """x @ W."""

    def backward(self, grad: Operand, packed: NVFP4) -> Float32[Array, "m i"]:
        """grad @ W^T."""

    def outer(self, x: Operand, grad: Operand) -> Float32[Array, "i o"]:
        """x^T @ grad of two that `across` gave."""


def arithmetic(implementation: Implementation) -> Arithmetic:
    """How an implementation computes on the device of a function traced now."""
    chosen = which("matmul", implementation=implementation)
    blackwell = capability().startswith("10.")
    return Simulated() if chosen == "xla" and not blackwell else Packed(implementation)


@dataclasses.dataclass(frozen=True)
class Packed:
    """Four-bit arrays throughout; `turned` tiles instead of a second W."""

    implementation: Implementation = "auto"

    def largest(self, x, rotated):
        return largest(rotate(x.T) if rotated else x)

    def quantize(self, x, rule, amax, *, key):
        return quantize(x, rule=rule, amax=amax, key=key, implementation=self.implementation)

    def across(self, x, rule, amax, *, key, rotated):
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
        return self._times(grad, turned(packed))

    def outer(self, x, grad):
        return self._times(x, grad)

    def _times(self, a: NVFP4, b: NVFP4) -> Array:
        return matmul(a, b, out_dtype=jnp.float32, implementation=self.implementation)


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Values that NVFP4 holds, where the arrays lie: nothing is packed or transposed but W."""

    def largest(self, x, rotated):
        return largest(rotate_rows(x) if rotated else x)

    def quantize(self, x, rule, amax, *, key):
        return simulate(x, rule=rule, amax=amax, key=key)

    def across(self, x, rule, amax, *, key, rotated):
        seen = rotate_rows(x) if rotated else x
        return simulate(seen, rule=rule, amax=amax, key=key, axis=0)

    def values(self, a: Units):
        return a.values.astype(jnp.bfloat16)

    def forward(self, x, packed):
        return contract(x, units_of(packed), (1, 1))

    def backward(self, grad, packed):
        return contract(grad, units_of(packed), (1, 0))

    def outer(self, x, grad):
        return contract(x, grad, (0, 0))


def turned(a: NVFP4) -> NVFP4:
    """The transposed matrix, last two axes, of one in tiles of 16 x 16: the same numbers."""
    scales = jnp.swapaxes(a.scales[..., ::BLOCK, :], -1, -2)
    scales = jnp.repeat(scales, BLOCK, axis=-2)
    return dataclasses.replace(a, codes=jnp.swapaxes(a.codes, -1, -2), scales=scales)
