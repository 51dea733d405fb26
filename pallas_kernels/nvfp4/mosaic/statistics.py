"""The statistics that quantization of a matrix needs, from one read of it.

A thread holds 16 rows of four columns and passes over all rows of its part: the largest magnitude,
the largest magnitude after the Hadamard transform of 16 rows, and the sums over rows stay in
registers. Programs write partial results, which XLA reduces; they have 1 % of the size of x.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from pallas_kernels.nvfp4.format import BLOCK
from pallas_kernels.nvfp4.mosaic.blocks import GROUP, rotate
from pallas_kernels.nvfp4.mosaic.launch import WorkPartition, check_device, kernel, pad_to

VECTOR = 4
"""Neighbouring columns of a thread: loads of 8 bytes."""
GROUPS = 4
"""Groups of 16 rows that a program reads."""
_PLGPU: Any = plgpu  # its classes look abstract to a type checker
LAYOUT = _PLGPU.Layout.TILED(
    _PLGPU.Tiling(((GROUP, VECTOR), (32, VECTOR))),
    warp_dims=(-4,),
    lane_dims=(-2,),
    vector_dim=-1,
)


def statistics(
    x: Float[Array, "m k"], *, hadamard: bool, sums: bool, interpret: Any = None
) -> tuple[Float32[Array, ""], Float32[Array, ""], Float32[Array, "k"] | None]:
    """max |x|, max |rotate(x^T)| and the sums of x over rows.

    Without `hadamard` the second equals the first; without `sums` the third is None. The maxima are
    NaN if there is a NaN. Raises `Unsupported` on devices other than Blackwell and ValueError
    unless m is a multiple of 16.
    """
    check_device("quantize", interpret)
    m, k = x.shape
    if m % BLOCK:
        raise ValueError(f"the number of rows must be a multiple of {BLOCK}, got {m}")
    padded = pad_to(pad_to(x, 1, -(-k // VECTOR) * VECTOR), 1, GROUP * VECTOR)
    columns = WorkPartition(padded.shape[1] // VECTOR, 1)
    programs = -(-m // (BLOCK * GROUPS))

    def body(x, *partial):
        across, down = lax.axis_index("columns"), lax.axis_index("rows")
        columns.walk(across, lambda start: _part(x, partial, across, down, start, hadamard, sums))

    shapes = [(jnp.int32, (programs, columns.programs, GROUP))] * (1 + hadamard)
    shapes += [(jnp.float32, (programs, columns.length, VECTOR))] * sums
    out = tuple(jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in shapes)
    grid = {"columns": columns.programs, "rows": programs}
    results = kernel(body, out, grid, interpret=interpret)(padded.reshape(m, -1, VECTOR))
    peaks = [
        lax.bitcast_convert_type(jnp.max(bits), jnp.float32) for bits in results[: 1 + hadamard]
    ]
    total = jnp.sum(results[-1], axis=0).reshape(-1)[:k] if sums else None
    return peaks[0], peaks[-1], total


def _part(x, partial, across, down, start, hadamard: bool, sums: bool) -> None:
    """The statistics of one program: `GROUPS` x 16 rows of 512 columns."""
    # 1. What a program adds for every group of rows.
    own = pl.ds(start, GROUP)
    shape = (GROUP, VECTOR)
    last = jnp.int32(x.shape[0] // BLOCK)

    def group(i, carry):
        peaks, total = carry
        rows = [
            plgpu.load(x.at[i * BLOCK + j, own, :], layout=LAYOUT, optimized=False).astype(
                jnp.float32
            )
            for j in range(BLOCK)
        ]
        values = [rows, rotate(rows)][: 1 + hadamard]
        peaks = [_larger(peak, part) for peak, part in zip(peaks, values, strict=True)]
        if sums:
            for row in rows:
                total = total + row
        return peaks, total

    def zeros(dtype):
        return plgpu.layout_cast(jnp.zeros(shape, dtype), LAYOUT)

    # 2. All groups, then the partial results.
    start_of = [zeros(jnp.int32) for _ in range(1 + hadamard)]
    first = down * GROUPS
    total = zeros(jnp.float32) if sums else jnp.int32(0)
    stop = lax.min(first + GROUPS, last)
    peaks, total = lax.fori_loop(first, stop, group, (start_of, total))
    for ref, peak in zip(partial, peaks, strict=False):
        before = jnp.max(peak, axis=1)
        ref.at[down, across, :][...] = before
    if sums:
        partial[-1].at[down, own, :][...] = total


def _larger(peak: Any, values: list[Any]) -> Any:
    """The larger magnitudes, compared on their bits, which are largest for NaN."""
    for value in values:
        bits = lax.bitcast_convert_type(value, jnp.int32) & jnp.int32(2**31 - 1)
        peak = jnp.maximum(peak, bits)
    return peak
