"""Block-sparse attention forward on Blackwell: tcgen05 and tensor memory, with four roles.

One warp loads tiles, one issues matrix products, one warpgroup computes the softmax, and another
accumulates the weighted values. The accumulator must be rescaled whenever the running maximum
changes; doing so in registers keeps the tensor core busy. The logits of the next tile are computed
during the softmax of the current one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.columns import MaskColumns, code_mask
from pallas_kernels.attention.mosaic.primitives import (
    LOG2_E,
    MASKED,
    SWIZZLED,
    broadcast_batch,
    per_column,
    per_row,
)
from pallas_kernels.attention.mosaic.walk import produce, walk
from pallas_kernels.attention.tilemap import TileMap

LAYOUT = plgpu.Layout.TCGEN05
CONTROL, SOFTMAX, GATHER = range(3)  # warpgroups
LOADER, ISSUER = range(2)  # warps of the first
PIECE = 64  # output columns handled at once: one swizzled tile
PARAMETERS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile sizes of the forward kernel.

    Attributes:
      rows: queries of a thread block.
      keys: keys per step.
      stages: pipeline stages, i.e. steps that are loaded ahead.
    """

    rows: int = 128
    keys: int = 64
    stages: int = 2


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
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=_scratch(size, width, q.dtype),
        compiler_params=PARAMETERS,
        **({} if interpret is None else {"interpret": interpret}),
    )
    query, key = (broadcast_batch(x, b) for x in (columns.query, columns.key))
    maps = jax.tree.map(lambda x: broadcast_batch(x, b), tiles)
    return kernel(q, k, v, query, key, maps.start, maps.stop, maps.full, maps.count)


def _scratch(size: ForwardTiles, width: int, dtype):
    kv = plgpu.SMEM((size.stages, size.keys, width), dtype, transforms=SWIZZLED)
    codes = plgpu.SMEM((size.stages, size.keys), jnp.int32)
    return {"targets": ((kv,), (kv,), (codes,))} | scratch(size, width, dtype)


def scratch(size, width: int, dtype, *, masks: int = 1):
    """Scratch of a forward pass, without the tiles of keys, values and mask columns.

    Names ending in `_s` are shared memory and in `_t` tensor memory. `here`, `used`, `full` and
    `free` are barriers: data has arrived, slot may be overwritten, written, read. `masks` copies
    fill the mask columns of a step.
    """
    once, staged = plgpu.Barrier(), plgpu.Barrier(num_barriers=size.stages)
    twice = plgpu.Barrier(num_barriers=2)
    product = plgpu.Barrier(orders_tensor_core=True)
    product_staged = plgpu.Barrier(num_barriers=size.stages, orders_tensor_core=True)
    product_twice = plgpu.Barrier(num_barriers=2, orders_tensor_core=True)
    # Buffers and their barriers, in the order in which a step uses them.
    return {
        "q_s": plgpu.SMEM((size.rows, width), dtype, transforms=SWIZZLED),
        "q_here": once,
        "here": (staged, staged, plgpu.Barrier(num_arrivals=masks, num_barriers=size.stages)),
        "used": (product_staged, product_staged, staged),
        "logits_t": plgpu.TMEM((size.rows, 2 * size.keys), jnp.float32),
        "logits_full": product_twice,
        "logits_free": product_twice,
        "weights_s": plgpu.SMEM((size.rows, size.keys), dtype, transforms=SWIZZLED),
        "weights_full": once,
        "weights_free": product,
        "values_t": plgpu.TMEM((size.rows, 2 * width), jnp.float32),
        "values_full": product_twice,
        "values_free": product_twice,
        "fade_s": plgpu.SMEM((2, size.rows), jnp.float32),
        "fade_full": twice,
        "fade_free": twice,
        "norm_s": plgpu.SMEM((size.rows,), jnp.float32),
        "norm_full": once,
        "lse_s": plgpu.SMEM((size.rows,), jnp.float32),
    }


