"""Attention forward on Blackwell over keys and values in NVFP4.

The roles are those of `blackwell_forward` plus a warpgroup that unpacks. The codes and scales of a
tile of keys and of the same tile of values are loaded packed, converted to bfloat16 in registers,
and stored to shared memory, where the products read them. Unpacked values never reach global
memory. Key and value tiles are stacked, 64 + 64 rows, so that every thread owns one row.

Unpacking a tile takes about 370 instructions in each of four warps (counted in the compiled code),
about as many as the softmax of 128 queries, while the products of a tile last 512 cycles. On paper
the kernel therefore saves memory rather than time: it is bound by instruction issue, at about half
the rate of the products.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.blackwell_forward import (
    ISSUER,
    LOADER,
    PARAMETERS,
    PIECE,
    gather,
    products,
    scratch,
    softmax,
)
from pallas_kernels.attention.mosaic.columns import MaskColumns
from pallas_kernels.attention.mosaic.primitives import (
    SWIZZLED,
    broadcast_batch,
    per_row,
    swizzled,
)
from pallas_kernels.attention.mosaic.walk import produce, walk
from pallas_kernels.attention.tilemap import TileMap
from pallas_kernels.nvfp4.format import BLOCK, CODE_DTYPE, SCALE_DTYPE

CONTROL, SOFTMAX, GATHER, UNPACK = range(4)  # warpgroups
REGISTERS = {CONTROL: 40, SOFTMAX: 192, GATHER: 184, UNPACK: 96}  # 512 for all warpgroups
ROW = plgpu.Layout.TCGEN05_TMEM_NATIVE  # one row per thread; the argument is the vector length
WORD, VECTOR = 32, 8  # codes in 16 bytes, bfloat16 values in 16 bytes


@dataclasses.dataclass(frozen=True)
class PackedTiles:
    """Tile sizes of the kernel.

    Attributes:
      rows: queries of a thread block.
      keys: keys per step.
      stages: pipeline stages, i.e. steps that are loaded ahead.
    """

    rows: int = 128
    keys: int = 64
    stages: int = 3


@flax.struct.dataclass
class PackedKeysValues:
    """The packed keys and values in the layout that the kernel reads.

    Attributes:
      k: codes of the keys.
      v: codes of the values.
      scales: block scales by tile; for each block of 16 columns those of the keys, then those of
        the values.
      global_scale: `amax / (M2 * M3)` of the keys and of the values of each slot.
      shift: what the offset of a slot adds to the logits of each query, times log2 e; or None.
    """

    k: Float[Array, "b k n d"]
    v: Float[Array, "b k n d"]
    scales: Float[Array, "b n tiles d/16 2*keys"]
    global_scale: Float[Array, "b slots 2"]
    shift: Float[Array, "b n slots q"] | None


def forward(
    q: Float[Array, "b q n d"],
    past: PackedKeysValues,
    columns: MaskColumns,
    tiles: TileMap,
    size: PackedTiles,
    *,
    interpret=None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b n q"]]:
    """Output and base-2 log-sum-exp, as `blackwell_forward.forward`.

    Queries must fill whole tiles, and slots whole tiles of keys.
    """
    b, length, heads, width = q.shape
    kernel = plgpu.kernel(
        _body(size, width, past.k.shape[1] // size.keys // past.global_scale.shape[1]),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((b, heads, length), jnp.float32),
        ),
        grid=(heads, length // size.rows, b),
        grid_names=("head", "row", "batch"),
        num_threads=len(REGISTERS),
        thread_name="warpgroup",
        scratch_types=_scratch(size, width, q.dtype, shifted=past.shift is not None),
        compiler_params=PARAMETERS,
        **({} if interpret is None else {"interpret": interpret}),
    )
    query, key = (broadcast_batch(x, b) for x in (columns.query, columns.key))
    maps = jax.tree.map(lambda x: broadcast_batch(x, b), tiles)
    return kernel(q, past, query, key, maps)


def _scratch(size: PackedTiles, width: int, dtype, *, shifted: bool):
    stages, kv_rows = size.stages, 2 * size.keys
    per_key = [plgpu.SMEM((stages, size.keys), jnp.int32)]
    if shifted:
        per_key.append(plgpu.SMEM((stages, size.rows), jnp.float32))
    return {
        "kv_s": plgpu.SMEM((stages, kv_rows, width), dtype, transforms=SWIZZLED),
        # Swizzled, so that eight threads reading a row each do not conflict in a bank.
        "codes_s": plgpu.SMEM((stages, kv_rows, width), CODE_DTYPE, transforms=swizzled(width, 4)),
        "scales_s": plgpu.SMEM((stages, width // BLOCK, kv_rows), SCALE_DTYPE),
        "per_key": tuple(per_key),
        "packed_here": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "packed_used": plgpu.Barrier(num_barriers=stages),
    } | scratch(size, width, dtype, masks=len(per_key))


def _body(size: PackedTiles, width: int, slot_tiles: int):
    def body(q, past, query, key, maps, out, lse, *, kv_s, per_key, **buffers):
        warpgroup = lax.axis_index("warpgroup")
        head, row, batch = (lax.axis_index(name) for name in ("head", "row", "batch"))
        ranges = tuple(x.at[batch, row] for x in (maps.start, maps.stop, maps.full))
        steps = maps.count[batch, row]
        rows = pl.ds(row * size.rows, size.rows)
        k_s, v_s = (kv_s.at[:, pl.ds(i * size.keys, size.keys)] for i in range(2))
        buffers["targets"] = (k_s,), (v_s,), per_key

        @pl.when(warpgroup == CONTROL)  # the loader and issuer warps; then one role per warpgroup
        def _control():
            plgpu.set_max_registers(REGISTERS[CONTROL], action="decrease")

            @plgpu.warp_map
            def _warps(warp):
                @pl.when(warp == LOADER)
                def _load():
                    source = q.at[batch, rows, head]
                    plgpu.copy_gmem_to_smem(source, buffers["q_s"], buffers["q_here"])
                    sources = _sources(past, key, size, slot_tiles, (batch, head, rows))
                    _load_tiles(ranges, steps, size, sources, **buffers)

                @pl.when(warp == ISSUER)
                def _issue():
                    products(size, width, steps, **buffers)

        @pl.when(warpgroup == SOFTMAX)
        def _softmax():
            plgpu.set_max_registers(REGISTERS[SOFTMAX], action="increase")
            columns = query.at[batch, :, rows]
            softmax(size, width, columns, ranges, steps, lse.at[batch, head, rows], **buffers)

        @pl.when(warpgroup == GATHER)
        def _gather():
            plgpu.set_max_registers(REGISTERS[GATHER], action="increase")
            gather(size, width, steps, out.at[batch, rows, head], **buffers)

        @pl.when(warpgroup == UNPACK)
        def _unpack():
            plgpu.set_max_registers(REGISTERS[UNPACK], action="decrease")
            factors = lambda tile: past.global_scale.at[batch, lax.div(tile, jnp.int32(slot_tiles))]  # noqa: E731
            _unpack_tiles(size, width, ranges, steps, factors, kv_s, **buffers)

    return body


def _sources(past, key, size: PackedTiles, slot_tiles: int, position):
    """Sources of a tile: the packed group, then the mask group."""
    batch, head, rows = position

    def tile(part):
        return lax.div(part.start, jnp.int32(size.keys))

    packed = (
        lambda part: past.k.at[batch, part, head],
        lambda part: past.v.at[batch, part, head],
        lambda part: past.scales.at[batch, head, tile(part)],
    )
    mask = [lambda part: key.at[batch, part]]
    if past.shift is not None:
        slot = lambda part: lax.div(tile(part), jnp.int32(slot_tiles))  # noqa: E731
        mask.append(lambda part: past.shift.at[batch, head, slot(part), rows])
    return packed, mask


def _load_tiles(
    ranges, steps, size, sources, *, codes_s, scales_s, targets, packed_here, packed_used, here,
    used, **_,
):  # fmt: skip
    halves = (codes_s.at[:, pl.ds(i * size.keys, size.keys)] for i in range(2))
    places = (*halves, scales_s), targets[2]
    arrived, free = (packed_here, here[2]), (packed_used, used[2])
    produce(ranges, steps, size.stages, size.keys, sources, places, arrived, free)


def _unpack_tiles(
    size, width, ranges, steps, factors, kv_s, *, codes_s, scales_s, packed_here, packed_used, here,
    used, **_,
):  # fmt: skip
    """Converts every packed tile to bfloat16 once its buffer is free."""
    kv_rows = 2 * size.keys
    row = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (kv_rows,), 0), ROW(VECTOR).reduce(1))

    def step(t, slot, tile, is_full, carry):
        # 1. Wait for the packed tile and for a free buffer.
        slot_scales = factors(tile)
        factor = jnp.where(row < size.keys, slot_scales[0], slot_scales[1])
        plgpu.barrier_wait(packed_here.at[slot])

        @pl.when(t >= size.stages)
        def _wait_free():
            plgpu.barrier_wait(used[0].at[slot])
            plgpu.barrier_wait(used[1].at[slot])

        # 2. Dequantize it block by block.
        codes = plgpu.load(codes_s.at[slot], layout=ROW(WORD), optimized=False)
        codes = plgpu.layout_cast(codes, ROW(VECTOR))
        for column in range(0, width, PIECE):
            blocks = [
                _unpacked(codes[:, i : i + BLOCK], scales_s.at[slot, i // BLOCK], factor)
                for i in range(column, column + PIECE, BLOCK)
            ]
            kv_s.at[slot, :, pl.ds(column, PIECE)][...] = jnp.concatenate(blocks, axis=1).astype(
                kv_s.dtype
            )
        plgpu.commit_smem()
        for barrier in (packed_used, here[0], here[1]):
            plgpu.barrier_arrive(barrier.at[slot])
        return carry

    walk(ranges, steps, size.stages, step, ())

    @pl.loop(0, lax.min(steps, jnp.int32(size.stages)))
    def _drain(i):
        slot = lax.rem(lax.max(steps - size.stages, jnp.int32(0)) + i, jnp.int32(size.stages))
        plgpu.barrier_wait(used[0].at[slot])
        plgpu.barrier_wait(used[1].at[slot])


def _unpacked(codes, scale_s, factor):
    """Dequantizes one block of 16 columns to float32."""
    scale = plgpu.load(scale_s, layout=ROW(VECTOR).reduce(1), optimized=False)
    scale = scale.astype(jnp.float32) * factor
    return codes.astype(jnp.float32) * plgpu.layout_cast(per_row(scale, codes.shape), ROW(VECTOR))
