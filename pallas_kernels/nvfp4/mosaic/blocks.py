"""Operations on blocks of 16 values in registers, used by the quantize kernels.

A warpgroup processes 128 blocks at once, as an array [128, 16] with one block per thread. Nothing
here communicates between threads: a maximum or sum over a block is register arithmetic, and
splitting an array into its 16 columns and joining them costs nothing, because the compiler knows
which register holds which column.
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
from pallas_kernels.nvfp4.reference import MAX_SCALE, TINY
from pallas_kernels.nvfp4.rounding import MAX_CODE, mix

GROUP = 128
"""Blocks that a warpgroup processes at once, one per thread."""
SHAPE = (GROUP, BLOCK)
_LAYOUTS: Any = plgpu.Layout
LAYOUT = _LAYOUTS.TCGEN05_TMEM_NATIVE(8)  # 8 elements of 16 bits are one load
SCALES = LAYOUT.reduce(1)
E2M1, E4M3 = jnp.float4_e2m1fn, jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """How one output is quantized.

    Attributes:
      rule: rule that chooses the block scales.
      hadamard: whether blocks are rotated first.
      stochastic: whether rounding is stochastic; else to nearest even.
    """

    rule: Rule
    hadamard: bool = False
    stochastic: bool = False

    @property
    def searches(self) -> bool:
        """Whether every block is tried with a largest code of 6 and with one of 4."""
        return self.rule not in ("static_6", "static_4")


def load(ref: Any) -> Any:
    """Loads [128, 16] from global memory as float32."""
    return plgpu.load(ref, layout=LAYOUT, optimized=False).astype(jnp.float32)


def load_column(ref: Any) -> Any:
    """Loads [128] values, one per thread, as float32."""
    return plgpu.load(ref, layout=SCALES, optimized=False).astype(jnp.float32)


def store(ref: Any, value: Any) -> None:
    """Stores registers to global memory, a thread's codes or one scale per thread.

    JAX 0.12 rejects narrow stores unless told that they are intended; JAX 0.11 has no such check.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def broadcast_blocks(x: Any) -> Any:
    """Broadcasts [128] to [128, 16]."""
    return lax.broadcast_in_dim(x, SHAPE, (0,))


def join(columns: Sequence[Any]) -> Any:
    """Joins sixteen columns [128] into [128, 16]."""
    at = plgpu.broadcasted_iota(jnp.int32, SHAPE, 1, layout=LAYOUT)
    joined = broadcast_blocks(columns[0])
    for i, column in enumerate(columns[1:], 1):
        joined = jnp.where(at == i, broadcast_blocks(column), joined)
    return joined


def split(x: Any) -> list[Any]:
    """Splits [128, 16] into sixteen columns [128].

    The sums add -0, which changes no value, not even the sign of a zero.
    """
    at = plgpu.broadcasted_iota(jnp.int32, SHAPE, 1, layout=LAYOUT)
    return [jnp.sum(jnp.where(at == i, x, -0.0), axis=1) for i in range(BLOCK)]


def rotate(columns: Sequence[Any]) -> list[Any]:
    """`hadamard.rotate` of sixteen columns by the fast transform: four additions per value."""
    rotated = [x if sign > 0 else -x for x, sign in zip(columns, SIGNS, strict=True)]
    half = 1
    while half < BLOCK:
        rotated = [
            rotated[i] + rotated[i ^ half] if not i & half else rotated[i ^ half] - rotated[i]
            for i in range(BLOCK)
        ]
        half *= 2
    return [(x * 0.25).astype(jnp.bfloat16).astype(jnp.float32) for x in rotated]


