"""Simulated NVFP4 without 4-bit codes, for devices that multiply in bfloat16.

`code * scale` has six significant bits, so bfloat16 represents it exactly. Products of such values,
accumulated in float32 and multiplied by both tensors' `amax / (M2 * M3)`, equal those of
block-scaled tensor cores. This avoids casts to float4 and float8, which CPUs emulate at up to 60 ns
per value, and transposed copies: blocks may run along either axis of the array.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32

from pallas_kernels.nvfp4.format import BLOCK, LIMITS, NVFP4, Rule, StochasticRounding, amax_divisor
from pallas_kernels.nvfp4.reference import MAX_SCALE, TINY, max_abs
from pallas_kernels.nvfp4.rounding import MAX_CODE, SLACK, next_scale, rounding_noise, seeds

__all__ = ["SimulatedNVFP4", "contract", "from_packed", "simulate"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SimulatedNVFP4:
    """A matrix with the values `scaled_codes * amax / (M2 * M3)`.

    Attributes:
      scaled_codes: code times scale, exact in bfloat16.
      amax: largest magnitude of the tensor.
      rule: rule that chose the scales.
    """

    scaled_codes: BFloat16[Array, "m k"]
    amax: Float32[Array, ""]
    rule: Rule = dataclasses.field(metadata={"static": True})

    @property
    def values(self) -> Float32[Array, "m k"]:
        """The dequantized values."""
        return self.scaled_codes.astype(jnp.float32) * _global_scale(self)


@functools.partial(jax.jit, static_argnames=("rule", "stochastic", "axis"))
def simulate(
    x: Float[Array, "m k"],
    *,
    rule: Rule = "mse",
    amax: Float32[Array, ""] | None = None,
    key: Array | None = None,
    stochastic: StochasticRounding = "unbiased",
    axis: int = 1,
) -> SimulatedNVFP4:
    """Simulates `quantize` of `x` with blocks along `axis`, without moving data.

    Axis 0 corresponds to quantizing `x.T`. The result equals `quantize`, except in blocks whose two
    candidate scales have equal errors up to the last bit of a sum.
    """
    amax = max_abs(x) if amax is None else amax
    m, k = x.shape
    t = x.astype(jnp.float32).reshape((m, k // BLOCK, BLOCK) if axis else (m // BLOCK, BLOCK, k))
    along = 2 if axis else 1
    noise = _noise(key, x.shape, axis)
    # 1. The scale of each block, from its peak.
    peak = jnp.max(jnp.abs(t), axis=along, keepdims=True)
    wanted, shrink, divisor = _wanted_scale(peak, amax, rule)

    def rounded(step: Array, chosen: Array | None) -> Array:
        u = jnp.where((step == 0) | (t == 0), 0.0, t * (1 / (shrink * step)))
        return to_code(u, chosen) * step

    # 2. Rules that search: take the scale with the smaller error in each block.
    noise = [None if d is None else d.reshape(t.shape) for d in noise]
    unbiased = key is not None and stochastic == "unbiased"
    round_scale = scale_above if unbiased else to_scale
    step, chosen = round_scale(wanted), noise[0]
    if rule not in ("static_6", "static_4"):
        larger = round_scale(1.5 * wanted)
        drawn = [None, None] if unbiased else noise
        errors = [
            _error(rounded(s, d) * amax / divisor - t, rule, along)
            for s, d in zip((step, larger), drawn, strict=True)
        ]
        four = errors[1] < errors[0]
        step = jnp.where(four, larger, step)
        if chosen is not None and drawn[1] is not None:
            chosen = jnp.where(four, drawn[1], chosen)
    return SimulatedNVFP4(rounded(step, chosen).astype(jnp.bfloat16).reshape(m, k), amax, rule)


def _wanted_scale(peak: Array, amax: Array, rule: Rule) -> tuple[Array, Array, Array]:
    """The unrounded scales of blocks, amax / (M2 * M3), and M2 * M3."""
    # The barrier prevents the compiler from multiplying with the inverse of a constant.
    divisor, six = lax.optimization_barrier(
        (jnp.float32(amax_divisor(rule)), jnp.float32(LIMITS[rule][0]))
    )
    grow = jnp.where(amax < TINY, 0.0, divisor / amax)
    wanted = jnp.where(peak < jnp.inf, peak / six * grow, jnp.nan)
    return wanted, 1 / lax.optimization_barrier(grow), divisor


def _noise(key: Array | None, shape: tuple[int, ...], axis: int) -> list[Array | None]:
    """The rounding noise of `quantize` in the layout of x; None without a key."""
    if key is None:
        return [None, None]
    noise = rounding_noise(seeds(key), shape if axis else shape[::-1])
    return [d if axis else d.T for d in noise]


def _error(off: Array, rule: Rule, axis: int) -> Array:
    if rule == "abs_max":
        return jnp.max(jnp.abs(off), axis=axis, keepdims=True)
    errors = off * off if rule == "mse" else jnp.abs(off)
    # The order of `reference.sum_in_pytorch_order`: add the halves of a block, then one by one.
    lower, upper = (lax.slice_in_dim(errors, i, i + 8, axis=axis) for i in (0, 8))
    pairs = lower + upper
    parts = [lax.slice_in_dim(pairs, i, i + 1, axis=axis) for i in range(8)]
    return functools.reduce(operator.add, parts)


def to_code(u: Float32[Array, "*n"], noise: Array | None) -> Float32[Array, "*n"]:
    """Computes `rounding.to_nearest` (noise None) or `rounding.stochastic_round`."""
    size = jnp.abs(u)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    inverse = jnp.where(size < 2, 2.0, jnp.where(size < 4, 1.0, 0.5))
    steps = size * inverse if noise is None else size * inverse + (noise - 0.5)
    rounded = jnp.minimum(jnp.round(steps) * step, MAX_CODE)
    return jnp.where(u < 0, -rounded, rounded)


def to_scale(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Rounds nonnegative values to the nearest E4M3 value, saturating at 448; NaN stays NaN."""
    x = jnp.minimum(x, MAX_SCALE)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> 20) & 1
    normal = lax.bitcast_convert_type(
        (bits + jnp.uint32(0x7FFFF) + odd) & jnp.uint32(0xFFF00000), jnp.float32
    )
    return jnp.where(
        x < 2.0**-6, jnp.round(x * 512) / 512, jnp.where(x <= MAX_SCALE, normal, jnp.nan)
    )