def _body(size: ForwardTiles, width: int):
    def body(q, k, v, query, key, start, stop, full, count, out, lse, **buffers):
        # 1. The tile ranges and rows of this thread block.
        warpgroup = lax.axis_index("warpgroup")
        head, row, batch = (lax.axis_index(name) for name in ("head", "row", "batch"))
        ranges = tuple(x.at[batch, row] for x in (start, stop, full))
        steps = count[batch, row]
        rows = pl.ds(row * size.rows, size.rows)

        # 2. Roles: loader and issuer warps, softmax warpgroup, accumulating warpgroup.
        @pl.when(warpgroup == CONTROL)
        def _control():
            plgpu.set_max_registers(64, action="decrease")

            @plgpu.warp_map
            def _warps(warp):
                @pl.when(warp == LOADER)
                def _load():
                    plgpu.copy_gmem_to_smem(
                        q.at[batch, rows, head], buffers["q_s"], buffers["q_here"]
                    )
                    groups = (
                        (lambda part: k.at[batch, part, head],),
                        (lambda part: v.at[batch, part, head],),
                        (lambda part: key.at[batch, part],),
                    )
                    parts = (buffers[name] for name in ("targets", "here", "used"))
                    produce(ranges, steps, size.stages, size.keys, groups, *parts)

                @pl.when(warp == ISSUER)
                def _issue():
                    products(size, width, steps, **buffers)

        @pl.when(warpgroup == SOFTMAX)
        def _softmax():
            plgpu.set_max_registers(216, action="increase")
            columns = query.at[batch, :, rows]
            softmax(size, width, columns, ranges, steps, lse.at[batch, head, rows], **buffers)

        @pl.when(warpgroup == GATHER)
        def _gather():
            plgpu.set_max_registers(216, action="increase")
            gather(size, width, steps, out.at[batch, rows, head], **buffers)

    return body


def products(
    size, width, steps, *, q_s, q_here, targets, here, used, logits_t, logits_full, logits_free,
    weights_s, weights_full, weights_free, values_t, values_full, values_free, **_,
):  # fmt: skip
    """Issues all products: the logits of step t + 1 before the weighted values of step t."""
    (k_s,), (v_s,), _ = targets
    plgpu.barrier_wait(q_here)

    # First product of a step: queries times keys.
    def logits(t):
        slot, half = slots(t, size.stages)
        plgpu.barrier_wait(here[0].at[slot])

        @pl.when(t >= 2)
        def _wait_logits_free():
            plgpu.barrier_wait(logits_free.at[half])

        target = logits_t.at[:, pl.ds(half * size.keys, size.keys)]
        plgpu.tcgen05_mma(
            target, q_s, k_s.at[slot].transpose((1, 0)), used[0].at[slot], accumulate=False
        )
        plgpu.tcgen05_commit_arrive(logits_full.at[half])

    # Second product of a step: weights times values.
    def values(t):
        slot, half = slots(t, size.stages)
        plgpu.barrier_wait(here[1].at[slot])
        plgpu.barrier_wait(weights_full)

        @pl.when(t >= 2)
        def _wait_values_free():
            plgpu.barrier_wait(values_free.at[half])

        target = values_t.at[:, pl.ds(half * width, width)]
        plgpu.tcgen05_mma(target, weights_s, v_s.at[slot], used[1].at[slot], accumulate=False)
        plgpu.tcgen05_commit_arrive(weights_free)
        plgpu.tcgen05_commit_arrive(values_full.at[half])

    overlapped(steps, logits, values)
    drain(steps, logits_free, values_free)


def softmax(size, width, query, ranges, steps, lse, *, norm_s, norm_full, lse_s, **buffers):
    """Computes the weights of every step, then the normalizer and the log-sum-exp."""
    columns = [row_values(query.at[i]) for i in range(query.shape[0])]
    top, total = _weights(size, width, columns, ranges, steps, **buffers)
    empty = top <= MASKED
    norm_s[...] = jnp.where(empty, 0.0, 1 / total)
    plgpu.barrier_arrive(norm_full)
    lse_s[...] = jnp.where(empty, -MASKED, top + jnp.log(total) * LOG2_E)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(lse_s, lse)
    plgpu.wait_smem_to_gmem(0)


