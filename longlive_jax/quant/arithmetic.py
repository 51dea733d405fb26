"""Two arithmetics for NVFP4: packed, and simulated in bfloat16.

`PackedArithmetic` multiplies packed 4-bit operands; it is for chips with block-scaled tensor cores
and for the reference. `SimulatedArithmetic` is for all other devices: it multiplies the same values
in bfloat16, which represents them exactly. Both give the same results up to the order of sums.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from longlive_jax.typing import Array, Float, Float32
from pallas_kernels.dispatch import Implementation, capability
from pallas_kernels.nvfp4 import (
    BLOCK,
    NVFP4,
    Rule,
    StochasticRounding,
    dequantize,
    linear_implementation,
    matmul,
    quantize,
    quantize_both,
    statistics,
    with_scale_layout,
)
from pallas_kernels.nvfp4.hadamard import rotate_rows
from pallas_kernels.nvfp4.simulated import SimulatedNVFP4, contract, from_packed, simulate

__all__ = [
    "Arithmetic",
    "PackedPair",
    "Rounding",
    "Statistics",
    "arithmetic",
    "is_simulated",
    "transpose_tiles",
]

type Operand = Any
"""A quantized operand, as returned by `Arithmetic.quantize`; a pytree."""


class Statistics(NamedTuple):
    """What quantizing a matrix x [m, k] and its transpose needs.

    Attributes:
      amax: max |x|.
      amax_columns: that of x with groups of 16 rows rotated by the Hadamard transform, if they are.
      sums: sums of x over rows, float32, or None.
    """

    amax: Float32[Array, ""]
    amax_columns: Float32[Array, ""]
    sums: Float32[Array, "k"] | None


class Rounding(NamedTuple):
    """How a matrix is quantized.

    Attributes:
      rule: scale rule.
      keys: PRNG keys of stochastic rounding for blocks along k and along m, or (None, None).
      stochastic: kind of stochastic rounding.
    """

    rule: Rule
    keys: tuple[Array | None, Array | None] = (None, None)
    stochastic: StochasticRounding = "unbiased"


class Arithmetic(Protocol):
    """Quantizes matrices, and multiplies them with each other and with a packed W^T [o, i]."""

    def statistics(self, x: Float[Array, "m k"], *, rotated: bool, sums: bool) -> Statistics:
        """The statistics of x, m a multiple of 16."""

    def quantize(
        self, x: Float[Array, "m k"], seen: Statistics, how: Rounding, *, rotated: bool
    ) -> tuple[Operand, Operand]:
        """Quantizes x in blocks along k, and in blocks along m, after the Hadamard transform if
        `rotated`."""

    def quantize_rows(self, x: Float[Array, "m k"], amax: Array, how: Rounding) -> Operand:
        """Quantizes x in blocks along k only, with the first of the two keys."""

    def values(self, a: Operand) -> Array:
        """The values of the first result of `quantize`, bfloat16 [m, k]."""

    def forward(
        self,
        x: Operand,
        packed: "PackedPair",
        bias: Array,
        dtype: Any,
        low_rank: tuple[Array, Array] | None = None,
    ) -> Array:
        """x @ W + bias [m, o], rounded once to `dtype`.

        `low_rank` is a pair [m, r], [r, o] whose product in bfloat16 is added before the rounding.
        """

    def backward(self, grad: Operand, packed: "PackedPair", dtype: Any) -> Array:
        """grad @ W^T [m, i], rounded once to `dtype`."""

    def outer(self, x: Operand, grad: Operand) -> Float32[Array, "i o"]:
        """x^T @ grad, for two second results of `quantize`."""


def arithmetic(implementation: Implementation, *, trains: bool = True) -> Arithmetic:
    """The arithmetic of an implementation on the current default device.

    Without `trains` it is for frozen matrices: it quantizes in one direction only.
    """
    if is_simulated(implementation, trains=trains):
        return SimulatedArithmetic()
    return PackedArithmetic(linear_implementation(implementation, trains=trains))


def is_simulated(implementation: Implementation, *, trains: bool = True) -> bool:
    """Whether NVFP4 values are multiplied in bfloat16 on the current default device."""
    chosen = linear_implementation(implementation, trains=trains)
    return chosen == "xla" and not capability().startswith("10.")


@dataclasses.dataclass(frozen=True)
class PackedArithmetic:
    """4-bit arrays throughout.

    Attributes:
      implementation: implementation of statistics, quantize, dequantize and matmul.
    """

    implementation: Implementation = "auto"

    def statistics(self, x, *, rotated, sums):
        how: Any = {"hadamard": rotated, "sums": sums, "implementation": self.implementation}
        return Statistics(*statistics(x, **how))

    def quantize(self, x, seen, how, *, rotated):
        return quantize_both(
            x,
            seen.amax,
            seen.amax_columns,
            rule=how.rule,
            keys=how.keys,
            stochastic=how.stochastic,
            hadamard=rotated,
            implementation=self.implementation,
        )

    def quantize_rows(self, x, amax, how):
        return quantize(
            x,
            rule=how.rule,
            amax=amax,
            key=how.keys[0],
            stochastic=how.stochastic,
            scale_layout="tiles" if self.implementation == "mosaic" else "rows",
            implementation=self.implementation,
        )

    def values(self, a):
        return dequantize(a, jnp.bfloat16, implementation=self.implementation)

    def forward(self, x, packed, bias, dtype, low_rank=None):
        return matmul(
            x,
            packed.weight,
            bias=bias,
            low_rank=low_rank,
            out_dtype=dtype,
            implementation=self.implementation,
        )

    def backward(self, grad, packed, dtype):
        transposed = packed.transposed
        if transposed is None:
            transposed = transpose_tiles(packed.weight)
        return matmul(grad, transposed, out_dtype=dtype, implementation=self.implementation)

    def outer(self, x, grad):
        return matmul(x, grad, out_dtype=jnp.float32, implementation=self.implementation)


@dataclasses.dataclass(frozen=True)
class SimulatedArithmetic:
    """NVFP4 values in bfloat16, in the layout of the operands; only W is packed and transposed."""

    def statistics(self, x, *, rotated, sums):
        return Statistics(*statistics(x, hadamard=rotated, sums=sums, implementation="xla"))

    def quantize(self, x, seen, how, *, rotated):
        settings = {"rule": how.rule, "stochastic": how.stochastic}
        columns = rotate_rows(x) if rotated else x
        along = simulate(x, amax=seen.amax, key=how.keys[0], **settings)
        return along, simulate(columns, amax=seen.amax_columns, key=how.keys[1], axis=0, **settings)

    def quantize_rows(self, x, amax, how):
        return simulate(x, rule=how.rule, amax=amax, key=how.keys[0], stochastic=how.stochastic)

    def values(self, a: SimulatedNVFP4):
        return a.values.astype(jnp.bfloat16)

    def forward(self, x, packed, bias, dtype, low_rank=None):
        sums = contract(x, from_packed(packed.weight), (1, 1))
        if low_rank is not None:
            down, up = (part.astype(jnp.bfloat16) for part in low_rank)
            sums += jnp.matmul(down, up, preferred_element_type=jnp.float32)
        return (sums + bias.astype(jnp.float32)).astype(dtype)

    def backward(self, grad, packed, dtype):
        return contract(grad, from_packed(packed.weight), (1, 0)).astype(dtype)

    def outer(self, x, grad):
        return contract(x, grad, (0, 0))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "transposed"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class PackedPair:
    """A packed W^T [*layers, o, i] in tiles of 16 x 16, and its transpose where products read it.

    Attributes:
      weight: the packed matrix.
      transposed: `transpose_tiles(weight)`, computed once an update; None where products transpose
        values (simulated) or do not keep it.
    """

    weight: NVFP4
    transposed: NVFP4 | None = None


def transpose_tiles(a: NVFP4) -> NVFP4:
    """Transposes the last two axes of a matrix in tiles of 16 x 16, exactly."""
    scales = jnp.swapaxes(a.row_scales[..., ::BLOCK, :], -1, -2)
    scales = jnp.repeat(scales, BLOCK, axis=-2)
    rows = dataclasses.replace(
        a, codes=jnp.swapaxes(a.codes, -1, -2), scales=scales, scale_layout="rows"
    )
    return with_scale_layout(rows, a.scale_layout)