@dataclasses.dataclass(frozen=True)
class BlockGroups:
    """128 groups of blocks, each with one scale: single blocks, or the 16 blocks of a square.

    Attributes:
      count: blocks per group, 1 or 16.
      load: `load(i)` returns block i of every group, [128, 16] in float32.
      noise: `noise(i)` returns the rounding noise of those blocks, for a largest code of 6 and for
        one of 4.
      write: `write(i, codes)` stores their codes.
    """

    count: int
    load: Callable[[Any], Any]
    noise: Callable[[Any], tuple[Any, Any]]
    write: Callable[[Any, Any], None]

    def fold(self, step: Callable, start: Any, width: int = 1) -> Any:
        """Folds `step(i, carry)` over every `width`-th block."""
        if self.count == 1:
            return step(0, start)
        return lax.fori_loop(0, self.count // width, lambda i, carry: step(i * width, carry), start)


def encode_groups(groups: BlockGroups, amax: Any, options: QuantizeOptions) -> Any:
    """Writes the codes of all blocks and returns the scales [128] of the groups."""
    code, most = LIMITS[options.rule]
    small = amax < TINY
    grow = jnp.where(small, 0.0, code * most / jnp.where(small, 1.0, amax))
    shrink = 1.0 / lax.optimization_barrier(grow)

    # 1. The scale for a largest code of M2, from each group's peak.
    def update_peak(i, peak):
        return jnp.maximum(peak, jnp.max(jnp.abs(groups.load(i)), axis=1))

    peak = groups.fold(update_peak, _zeros((GROUP,), SCALES))
    wanted = (_third(peak) * 0.5 if code == MAX_CODE else peak * 0.25) * grow
    scale, use_four = _e4m3(wanted, peak), None
    # 2. Search: take 1.5 times the scale (a largest code of 4) where that errs less.
    if options.searches:
        larger = _e4m3(wanted * 1.5, peak)
        error, error_four = _errors(groups, (scale, larger), shrink, amax, options)
        use_four = error_four < error
        scale = jnp.where(use_four, larger, scale)

    # 3. Round and write the codes.
    def write(i, carry):
        noise = None
        if options.stochastic:
            noise, second = groups.noise(i)
            noise = (
                noise if use_four is None else jnp.where(broadcast_blocks(use_four), second, noise)
            )
        groups.write(i, _codes(groups.load(i), scale, shrink, noise))
        return carry

    groups.fold(write, jnp.int32(0))
    return scale.astype(E4M3)


def _zeros(shape: tuple[int, ...], layout: Any) -> Any:
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _e4m3(wanted: Any, peak: Any) -> Any:
    """Rounds to E4M3 values, as float32; NaN for a block that is not finite."""
    finite = jnp.where(peak < jnp.inf, jnp.minimum(wanted, MAX_SCALE), jnp.nan)
    return finite.astype(E4M3).astype(jnp.float32)


def _codes(x: Any, scale: Any, shrink: Any, noise: Any) -> Any:
    """E2M1 codes of [128, 16]; the conversion saturates at 6."""
    inverse = jnp.where(scale == 0, 0.0, 1.0 / (shrink * scale))
    scaled = 0.0 - (
        -(x * broadcast_blocks(inverse))
    )  # -0 becomes 0; a value rounded to 0 keeps its sign
    return (scaled if noise is None else _stochastic_round(scaled, noise)).astype(E2M1)


def _third(x: Any) -> Any:
    """`reference.third`, with the low bits of the first estimate truncated instead of rounded."""
    guess = lax.bitcast_convert_type(x * jnp.float32(1 / 3), jnp.int32) & jnp.int32(-8)
    near = lax.bitcast_convert_type(guess, jnp.float32)
    return near + (x - 3.0 * near) * jnp.float32(1 / 3)


def _square(x: Any) -> Any:
    """`reference.square`: the bound prevents fusing the product into a following sum."""
    return jnp.minimum(x * x, jnp.finfo(jnp.float32).max)


def _stochastic_round(scaled: Any, noise: Any) -> Any:
    """`rounding.stochastic_round`, multiplying by the exact inverse of a step, not dividing."""
    size = jnp.abs(scaled)
    step = jnp.where(size < 2.0, 0.5, jnp.where(size < 4.0, 1.0, 2.0))
    per = jnp.where(size < 2.0, 2.0, jnp.where(size < 4.0, 1.0, 0.5))
    rounded = lax.round(size * per + noise, lax.RoundingMethod.TO_NEAREST_EVEN) * step
    rounded = jnp.minimum(rounded, MAX_CODE)
    return jnp.where(scaled < 0, -rounded, rounded)


def _errors(groups: BlockGroups, scales, shrink, amax, options: QuantizeOptions) -> list[Any]:
    """The quantization error of every group for each candidate scale.

    Errors are summed in the order of the reference: even and odd rows separately, then their left
    and right halves, then the eight columns.
    """
    greatest = options.rule == "abs_max"
    rows = min(groups.count, 2)

    def add(i, sums):
        sums = [row[:] for row in sums]
        for odd in range(rows):
            x = groups.load(i + odd)
            noises = groups.noise(i + odd) if options.stochastic else (None, None)
            for number, (scale, noise) in enumerate(zip(scales, noises, strict=True)):
                codes = _codes(x, scale, shrink, noise).astype(jnp.float32)
                # Division by M2 * M3 = 6 * 256 = 3 * 512.
                off = _third(codes * broadcast_blocks(scale) * amax) * 2.0**-9 - x
                error = _square(off) if options.rule == "mse" else jnp.abs(off)
                before = sums[number][odd]
                sums[number][odd] = jnp.maximum(before, error) if greatest else before + error
        return sums

    start = [[_zeros(SHAPE, LAYOUT) for _ in range(rows)] for _ in scales]
    return [_reduce_blocks(sums, greatest) for sums in groups.fold(add, start, rows)]


def _reduce_blocks(rows: Sequence[Any], greatest: bool) -> Any:
    """The maximum or the sum of the errors [128, 16] of each block."""
    if greatest:
        return jnp.max(functools.reduce(jnp.maximum, rows), axis=1)
    columns = [split(x) for x in rows]
    halves = [x[half : half + 8] for x in columns for half in (0, 8)]
    return _sum_in_order([_sum_in_order(x) for x in zip(*halves, strict=True)])


def _sum_in_order(terms: Sequence[Any]) -> Any:
    """Sums from left to right."""
    return functools.reduce(operator.add, terms)


def centred_noise(words: tuple[Any, Any], first: Any, stride: int = 1) -> tuple[Any, Any]:
    """`rounding.rounding_noise` minus 1/2.

    The values of a block have the indices `first` [128], `first + stride`, ... in the array.
    """
    index = plgpu.broadcasted_iota(jnp.uint32, SHAPE, 1, layout=LAYOUT) * jnp.uint32(stride)
    bits = mix(mix(broadcast_blocks(first) + index + words[0]) + words[1])
    return _centred(bits >> jnp.uint32(16)), _centred(bits & jnp.uint32(0xFFFF))


def _centred(bits: Any) -> Any:
    return (bits.astype(jnp.float32) + 0.5) * 2.0**-16 - 0.5


def thread_index() -> Any:
    """0 to 127, one per thread."""
    return plgpu.broadcasted_iota(jnp.uint32, (GROUP,), 0, layout=SCALES)


def as_uint32(x: Any) -> Any:
    """Converts a scalar to uint32."""
    return lax.convert_element_type(x, jnp.uint32)
