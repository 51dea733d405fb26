"""Dequantization of NVFP4 on Blackwell: codes and scales are read once, values are written once.

Two neighbouring threads share a block, 8 codes each, so that a warp reads 128 contiguous bytes of
codes and writes 512 contiguous bytes of bfloat16 values.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.nvfp4.format import BLOCK, NVFP4, global_scale
from pallas_kernels.nvfp4.mosaic.launch import WorkPartition, check_device, kernel, pad_to

READ_BLOCKS = 256
"""Blocks that a warpgroup reads at once."""
TILE = 64
"""Blocks of a tile of `LAYOUT`; reads are whole tiles."""
READS_PER_PROGRAM = 2
"""Reads of a warpgroup per program."""
_PLGPU: Any = plgpu  # its classes look abstract to a type checker
LAYOUT = _PLGPU.Layout.TILED(
    _PLGPU.Tiling(((TILE, BLOCK), (16, BLOCK), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
SCALES = LAYOUT.reduce(1)


def dequantize(
    a: NVFP4,
    dtype: jnp.dtype = jnp.bfloat16,
    offset: Float[Array, "*rows k"] | None = None,
    *,
    interpret: Any = None,
) -> Float[Array, "*rows k"]:
    """`dequantize_reference` for arrays of any shape, to bfloat16 or float32.

    `offset` broadcasts against the values and is added in float32. The kernel adds it if it repeats
    along the first axis behind those of `amax` with a period that is a multiple of 64 blocks; else
    XLA adds it to float32 values. `interpret` (`plgpu.InterpretGPUParams`) runs the kernel in the
    interpreter. Raises `Unsupported` on devices other than Blackwell and ValueError for other
    dtypes.
    """
    check_device("dequantize", interpret)
    repeated = None if offset is None else _repeated(a, offset)
    if offset is not None and repeated is None:
        values = dequantize(a, jnp.float32, interpret=interpret) + offset.astype(jnp.float32)
        return values.astype(dtype)
    entries = jnp.arange(a.amax.size, dtype=jnp.int32)
    flat = NVFP4(
        a.codes.reshape(a.amax.size, -1),
        a.scales.reshape(a.amax.size, -1),
        a.amax.reshape(-1),
        a.rule,
    )
    return _dequantize(flat, entries, dtype, interpret, repeated).reshape(a.shape)


def _repeated(a: NVFP4, offset: Array) -> Array | None:
    """The blocks of an offset [entries, period, 16]; None if the kernel cannot add it."""
    lead = a.amax.ndim
    period = math.prod(a.shape[lead + 1 :])
    if offset.ndim != len(a.shape) or offset.shape[lead] != 1 or period % (TILE * BLOCK):
        return None
    per_entry = jnp.broadcast_to(offset, (*a.shape[:lead], 1, *a.shape[lead + 1 :]))
    return per_entry.reshape(a.amax.size, -1, BLOCK)


def _dequantize(
    a: NVFP4, slots: Array, dtype: Any, interpret: Any, offset: Array | None = None
) -> Array:
    """Dequantizes the listed entries of `a` [count, elements] to [n, elements].

    `offset` [count, period, 16] is added to every `period` blocks of an entry.
    """
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"the kernel writes bfloat16 or float32, got {jnp.dtype(dtype)}")
    # 1. Reads never cross a period of the offset.
    count, number = a.scales.shape
    width = READ_BLOCKS if offset is None else _width(offset.shape[1])
    codes = pad_to(a.codes.reshape(count, number, BLOCK), 1, width)
    scales = pad_to(a.scales, 1, width)
    partition = WorkPartition(scales.shape[1], READS_PER_PROGRAM, width)

    # 2. Each program dequantizes its reads of one entry.
    def body(codes, scales, global_scales, slots, *offset_and_out):
        *added, out = offset_and_out
        entry, program = lax.axis_index("slots"), lax.axis_index("programs")
        slot = slots[entry]
        factor = global_scales[slot]

        def step(start):
            own = pl.ds(start, width)
            codes_f32 = _load(codes.at[slot, own, :], LAYOUT)
            scale = _load(scales.at[slot, own], SCALES)
            values = codes_f32 * lax.broadcast_in_dim(scale, codes_f32.shape, (0,)) * factor
            for offset in added:
                repeated = pl.ds(lax.rem(start, jnp.int32(offset.shape[1])), width)
                values = values + _load(offset.at[slot, repeated, :], LAYOUT)
            out[entry, own, :] = values.astype(dtype)

        partition.walk(program, step)

    # 3. Launch.
    shape = (slots.shape[0], *codes.shape[1:])
    grid = {"programs": partition.programs, "slots": slots.shape[0]}
    run = kernel(body, jax.ShapeDtypeStruct(shape, dtype), grid, interpret=interpret)
    added = () if offset is None else (offset,)
    return run(codes, scales, global_scale(a), slots, *added)[:, :number]


def _width(period: int) -> int:
    """The most blocks of whole tiles that divide a period and are read at once."""
    return max(n for n in range(TILE, READ_BLOCKS + 1, TILE) if period % n == 0)


def _load(ref: Any, layout: Any) -> Any:
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
