"""Block-sparse attention forward on Blackwell: tcgen05, with all products in tensor memory.

A thread block has two tiles of 128 queries, which share the tiles of keys and values. One warp
loads tiles and one issues matrix products. Each query tile has a warpgroup that computes its
softmax, one row per thread, so that no row crosses threads. The products of one query tile run
during the softmax of the other.

The weights replace the logits in tensor memory and are read from there by the second product. The
sums stay in tensor memory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.blackwell_softmax import PIECE, mask_logits, softmax
from pallas_kernels.attention.mosaic.columns import MaskColumns
from pallas_kernels.attention.mosaic.primitives import (
    LOG2_E,
    MASKED,
    SWIZZLED,
    broadcast_batch,
    per_row,
)
from pallas_kernels.attention.mosaic.walk import produce
from pallas_kernels.attention.tilemap import TileMap

LAYOUT = plgpu.Layout.TCGEN05
CONTROL, SOFTMAX = 0, 1  # the first warpgroup, and the first of those of the query tiles
LOADER, ISSUER = range(2)  # warps of the first
TILES = 2  # query tiles of a thread block
TILE_ROWS = 128
CONTROL_REGISTERS, SOFTMAX_REGISTERS = 24, 240  # 504 for all three warpgroups
PARAMETERS = plgpu.CompilerParams(
    approx_math=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # Warps of a softmax warpgroup may branch apart, and then must not synchronize. `commit_smem`
    # and the arrival at a barrier synchronize where others read.
    unsafe_no_auto_barriers=True,
)


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile sizes of the forward kernel.

    Attributes:
      rows: queries of a thread block, in two tiles.
      keys: keys per step. Fewer than 128 are refused: a public library reports invalid instructions
        for smaller products of a single multiprocessor.
      stages: pipeline stages, i.e. steps that are loaded ahead.
    """

    rows: int = TILES * TILE_ROWS
    keys: int = 128
    stages: int = 2

    def __post_init__(self) -> None:
        if self.rows != TILES * TILE_ROWS or self.keys < 128:
            raise ValueError(f"needs {TILES * TILE_ROWS} rows and at least 128 keys, got {self}")


def forward(
    q: Float[Array, "b q n d"],
    k: Float[Array, "b k n d"],
    v: Float[Array, "b k n d"],
    columns: MaskColumns,
    tiles: TileMap,
    size: ForwardTiles,
    *,
    interpret=None,
) -> tuple[Float[Array, "b q n d"], Float[Array, "b n q"]]:
    """Computes the same as `hopper_forward.forward`."""
    b, length, heads, width = q.shape
    kernel = plgpu.kernel(
        _body(size, width),
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((b, heads, length), jnp.float32),
        ),
        grid=(heads, length // size.rows, b),
        grid_names=("head", "row", "batch"),
        num_threads=1 + TILES,
        thread_name="warpgroup",
        scratch_types=_scratch(size, width, q.dtype),
        compiler_params=PARAMETERS,
        **({} if interpret is None else {"interpret": interpret}),
    )
    query, key = (broadcast_batch(x, b) for x in (columns.query, columns.key))
    maps = jax.tree.map(lambda x: broadcast_batch(x, b), tiles)
    return kernel(
        q, k, v, query, key, maps.start, maps.stop, maps.full, maps.count, maps.order
    )  # fmt: skip


