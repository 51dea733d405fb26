"""Dequantization of NVFP4 on Blackwell: codes and scales are read once, values are written once.

Two neighbouring threads share a block, 8 codes each, so that a warp reads 128 contiguous bytes of
codes and writes 512 contiguous bytes of bfloat16 values.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.nvfp4.format import BLOCK, NVFP4, global_scale
from pallas_kernels.nvfp4.mosaic.launch import WorkPartition, check_device, kernel, pad_to

READ_BLOCKS = 256
"""Blocks that a warpgroup reads at once."""
READS_PER_PROGRAM = 2
"""Reads of a warpgroup per program."""
_PLGPU: Any = plgpu  # its classes look abstract to a type checker
LAYOUT = _PLGPU.Layout.TILED(
    _PLGPU.Tiling(((64, BLOCK), (16, BLOCK), (8,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
SCALES = LAYOUT.reduce(1)


def dequantize(
    a: NVFP4, dtype: jnp.dtype = jnp.bfloat16, *, interpret: Any = None
) -> Float[Array, "*rows k"]:
    """`dequantize_reference` for arrays of any shape, to bfloat16 or float32.

    `interpret` (`plgpu.InterpretGPUParams`) runs the kernel in the interpreter. Raises
    `Unsupported` on devices other than Blackwell and ValueError for other dtypes.
    """
    check_device("dequantize", interpret)
    entries = jnp.arange(a.amax.size, dtype=jnp.int32)
    flat = NVFP4(
        a.codes.reshape(a.amax.size, -1),
        a.scales.reshape(a.amax.size, -1),
        a.amax.reshape(-1),
        a.rule,
    )
    return _dequantize(flat, entries, dtype, interpret).reshape(a.shape)


def dequantize_slots(
    a: NVFP4,
    slots: Int[Array, "n"],
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    interpret: Any = None,
) -> Float[Array, "n *rows k"]:
    """Dequantizes the listed entries of the first axis, which have one `amax` each.

    It is meant for a KV cache whose chunks are quantized one by one: only listed slots are read,
    and the list is data, so a new list needs no compilation. Slots out of range are clamped. Raises
    like `dequantize`, and ValueError for an `amax` of another shape.
    """
    check_device("dequantize", interpret)
    if a.amax.shape != a.shape[:1]:
        raise ValueError(f"amax must have shape {a.shape[:1]}, one per slot, got {a.amax.shape}")
    count = a.shape[0]
    listed = jnp.clip(slots.astype(jnp.int32), 0, count - 1)
    return _dequantize(_flat(a, count), listed, dtype, interpret).reshape(
        slots.shape[0], *a.shape[1:]
    )


def _flat(a: NVFP4, count: int) -> NVFP4:
    """Reshapes to [count, elements]."""
    codes, scales = (x.reshape(count, -1) for x in (a.codes, a.scales))
    return NVFP4(codes, scales, a.amax.reshape(-1), a.rule)


def _dequantize(a: NVFP4, slots: Array, dtype: Any, interpret: Any) -> Array:
    """Dequantizes the listed entries of `a` [count, elements] to [n, elements]."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"the kernel writes bfloat16 or float32, got {jnp.dtype(dtype)}")
    count, number = a.scales.shape
    codes = pad_to(a.codes.reshape(count, number, BLOCK), 1, READ_BLOCKS)
    scales = pad_to(a.scales, 1, READ_BLOCKS)
    partition = WorkPartition(scales.shape[1], READS_PER_PROGRAM, READ_BLOCKS)

    def body(codes, scales, global_scales, slots, out):
        entry, program = lax.axis_index("slots"), lax.axis_index("programs")
        slot = slots[entry]
        factor = global_scales[slot]

        def step(start):
            own = pl.ds(start, READ_BLOCKS)
            codes_f32 = _load(codes.at[slot, own, :], LAYOUT)
            scale = _load(scales.at[slot, own], SCALES)
            values = codes_f32 * lax.broadcast_in_dim(scale, codes_f32.shape, (0,)) * factor
            out[entry, own, :] = values.astype(dtype)

        partition.walk(program, step)

    shape = (slots.shape[0], *codes.shape[1:])
    grid = {"programs": partition.programs, "slots": slots.shape[0]}
    run = kernel(body, jax.ShapeDtypeStruct(shape, dtype), grid, interpret=interpret)
    return run(codes, scales, global_scale(a), slots)[:, :number]


def _load(ref: Any, layout: Any) -> Any:
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
