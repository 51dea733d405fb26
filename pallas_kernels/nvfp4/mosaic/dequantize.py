"""NVFP4 to bfloat16 or float32 on Blackwell: codes and scales are read once, values written once.

Two neighbouring threads share a block, 8 codes each, so that a warp reads 128 bytes of codes and
writes 512 of values in one piece.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.nvfp4.format import BLOCK, NVFP4, unit
from pallas_kernels.nvfp4.mosaic.launch import Cut, at_least, check, kernel

GROUP = 256
"""Blocks a warpgroup reads at once."""
GROUPS = 2
"""Groups that a program takes."""
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
    """`dequantize_reference` of an array of any shape, bfloat16 or float32.

    `interpret` (`plgpu.InterpretGPUParams`) simulates the kernel. Raises `Unsupported` off
    Blackwell, ValueError for other dtypes.
    """
    check("dequantize", interpret)
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
    """The values of the listed entries of the first axis, which each have an `amax`.

    That is a cache of keys or values whose chunks are quantized one by one: only chunks that are
    listed are read, whichever they are, and the list is data, so another one compiles nothing.
    Slots out of range give the nearest one. Raises as `dequantize`, and ValueError for an `amax`
    of another shape.
    """
    check("dequantize", interpret)
    if a.amax.shape != a.shape[:1]:
        raise ValueError(f"amax has shape {a.amax.shape}; {a.shape[0]} slots have one each")
    count = a.shape[0]
    listed = jnp.clip(slots.astype(jnp.int32), 0, count - 1)
    return _dequantize(_flat(a, count), listed, dtype, interpret).reshape(
        slots.shape[0], *a.shape[1:]
    )


def _flat(a: NVFP4, count: int) -> NVFP4:
    """As [count, elements]."""
    codes, scales = (x.reshape(count, -1) for x in (a.codes, a.scales))
    return NVFP4(codes, scales, a.amax.reshape(-1), a.rule)


def _dequantize(a: NVFP4, slots: Array, dtype: Any, interpret: Any) -> Array:
    """Entries of `a` [count, elements], [n, elements]."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"NVFP4 to {jnp.dtype(dtype)}; the kernel writes bfloat16 or float32")
    count, number = a.scales.shape
    codes = at_least(a.codes.reshape(count, number, BLOCK), 1, GROUP)
    scales = at_least(a.scales, 1, GROUP)
    cut = Cut(scales.shape[1], GROUPS, GROUP)

    def body(codes, scales, units, slots, out):
        entry, program = lax.axis_index("slots"), lax.axis_index("programs")
        slot = slots[entry]
        factor = units[slot]

        def step(start):
            own = pl.ds(start, GROUP)
            found = _load(codes.at[slot, own, :], LAYOUT)
            scale = _load(scales.at[slot, own], SCALES)
            values = found * lax.broadcast_in_dim(scale, found.shape, (0,)) * factor
            out[entry, own, :] = values.astype(dtype)

        cut.walk(program, step)

    shape = (slots.shape[0], *codes.shape[1:])
    grid = {"programs": cut.programs, "slots": slots.shape[0]}
    run = kernel(body, jax.ShapeDtypeStruct(shape, dtype), grid, interpret=interpret)
    return run(codes, scales, unit(a), slots)[:, :number]


def _load(ref: Any, layout: Any) -> Any:
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
