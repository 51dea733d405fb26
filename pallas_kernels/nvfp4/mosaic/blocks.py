"""Operations on blocks of 16 values in registers, used by the quantize kernels.

A warpgroup processes 128 blocks at once, as an array [..., 16] with one block per thread: [128, 16]
for consecutive blocks, [32, 4, 16] for 4 blocks of 32 rows (`Threads`). Nothing here communicates
between threads: a maximum or sum over a block is register arithmetic, and splitting an array into
its 16 columns and joining them costs nothing, because the compiler knows which register holds which
column.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.nvfp4.format import BLOCK, LIMITS, Rule, StochasticRounding
from pallas_kernels.nvfp4.hadamard import SIGNS
from pallas_kernels.nvfp4.reference import MAX_SCALE, TINY
from pallas_kernels.nvfp4.rounding import MAX_CODE, SLACK, mix, next_scale

GROUP = 128
"""Blocks that a warpgroup processes at once, one per thread."""
_PLGPU: Any = plgpu  # its classes look abstract to a type checker
_LAYOUTS: Any = plgpu.Layout
E2M1, E4M3 = jnp.float4_e2m1fn, jnp.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Threads:
    """Which blocks the 128 threads of a warpgroup hold.

    Attributes:
      shape: shape of the array of values; the last axis has the 16 values of a block.
      layout: layout of that array, one block per thread.
    """

    shape: tuple[int, ...]
    layout: Any

    @property
    def blocks(self) -> tuple[int, ...]:
        """Shape of an array with one number per block."""
        return self.shape[:-1]

    @property
    def block_layout(self) -> Any:
        """Layout of an array with one number per block."""
        return self.layout.reduce(len(self.blocks))

    def index(self, axis: int = 0) -> Any:
        """The index of each block along an axis of `blocks`, uint32."""
        return plgpu.broadcasted_iota(jnp.uint32, self.blocks, axis, layout=self.block_layout)

    def place(self, dtype: Any) -> Any:
        """The index of each value in its block, 0 to 15."""
        axis = len(self.blocks)
        return plgpu.broadcasted_iota(dtype, self.shape, axis, layout=self.layout)

    def zeros(self, per_block: bool) -> Any:
        """Zeros in float32, one per block or one per value."""
        shape = self.blocks if per_block else self.shape
        layout = self.block_layout if per_block else self.layout
        return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

    def join(self, columns: Sequence[Any]) -> Any:
        """Joins sixteen columns, each with one value per block."""
        at = self.place(jnp.int32)
        joined = broadcast_blocks(columns[0])
        for i, column in enumerate(columns[1:], 1):
            joined = jnp.where(at == i, broadcast_blocks(column), joined)
        return joined

    def split(self, x: Any) -> list[Any]:
        """Splits values into sixteen columns.

        The sums add -0, which changes no value, not even the sign of a zero.
        """
        at = self.place(jnp.int32)
        return [jnp.sum(jnp.where(at == i, x, -0.0), axis=-1) for i in range(BLOCK)]

    def load(self, ref: Any) -> Any:
        """Loads values from global memory as float32."""
        return plgpu.load(ref, layout=self.layout, optimized=False).astype(jnp.float32)

    def load_column(self, ref: Any) -> Any:
        """Loads one value per block as float32."""
        return plgpu.load(ref, layout=self.block_layout, optimized=False).astype(jnp.float32)


CONSECUTIVE = Threads((GROUP, BLOCK), _LAYOUTS.TCGEN05_TMEM_NATIVE(8))
"""128 consecutive blocks; 8 elements of 16 bits are one load."""


def _of_rows(rows: int, blocks: int, warp: int, lanes: tuple[int, ...]) -> Threads:
    """[32, 4, 16]; a warp holds `rows` x `blocks` of them."""
    shape = (32, 4, BLOCK)
    tiling = _PLGPU.Tiling((shape, (rows, blocks, BLOCK), (8,)))
    layout = _LAYOUTS.TILED(tiling, warp_dims=(warp,), lane_dims=lanes, vector_dim=-1)
    return Threads(shape, layout)


ALONG_ROWS = _of_rows(8, 4, warp=-7, lanes=(-4, -3))
"""4 blocks of 32 rows; four neighbouring threads hold one row."""
ACROSS_ROWS = _of_rows(32, 1, warp=-6, lanes=(-4,))
"""4 blocks of 32 rows; the threads of a warp hold one block of each row."""


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """How one output is quantized.

    Attributes:
      rule: rule that chooses the block scales.
      hadamard: whether blocks are rotated first.
      stochastic: kind of stochastic rounding, or None to round to nearest even.
    """

    rule: Rule
    hadamard: bool = False
    stochastic: StochasticRounding | None = None

    @property
    def searches(self) -> bool:
        """Whether every block is tried with a largest code of 6 and with one of 4."""
        return self.rule not in ("static_6", "static_4")


def store(ref: Any, value: Any) -> None:
    """Stores registers to global memory, a thread's codes or one scale per thread.

    JAX 0.12 rejects narrow stores unless told that they are intended; JAX 0.11 has no such check.
    """
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def broadcast_blocks(x: Any) -> Any:
    """Broadcasts one number per block to all 16 values."""
    return lax.broadcast_in_dim(x, (*x.shape, BLOCK), tuple(range(x.ndim)))


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
      threads: the blocks that the threads hold.
      count: blocks per group, 1 or 16.
      load: `load(i)` returns block i of every group in float32.
      noise: `noise(i)` returns the rounding noise of those blocks, for a largest code of 6 and for
        one of 4.
      write: `write(i, codes)` stores their codes.
    """

    threads: Threads
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
    """Writes the codes of all blocks and returns the scales of the groups."""
    code, most = LIMITS[options.rule]
    small = amax < TINY
    grow = jnp.where(small, 0.0, code * most / jnp.where(small, 1.0, amax))
    shrink = 1.0 / lax.optimization_barrier(grow)
    up, published = (options.stochastic == kind for kind in ("unbiased", "reference"))

    # 1. The scale for a largest code of M2, from each group's peak.
    def update_peak(i, peak):
        return jnp.maximum(peak, jnp.max(jnp.abs(groups.load(i)), axis=-1))

    peak = groups.fold(update_peak, groups.threads.zeros(per_block=True))
    wanted = (_third(peak) * 0.5 if code == MAX_CODE else peak * 0.25) * grow
    scale, use_four = _e4m3(wanted, peak, up), None
    # 2. Search: take 1.5 times the scale (a largest code of 4) where that errs less.
    if options.searches:
        larger = _e4m3(wanted * 1.5, peak, up)
        error, error_four = _errors(groups, (scale, larger), shrink, amax, options, published)
        use_four = error_four < error
        scale = jnp.where(use_four, larger, scale)

    # 3. Round and write the codes.
    def write(i, carry):
        noise = None
        if options.stochastic is not None:
            noise, second = groups.noise(i)
            if published and use_four is not None:
                noise = jnp.where(broadcast_blocks(use_four), second, noise)
        groups.write(i, _codes(groups.load(i), scale, shrink, noise))
        return carry

    groups.fold(write, jnp.int32(0))
    return scale.astype(E4M3)


