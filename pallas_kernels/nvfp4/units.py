"""What NVFP4 holds, without the four-bit codes: for machines that multiply in bfloat16.

`code * scale` has six significant bits, so a bfloat16 holds it as it is, and products of such
values that add up in float32 and are then multiplied by both tensors' `amax / (M2 * M3)` are what
block-scaled tensor cores compute. Casts to float4 and float8, which CPUs emulate at up to 60 ns a
number, and transposed copies fall away: blocks may go along either axis of the array as it lies.
"""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float32

from pallas_kernels.nvfp4.format import BLOCK, LIMITS, NVFP4, Rule, constant
from pallas_kernels.nvfp4.hadamard import matrix
from pallas_kernels.nvfp4.reference import MOST, TINY, largest
from pallas_kernels.nvfp4.rounding import LARGEST, draws, seeds

__all__ = ["Units", "contract", "rotate_rows", "simulate", "units_of"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Units:
    """`units * amax / (M2 * M3)`, an array of two axes as it lies."""

    units: BFloat16[Array, "m k"]
    amax: Float32[Array, ""]
    rule: Rule = dataclasses.field(metadata={"static": True})

    @property
    def values(self) -> Float32[Array, "m k"]:
        """What they stand for."""
        return self.units.astype(jnp.float32) * _unit(self)


@functools.partial(jax.jit, static_argnames=("rule", "axis"))
def simulate(
    x: Float[Array, "m k"],
    *,
    rule: Rule = "mse",
    amax: Float32[Array, ""] | None = None,
    key: Array | None = None,
    axis: int = 1,
) -> Units:
    """What `quantize` holds of `x` (of `x.T` for axis 0) in blocks along `axis`, where `x` lies.

    Equal but for blocks of a rule with two candidates that err alike to the last bit of a sum.
    """
    amax = largest(x) if amax is None else amax
    m, k = x.shape
    t = x.astype(jnp.float32).reshape((m, k // BLOCK, BLOCK) if axis else (m // BLOCK, BLOCK, k))
    along = 2 if axis else 1
    by = _draws(key, x.shape, axis)
    peak = jnp.max(jnp.abs(t), axis=along, keepdims=True)
    # Hidden from the compiler, which would multiply with the inverse of a constant.
    whole, six = lax.optimization_barrier(
        (jnp.float32(constant(rule)), jnp.float32(LIMITS[rule][0]))
    )
    grow = jnp.where(amax < TINY, 0.0, whole / amax)
    wanted = jnp.where(peak < jnp.inf, peak / six * grow, jnp.nan)
    shrink = 1 / lax.optimization_barrier(grow)

    def rounded(step: Array, draw: Array | None) -> Array:
        u = jnp.where((step == 0) | (t == 0), 0.0, t * (1 / (shrink * step)))
        return to_code(u, draw) * step

    by = [None if d is None else d.reshape(t.shape) for d in by]
    step, draw = to_scale(wanted), by[0]
    if rule not in ("static_6", "static_4"):
        larger = to_scale(1.5 * wanted)
        errors = [
            _error(rounded(s, d) * amax / whole - t, rule, along)
            for s, d in ((step, by[0]), (larger, by[1]))
        ]
        four = errors[1] < errors[0]
        step = jnp.where(four, larger, step)
        draw = None if draw is None or by[1] is None else jnp.where(four, by[1], draw)
    return Units(rounded(step, draw).astype(jnp.bfloat16).reshape(m, k), amax, rule)


def _draws(key: Array | None, shape: tuple[int, ...], axis: int) -> list[Array | None]:
    """Those of the array as `quantize` has it, where ours lies; None without a key."""
    if key is None:
        return [None, None]
    found = draws(seeds(key), shape if axis else shape[::-1])
    return [d if axis else d.T for d in found]


def _error(off: Array, rule: Rule, axis: int) -> Array:
    if rule == "abs_max":
        return jnp.max(jnp.abs(off), axis=axis, keepdims=True)
    errors = off * off if rule == "mse" else jnp.abs(off)
    # As `reference.feed_in_order` adds up: the halves of a block, and then one by one.
    lower, upper = (lax.slice_in_dim(errors, i, i + 8, axis=axis) for i in (0, 8))
    pairs = lower + upper
    parts = [lax.slice_in_dim(pairs, i, i + 1, axis=axis) for i in range(8)]
    return functools.reduce(operator.add, parts)


def to_code(u: Float32[Array, "*n"], draw: Array | None) -> Float32[Array, "*n"]:
    """The values of `rounding.to_nearest` or `by_chance`, by arithmetic."""
    size = jnp.abs(u)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    over = jnp.where(size < 2, 2.0, jnp.where(size < 4, 1.0, 0.5))
    steps = size * over if draw is None else size * over + (draw - 0.5)
    rounded = jnp.minimum(jnp.round(steps) * step, LARGEST)
    return jnp.where(u < 0, -rounded, rounded)


def to_scale(x: Float32[Array, "*n"]) -> Float32[Array, "*n"]:
    """Not negative, to the nearest value of E4M3, at most 448; NaN stays."""
    x = jnp.minimum(x, MOST)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    odd = (bits >> 20) & 1
    normal = lax.bitcast_convert_type(
        (bits + jnp.uint32(0x7FFFF) + odd) & jnp.uint32(0xFFF00000), jnp.float32
    )
    return jnp.where(x < 2.0**-6, jnp.round(x * 512) / 512, jnp.where(x <= MOST, normal, jnp.nan))


def rotate_rows(x: Float[Array, "m k"]) -> BFloat16[Array, "m k"]:
    """`hadamard.rotate(x.T).T`: runs of 16 rows, where they lie."""
    runs = x.astype(jnp.float32).reshape(-1, BLOCK, x.shape[1])
    turned = jnp.einsum("gtk,ts->gsk", runs, matrix(), precision=lax.Precision.HIGHEST)
    return turned.astype(jnp.bfloat16).reshape(x.shape)


def units_of(a: NVFP4) -> Units:
    """The same of a packed matrix."""
    codes = a.codes.astype(jnp.bfloat16).reshape(*a.shape[:-1], -1, BLOCK)
    units = codes * a.scales.astype(jnp.bfloat16)[..., None]
    return Units(units.reshape(a.shape), a.amax, a.rule)


def contract(a: Units, b: Units, axes: tuple[int, int]) -> Float32[Array, "m n"]:
    """The product over axis `axes[0]` of `a` and `axes[1]` of `b`, added up in float32."""
    over = ((axes[:1], axes[1:]), ((), ()))
    sums = lax.dot_general(a.units, b.units, over, preferred_element_type=jnp.float32)
    return sums * (_unit(a) * _unit(b))


def _unit(a: Units) -> Float32[Array, ""]:
    """What 1 stands for, by a division as in `format.unit`."""
    return a.amax / lax.optimization_barrier(jnp.float32(constant(a.rule)))
