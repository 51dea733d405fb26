"""Blocks of 16 in registers: what the quantize kernels do with them.

A warpgroup works on 128 blocks at once, as an array [128, 16] of which every thread holds a whole
block. So nothing here crosses threads: a maximum or a sum over a block is plain arithmetic, and an
array can be taken apart into its 16 columns and put together again for nothing (the compiler knows
which register holds which column).
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nvfp4.format import BLOCK, LIMITS, Rule
from pallas_kernels.nvfp4.hadamard import SIGNS
from pallas_kernels.nvfp4.reference import MOST, TINY
from pallas_kernels.nvfp4.rounding import LARGEST, mix

GROUP = 128
"""Blocks a warpgroup works on at once: one a thread."""
SHAPE = (GROUP, BLOCK)
_LAYOUTS: Any = plgpu.Layout
LAYOUT = _LAYOUTS.TCGEN05_TMEM_NATIVE(8)  # 8 elements of 16 bits are one load
SCALES = LAYOUT.reduce(1)
E2M1, E4M3 = jnp.float4_e2m1fn, jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Form:
    """What one output is made by.

    Attributes:
      rule: of the block scales.
      hadamard: blocks are rotated first.
      stochastic: rounding, else to nearest even.
    """

    rule: Rule
    hadamard: bool = False
    stochastic: bool = False

    @property
    def searches(self) -> bool:
        """Whether every block is tried with a largest code of 6 and of 4."""
        return self.rule not in ("static_6", "static_4")


def load(ref: Any) -> Any:
    """[128, 16] of global memory in float32."""
    return plgpu.load(ref, layout=LAYOUT, optimized=False).astype(jnp.float32)


def load_column(ref: Any) -> Any:
    """[128] numbers, one a thread, in float32."""
    return plgpu.load(ref, layout=SCALES, optimized=False).astype(jnp.float32)


def spread(x: Any) -> Any:
    """[128] -> [128, 16]."""
    return lax.broadcast_in_dim(x, SHAPE, (0,))


def join(columns: Sequence[Any]) -> Any:
    """Sixteen arrays [128] as [128, 16]."""
    at = plgpu.broadcasted_iota(jnp.int32, SHAPE, 1, layout=LAYOUT)
    joined = spread(columns[0])
    for i, column in enumerate(columns[1:], 1):
        joined = jnp.where(at == i, spread(column), joined)
    return joined


def split(x: Any) -> list[Any]:
    """[128, 16] as sixteen arrays [128]. Adding -0 changes nothing, not even the sign of a 0."""
    at = plgpu.broadcasted_iota(jnp.int32, SHAPE, 1, layout=LAYOUT)
    return [jnp.sum(jnp.where(at == i, x, -0.0), axis=1) for i in range(BLOCK)]


def rotate(columns: Sequence[Any]) -> list[Any]:
    """`hadamard.rotate` of sixteen arrays by the fast transform: four additions an element."""
    turned = [x if sign > 0 else -x for x, sign in zip(columns, SIGNS, strict=True)]
    half = 1
    while half < BLOCK:
        turned = [
            turned[i] + turned[i ^ half] if not i & half else turned[i ^ half] - turned[i]
            for i in range(BLOCK)
        ]
        half *= 2
    return [(x * 0.25).astype(jnp.bfloat16).astype(jnp.float32) for x in turned]


@dataclasses.dataclass(frozen=True)
class Parts:
    """128 groups of blocks that share a scale each: one block, or the 16 of a square.

    Attributes:
      count: blocks of a group, 1 or 16.
      load: `load(i)` gives block i of every group, [128, 16] in float32.
      draws: `draws(i)` gives the uniform numbers of those blocks, for a largest code of 6 and of 4.
      write: `write(i, codes)` takes their codes.
    """

    count: int
    load: Callable[[Any], Any]
    draws: Callable[[Any], tuple[Any, Any]]
    write: Callable[[Any, Any], None]

    def fold(self, step: Callable, start: Any, width: int = 1) -> Any:
        """Folds `step(i, carry)` over every `width`-th block."""
        if self.count == 1:
            return step(0, start)
        return lax.fori_loop(0, self.count // width, lambda i, carry: step(i * width, carry), start)


def encode(parts: Parts, amax: Any, form: Form) -> Any:
    """Writes the codes of all parts and returns the scales [128] of the groups."""
    code, most = LIMITS[form.rule]
    small = amax < TINY
    grow = jnp.where(small, 0.0, code * most / jnp.where(small, 1.0, amax))
    shrink = 1.0 / lax.optimization_barrier(grow)

    def larger(i, peak):
        return jnp.maximum(peak, jnp.max(jnp.abs(parts.load(i)), axis=1))

    peak = parts.fold(larger, _filled((GROUP,), SCALES))
    wanted = (_third(peak) * 0.5 if code == LARGEST else peak * 0.25) * grow
    scale, to_four = _e4m3(wanted, peak), None
    if form.searches:
        other = _e4m3(wanted * 1.5, peak)
        lost, lost_to_four = _errors(parts, (scale, other), shrink, amax, form)
        to_four = lost_to_four < lost
        scale = jnp.where(to_four, other, scale)

    def write(i, carry):
        draw = None
        if form.stochastic:
            draw, second = parts.draws(i)
            draw = draw if to_four is None else jnp.where(spread(to_four), second, draw)
        parts.write(i, _codes(parts.load(i), scale, shrink, draw))
        return carry

    parts.fold(write, jnp.int32(0))
    return scale.astype(E4M3)


def _filled(shape: tuple[int, ...], layout: Any) -> Any:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _e4m3(wanted: Any, peak: Any) -> Any:
    """Rounded to what e4m3 holds, as float32; NaN for a block that is not finite."""
    finite = jnp.where(peak < jnp.inf, jnp.minimum(wanted, MOST), jnp.nan)
    return finite.astype(E4M3).astype(jnp.float32)


def _codes(x: Any, scale: Any, shrink: Any, draw: Any) -> Any:
    """e2m1 codes of [128, 16]; the conversion saturates at 6."""
    inverse = jnp.where(scale == 0, 0.0, 1.0 / (shrink * scale))
    scaled = 0.0 - (-(x * spread(inverse)))  # -0 becomes 0; what is rounded to 0 keeps its sign
    return (scaled if draw is None else _by_chance(scaled, draw)).astype(E2M1)


def _third(x: Any) -> Any:
    """`reference.third`, with the last bits of the first guess cut off instead of rounded away."""
    guess = lax.bitcast_convert_type(x * jnp.float32(1 / 3), jnp.int32) & jnp.int32(-8)
    near = lax.bitcast_convert_type(guess, jnp.float32)
    return near + (x - 3.0 * near) * jnp.float32(1 / 3)


def _square(x: Any) -> Any:
    """`reference.square`: the bound stands between a product and a sum that would be fused."""
    return jnp.minimum(x * x, jnp.finfo(jnp.float32).max)


def _by_chance(scaled: Any, draws: Any) -> Any:
    """`rounding.by_chance`, with products by the exact inverse of a step instead of quotients."""
    size = jnp.abs(scaled)
    step = jnp.where(size < 2.0, 0.5, jnp.where(size < 4.0, 1.0, 2.0))
    per = jnp.where(size < 2.0, 2.0, jnp.where(size < 4.0, 1.0, 0.5))
    rounded = lax.round(size * per + draws, lax.RoundingMethod.TO_NEAREST_EVEN) * step
    rounded = jnp.minimum(rounded, LARGEST)
    return jnp.where(scaled < 0, -rounded, rounded)


def _errors(parts: Parts, scales, shrink, amax, form: Form) -> list[Any]:
    """What each of the scales loses of every group, summed in the order of the oracle: even and odd
    rows for themselves, then their left and right halves, then the eight columns."""
    greatest = form.rule == "abs_max"
    rows = min(parts.count, 2)

    def add(i, kept):
        found = [row[:] for row in kept]
        for odd in range(rows):
            x = parts.load(i + odd)
            draws = parts.draws(i + odd) if form.stochastic else (None, None)
            for number, (scale, draw) in enumerate(zip(scales, draws, strict=True)):
                codes = _codes(x, scale, shrink, draw).astype(jnp.float32)
                off = _third(codes * spread(scale) * amax) * 2.0**-9 - x  # 6 * 256 is 3 * 512
                lost = _square(off) if form.rule == "mse" else jnp.abs(off)
                before = found[number][odd]
                found[number][odd] = jnp.maximum(before, lost) if greatest else before + lost
        return found

    start = [[_filled(SHAPE, LAYOUT) for _ in range(rows)] for _ in scales]
    return [_across(kept, greatest) for kept in parts.fold(add, start, rows)]


def _across(rows: Sequence[Any], greatest: bool) -> Any:
    """The maximum or the sum of errors [128, 16] of each block."""
    if greatest:
        return jnp.max(functools.reduce(jnp.maximum, rows), axis=1)
    columns = [split(x) for x in rows]
    halves = [x[half : half + 8] for x in columns for half in (0, 8)]
    return _sum([_sum(x) for x in zip(*halves, strict=True)])


def _sum(terms: Sequence[Any]) -> Any:
    """From left to right."""
    return functools.reduce(operator.add, terms)


def draws(words: tuple[Any, Any], first: Any, stride: int = 1) -> tuple[Any, Any]:
    """`rounding.draws` less 1/2, for blocks whose elements are number `first` [128] of the array
    and every `stride`-th from there."""
    place = plgpu.broadcasted_iota(jnp.uint32, SHAPE, 1, layout=LAYOUT) * jnp.uint32(stride)
    bits = mix(mix(spread(first) + place + words[0]) + words[1])
    return _centred(bits >> jnp.uint32(16)), _centred(bits & jnp.uint32(0xFFFF))


def _centred(bits: Any) -> Any:
    return (bits.astype(jnp.float32) + 0.5) * 2.0**-16 - 0.5


def numbers() -> Any:
    """0 to 127, one a thread."""
    return plgpu.broadcasted_iota(jnp.uint32, (GROUP,), 0, layout=SCALES)


def unsigned(x: Any) -> Any:
    """A scalar as uint32."""
    return lax.convert_element_type(x, jnp.uint32)