def _e4m3(wanted: Any, peak: Any, up: bool) -> Any:
    """Rounds to E4M3 values, up or to nearest, as float32; NaN for a block that is not finite."""
    finite = jnp.where(peak < jnp.inf, jnp.minimum(wanted, MAX_SCALE), jnp.nan)
    scale = finite.astype(E4M3).astype(jnp.float32)
    return jnp.where(scale < finite * SLACK, next_scale(scale), scale) if up else scale


def _codes(x: Any, scale: Any, shrink: Any, noise: Any) -> Any:
    """E2M1 codes of x; the conversion saturates at 6."""
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


def _unit_values(scale: Any, amax: Any) -> tuple[Any, Any]:
    """The dequantized values of the codes 1 and 1.5, one per block.

    Every other code is one of these times a power of two, so its value is exact. The division is by
    M2 * M3 = 6 * 256 = 3 * 512.
    """
    first, second = (_third(scale * code * amax) * 2.0**-9 for code in (1.0, 1.5))
    return first, second


def _dequantized(codes: Any, units: tuple[Any, Any]) -> tuple[Any, Any]:
    """Two factors of the values of codes: a power of two with the sign, and the unit."""
    bits = lax.bitcast_convert_type(codes.astype(jnp.float32), jnp.int32)
    power = lax.bitcast_convert_type(bits & jnp.int32(-(2**23)), jnp.float32)
    has_half = (bits & jnp.int32(2**22)) != 0
    return power, jnp.where(has_half, broadcast_blocks(units[1]), broadcast_blocks(units[0]))


def _errors(
    groups: BlockGroups, scales, shrink, amax, options: QuantizeOptions, published: bool
) -> list[Any]:
    """The quantization error of every group for each candidate scale.

    Codes are rounded to nearest, or stochastically if `published`. Errors are summed in the order
    of the reference: even and odd rows separately, then their left and right halves, then the eight
    columns.
    """
    greatest = options.rule == "abs_max"
    rows = min(groups.count, 2)
    units = [_unit_values(scale, amax) for scale in scales]

    def add(i, sums):
        sums = [row[:] for row in sums]
        for odd in range(rows):
            x = groups.load(i + odd)
            noises = groups.noise(i + odd) if published else (None, None)
            for number, (scale, noise) in enumerate(zip(scales, noises, strict=True)):
                power, unit = _dequantized(_codes(x, scale, shrink, noise), units[number])
                off = power * unit - x
                error = _square(off) if options.rule == "mse" else jnp.abs(off)
                before = sums[number][odd]
                sums[number][odd] = jnp.maximum(before, error) if greatest else before + error
        return sums

    start = [[groups.threads.zeros(per_block=False) for _ in range(rows)] for _ in scales]
    sums = groups.fold(add, start, rows)
    return [_reduce_blocks(groups.threads, parts, greatest) for parts in sums]


def _reduce_blocks(threads: Threads, rows: Sequence[Any], greatest: bool) -> Any:
    """The maximum or the sum of the errors of each block."""
    if greatest:
        return jnp.max(functools.reduce(jnp.maximum, rows), axis=-1)
    columns = [threads.split(x) for x in rows]
    halves = [x[half : half + 8] for x in columns for half in (0, 8)]
    return _sum_in_order([_sum_in_order(x) for x in zip(*halves, strict=True)])


def _sum_in_order(terms: Sequence[Any]) -> Any:
    """Sums from left to right."""
    return functools.reduce(operator.add, terms)


def centred_noise(
    threads: Threads, words: tuple[Any, Any], first: Any, stride: int = 1
) -> tuple[Any, Any]:
    """`rounding.rounding_noise` minus 1/2.

    The values of a block have the indices `first` (one per block), `first + stride`, ... in the
    array.
    """
    index = threads.place(jnp.uint32) * jnp.uint32(stride)
    bits = mix(mix(broadcast_blocks(first) + index + words[0]) + words[1])
    return _centred(bits >> jnp.uint32(16)), _centred(bits & jnp.uint32(0xFFFF))


def _centred(bits: Any) -> Any:
    return (bits.astype(jnp.float32) + 0.5) * 2.0**-16 - 0.5


def as_uint32(x: Any) -> Any:
    """Converts a scalar to uint32."""
    return lax.convert_element_type(x, jnp.uint32)