def _scratch(size: ForwardTiles, width: int, dtype):
    """Buffers and their barriers, in the order in which a step uses them.

    Names ending in `_s` are shared memory and in `_t` tensor memory. `here`, `used`, `full` and
    `done` are barriers: data has arrived, slot may be overwritten, written, read. They have one
    entry per query tile, per pipeline stage, or per tile and piece of columns.
    """
    kv = plgpu.SMEM((size.stages, size.keys, width), dtype, transforms=SWIZZLED)
    logits = plgpu.TMEM((TILE_ROWS, size.keys), jnp.float32)
    weights = plgpu.TMEM((TILE_ROWS, size.keys), dtype, packed=True)
    staged = plgpu.Barrier(num_barriers=size.stages)
    product_staged = plgpu.Barrier(num_barriers=size.stages, orders_tensor_core=True)
    by_tile = plgpu.Barrier(num_barriers=TILES, orders_tensor_core=True)
    pieces = plgpu.Barrier(num_barriers=TILES * size.keys // PIECE, orders_tensor_core=True)
    return {
        "q_s": plgpu.SMEM((TILES, TILE_ROWS, width), dtype, transforms=SWIZZLED),
        "q_here": plgpu.Barrier(num_barriers=TILES),
        "targets": ((kv,), (kv,)),
        "here": (staged, staged),
        "used": (product_staged, product_staged),
        "logits_weights_t": (plgpu.RefUnion(logits, weights),) * TILES,
        "logits_full": by_tile,
        "weights_full": pieces,
        "weights_done": by_tile,
        "sums_t": (plgpu.TMEM((TILE_ROWS, width), jnp.float32),) * TILES,
        "sums_full": by_tile,
        "row_s": plgpu.SMEM((TILES, TILE_ROWS), jnp.float32),
    }


def _body(size: ForwardTiles, width: int):
    def body(q, k, v, query, key, start, stop, full, count, order, out, lse, **buffers):
        # 1. The tile ranges and rows of this thread block.
        warpgroup = lax.axis_index("warpgroup")
        head, batch = (lax.axis_index(name) for name in ("head", "batch"))
        row = order[batch, lax.axis_index("row")]
        ranges = tuple(x.at[batch, row] for x in (start, stop, full))
        steps = count[batch, row]
        rows = [pl.ds(row * size.rows + i * TILE_ROWS, TILE_ROWS) for i in range(TILES)]

        # 2. Roles: loader and issuer warps, and the softmax warpgroup of each query tile.
        @pl.when(warpgroup == CONTROL)
        def _control():
            plgpu.set_max_registers(CONTROL_REGISTERS, action="decrease")

            @plgpu.warp_map
            def _warps(warp):
                @pl.when(warp == LOADER)
                def _load():
                    for i in range(TILES):
                        target, barrier = (buffers[name].at[i] for name in ("q_s", "q_here"))
                        plgpu.copy_gmem_to_smem(q.at[batch, rows[i], head], target, barrier)
                    groups = (
                        (lambda part: k.at[batch, part, head],),
                        (lambda part: v.at[batch, part, head],),
                    )
                    parts = (buffers[name] for name in ("targets", "here", "used"))
                    produce(ranges, steps, size.stages, size.keys, groups, *parts)

                @pl.when(warp == ISSUER)
                def _issue():
                    _products(size, steps, **buffers)

        for i in range(TILES):

            @pl.when(warpgroup == SOFTMAX + i)
            def _softmax(i=i):
                plgpu.set_max_registers(SOFTMAX_REGISTERS, action="increase")
                mask = functools.partial(
                    mask_logits, size, query.at[batch, :, rows[i]], key.at[batch]
                )
                results = out.at[batch, rows[i], head], lse.at[batch, head, rows[i]]
                _tile_rows(size, width, i, mask, ranges, steps, *results, **buffers)

    return body


def _products(size, steps, **buffers):
    """Issues all products: after the weighted values of a tile the logits of its next step."""
    here, used = buffers["here"], buffers["used"]

    # 1. The first logits, which no product precedes.
    for tile in range(TILES):
        plgpu.barrier_wait(buffers["q_here"].at[tile])

    @pl.when(steps >= 1)
    def _first_logits():
        plgpu.barrier_wait(here[0].at[0])
        for tile in range(TILES):
            _issue_logits(tile, 0, **buffers)
        plgpu.tcgen05_commit_arrive(used[0].at[0])

    # 2. The values of each step, and the logits of the next if there is one.
    def step(t, _):
        slot, next_slot = (lax.rem(x, jnp.int32(size.stages)) for x in (t, t + 1))
        plgpu.barrier_wait(here[1].at[slot])
        for tile in range(TILES):
            _issue_values(t, tile, slot, **buffers)
            if tile == TILES - 1:
                plgpu.tcgen05_commit_arrive(used[1].at[slot])

            @pl.when(t + 1 < steps)
            def _next_logits(tile=tile):
                done = buffers["weights_done"].at[tile]
                plgpu.tcgen05_commit_arrive(done)
                if tile == 0:
                    plgpu.barrier_wait(here[0].at[next_slot])
                plgpu.barrier_wait(done)  # the logits replace the weights
                _issue_logits(tile, next_slot, **buffers)
                if tile == TILES - 1:
                    plgpu.tcgen05_commit_arrive(used[0].at[next_slot])

    lax.fori_loop(0, steps, step, None)

    # 3. The sums of all steps are complete; without steps, the queries have at least arrived.
    for tile in range(TILES):
        plgpu.tcgen05_commit_arrive(buffers["sums_full"].at[tile])


def _issue_logits(tile, slot, *, q_s, targets, logits_weights_t, logits_full, **_):
    logits_t, _ = logits_weights_t[tile]
    k_s = targets[0][0].at[slot].transpose((1, 0))
    plgpu.tcgen05_mma(logits_t, q_s.at[tile], k_s, accumulate=False)
    plgpu.tcgen05_commit_arrive(logits_full.at[tile])


def _issue_values(t, tile, slot, *, targets, logits_weights_t, weights_full, sums_t, **_):
    _, weights_t = logits_weights_t[tile]
    for i, full in enumerate(_of_tile(weights_full, tile)):
        plgpu.barrier_wait(full)
        piece = pl.ds(i * PIECE, PIECE)
        v_s = targets[1][0].at[slot, piece]
        plgpu.tcgen05_mma(sums_t[tile], weights_t.at[:, piece], v_s, accumulate=(t > 0) | (i > 0))


def _of_tile(barriers, tile):
    """The entries of a query tile among barriers that have several for each."""
    count = barriers.shape[0] // TILES
    return [barriers.at[tile * count + i] for i in range(count)]


def _tile_rows(
    size, width, tile, mask, ranges, steps, out, lse, *, q_s, logits_weights_t, logits_full,
    weights_full, sums_t, sums_full, row_s, **_,
):  # fmt: skip
    """Computes the weights of a query tile in every step, then its output and log-sum-exp."""
    # 1. All steps.
    shift, total = softmax(
        size, width, mask, ranges, steps, sums_t=sums_t[tile],
        logits_weights_t=logits_weights_t[tile], logits_full=logits_full.at[tile],
        weights_full=_of_tile(weights_full, tile),
    )  # fmt: skip
    empty = total == 0
    norm = jnp.where(empty, 0.0, 1 / total)

    # 2. The output, through the buffer of the queries, which nothing writes or reads any more.
    plgpu.barrier_wait(sums_full.at[tile])
    row_s.at[tile][...] = norm
    plgpu.commit_smem()
    norm = plgpu.load(row_s.at[tile], layout=LAYOUT.reduce(1), optimized=False)
    out_s = q_s.at[tile]
    zeros = plgpu.layout_cast(jnp.zeros((TILE_ROWS, PIECE), jnp.float32), LAYOUT)
    for i in range(width // PIECE):
        columns = pl.ds(i * PIECE, PIECE)
        sums = plgpu.async_load_tmem(sums_t[tile].at[:, columns], layout=LAYOUT)
        scaled = sums * per_row(norm, sums.shape)
        # Without steps the tensor memory is uninitialised.
        out_s.at[:, columns][...] = lax.select(steps > 0, scaled, zeros).astype(out_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_s, out)

    # 3. The log-sum-exp.
    row_s.at[tile][...] = jnp.where(empty, -MASKED, shift + jnp.log(total) * LOG2_E)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(row_s.at[tile], lse)
    plgpu.wait_smem_to_gmem(0)