def scale_above(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Computes `rounding.scale_above`."""
    nearest = to_scale(x)
    return jnp.where(nearest < jnp.minimum(x, MAX_SCALE) * SLACK, next_scale(nearest), nearest)


def from_packed(a: NVFP4) -> SimulatedNVFP4:
    """The simulated form of a packed matrix."""
    codes = a.codes.astype(jnp.bfloat16).reshape(*a.shape[:-1], -1, BLOCK)
    scaled_codes = codes * a.row_scales.astype(jnp.bfloat16)[..., None]
    return SimulatedNVFP4(scaled_codes.reshape(a.shape), a.amax, a.rule)


def contract(a: SimulatedNVFP4, b: SimulatedNVFP4, axes: tuple[int, int]) -> Float32[Array, "m n"]:
    """Contracts axis `axes[0]` of `a` with axis `axes[1]` of `b`, accumulating in float32."""
    dims = ((axes[:1], axes[1:]), ((), ()))
    sums = lax.dot_general(a.scaled_codes, b.scaled_codes, dims, preferred_element_type=jnp.float32)
    return sums * (_global_scale(a) * _global_scale(b))


def _global_scale(a: SimulatedNVFP4) -> Float32[Array, ""]:
    """The per-tensor scale, by a division as in `format.global_scale`."""
    return a.amax / lax.optimization_barrier(jnp.float32(amax_divisor(a.rule)))