def _weights(
    size, width, columns, ranges, steps, *, weights_s, weights_full, weights_free, fade_s,
    fade_full, fade_free, **buffers,
):  # fmt: skip
    """Online softmax over the tiles of all ranges; returns row maxima and row sums."""
    shape = (size.rows, size.keys)
    start = (jnp.full(shape[:1], MASKED, jnp.float32), jnp.zeros(shape[:1], jnp.float32))

    def step(t, slot, tile, is_full, carry):
        # 1. Weights relative to the new maximum; `fade` rescales the earlier sums.
        top, total = carry
        half = lax.rem(t, jnp.int32(2))
        logits = _logits(size, width, columns, (slot, half), is_full, **buffers)
        new_top = jnp.maximum(top, logits.max(axis=1))
        fade = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits - per_row(new_top, shape))
        total = total * fade + weights.sum(axis=1)

        # 2. Pass the rescaling factor to the accumulating warpgroup, the weights to the products.
        @pl.when(t >= 2)
        def _wait_fade_free():
            plgpu.barrier_wait(fade_free.at[half])

        fade_s.at[half][...] = fade
        plgpu.barrier_arrive(fade_full.at[half])

        @pl.when(t >= 1)
        def _wait_weights_free():
            plgpu.barrier_wait(weights_free)

        weights_s[...] = weights.astype(weights_s.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(weights_full)
        return new_top, total

    top, total = walk(ranges, steps, size.stages, step, _rows(start))

    @pl.when(steps >= 1)
    def _last_weights_free():
        plgpu.barrier_wait(weights_free)

    drain(steps, fade_free)
    return top, total


def _logits(
    size, width, columns, at, is_full, *, targets, here, used, logits_t, logits_full, logits_free,
    **_,
):  # fmt: skip
    """The masked logits of a step, times log2 e.

    An optional second target holds a shift that the tile adds to the logits of each row.
    """
    slot, half = at
    plgpu.barrier_wait(logits_full.at[half])
    logits = load(logits_t.at[:, pl.ds(half * size.keys, size.keys)])
    plgpu.wait_load_tmem()
    plgpu.barrier_arrive(logits_free.at[half])
    logits = logits * (width**-0.5 * LOG2_E)
    plgpu.barrier_wait(here[2].at[slot])
    code_s, *shift_s = (x.at[slot] for x in targets[2])
    if shift_s:
        logits = logits + per_row(row_values(shift_s[0]), logits.shape)
        plgpu.commit_smem()  # as in _masked
    mask = functools.partial(_masked, columns=columns, code_s=code_s)
    logits = lax.cond(is_full, lambda x: x, mask, logits)
    plgpu.barrier_arrive(used[2].at[slot])
    return logits


def _rows(arrays):
    """Arrays with one value per row, in the row layout."""
    return tuple(plgpu.layout_cast(x, LAYOUT.reduce(1)) for x in arrays)


def _masked(logits, *, columns, code_s):
    code = plgpu.load(code_s, layout=LAYOUT.reduce(0), optimized=False)
    plgpu.commit_smem()  # orders this plain read before the next TMA write
    # A single row of codes would be inferred to have Hopper's layout.
    code = plgpu.layout_cast(per_column(code, logits.shape), LAYOUT)
    mask = code_mask(lambda i: per_row(columns[i], logits.shape), code)
    return jnp.where(mask, logits, MASKED)


def overlapped(steps, first, second):
    """Software pipelining: calls `second(t)` of each step after `first(t + 1)`."""

    def step(t, _):
        first(t)

        @pl.when(t >= 1)
        def _previous():
            second(t - 1)

    lax.fori_loop(0, steps, step, None)

    @pl.when(steps >= 1)
    def _last():
        second(steps - 1)


def drain(steps, *barriers):
    """Waits for the last use of both buffers, so that every barrier phase is observed."""

    @pl.loop(0, lax.min(steps, jnp.int32(2)))
    def _wait(i):
        half = lax.rem(lax.max(steps - 2, jnp.int32(0)) + i, jnp.int32(2))
        for barrier in barriers:
            plgpu.barrier_wait(barrier.at[half])


def gather(
    size, width, steps, out, *, q_s, values_t, values_full, values_free,
    fade_s, fade_full, fade_free, norm_s, norm_full, **_,
):  # fmt: skip
    """Accumulates the weighted values of all steps and writes the output."""
    shape = (size.rows, PIECE)
    zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), LAYOUT)

    def step(t, sums):
        half = lax.rem(t, jnp.int32(2))
        plgpu.barrier_wait(fade_full.at[half])
        fade = row_values(fade_s.at[half])
        plgpu.barrier_arrive(fade_free.at[half])
        plgpu.barrier_wait(values_full.at[half])
        sums = tuple(
            x * per_row(fade, shape) + load(values_t.at[:, pl.ds(half * width + i * PIECE, PIECE)])
            for i, x in enumerate(sums)
        )
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(values_free.at[half])
        return sums

    sums = lax.fori_loop(0, steps, step, (zeros,) * (width // PIECE))
    plgpu.barrier_wait(norm_full)
    norm = row_values(norm_s)
    # All products are finished, so the queries' buffer can be reused.
    for i, x in enumerate(sums):
        q_s.at[:, pl.ds(i * PIECE, PIECE)][...] = (x * per_row(norm, shape)).astype(q_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_s, out)
    plgpu.wait_smem_to_gmem(0)


def slots(t, stages: int):
    """The pipeline slot and the buffer half of step `t`."""
    return lax.rem(t, jnp.int32(stages)), lax.rem(t, jnp.int32(2))


def load(ref):
    """Loads from tensor memory in the tcgen05 layout."""
    return plgpu.async_load_tmem(ref, layout=LAYOUT)


def row_values(ref):
    """Loads one value per row of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(1), optimized=False)
