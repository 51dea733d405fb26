"""Block-sparse attention backward on Blackwell: one kernel for dq, one for dk and dv.

The algorithm is that of `hopper_backward` with other roles. One warp loads tiles and one issues
matrix products. Two warpgroups alternate steps; each turns the logits of its step into operands of
the gradient products, which accumulate in tensor memory. The products of the next step overlap the
computation of the current one. Neither kernel uses atomics, so results are deterministic.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.blackwell_forward import (
    CONTROL,
    ISSUER,
    LAYOUT,
    LOADER,
    PIECE,
    drain,
    load,
    overlapped,
    row_values,
    slots,
)
from pallas_kernels.attention.mosaic.columns import GLOBAL_SINKS, code_mask
from pallas_kernels.attention.mosaic.primitives import (
    LOG2_E,
    MASKED,
    SWIZZLED,
    BackwardInputs,
    broadcast_batch,
    per_column,
    per_row,
)
from pallas_kernels.attention.mosaic.walk import produce, walk
from pallas_kernels.attention.tilemap import TileMap

COMPUTING = 2  # computing warpgroups; each takes every second step
CONTROL_REGISTERS, COMPUTE_REGISTERS = 96, 208  # 512 for all three warpgroups


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile sizes of the backward kernels.

    Attributes:
      rows: rows of a thread block.
      step: rows of the other operand per step.
      stages: pipeline stages, i.e. steps that are loaded ahead.
    """

    rows: int = 128
    step: int = 64
    stages: int = 2


def query_gradient(
    saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> Float[Array, "b q n d"]:
    """dq; `tiles` maps `size.rows` queries to tiles of `size.step` keys."""
    (dq,) = _call(_query_body, ("number",), saved, tiles, size, (saved.q,), interpret)
    return dq


def key_value_gradient(
    saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"]]:
    """(dk, dv); `tiles` maps `size.rows` keys to tiles of `size.step` queries."""
    numbers = ("columns", "float", "float")
    return _call(_key_value_body, numbers, saved, tiles, size, (saved.k, saved.v), interpret)


def _call(
    make_body, numbers, saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, like, interpret
):
    """Launches a kernel whose steps load two tiles and per-row values of the kinds `numbers`."""
    b, length, heads, width = like[0].shape
    kernel = plgpu.kernel(
        make_body(size, width),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
        grid=(heads, length // size.rows, b),
        grid_names=("head", "row", "batch"),
        num_threads=1 + COMPUTING,
        thread_name="warpgroup",
        scratch_types=_scratch(size, width, saved.q.dtype, numbers, len(like)),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    query, key = (broadcast_batch(x, b) for x in (saved.columns.query, saved.columns.key))
    maps = jax.tree.map(lambda x: broadcast_batch(x, b), tiles)
    return kernel(
        saved.q, saved.k, saved.v, saved.grad, saved.lse, saved.delta, query, key,
        maps.start, maps.stop, maps.full, maps.count,
    )  # fmt: skip


def _scratch(size: BackwardTiles, width: int, dtype, numbers, sums: int):
    """Shared memory (`_s`), tensor memory (`_t`) and barriers.

    `here` barriers signal that a tile has arrived, `used` that its slot may be overwritten.
    """
    # 1. Buffers in shared memory.
    own = plgpu.SMEM((size.rows, width), dtype, transforms=SWIZZLED)
    tile = plgpu.SMEM((size.stages, size.step, width), dtype, transforms=SWIZZLED)
    kinds = {
        "number": plgpu.SMEM((size.stages, size.step), jnp.int32),
        "float": plgpu.SMEM((size.stages, size.step), jnp.float32),
        "columns": plgpu.SMEM((size.stages, GLOBAL_SINKS + 1, size.step), jnp.int32),
    }
    operand = plgpu.SMEM((COMPUTING, size.rows, size.step), dtype, transforms=SWIZZLED)

    # 2. Barriers, one per pipeline stage or per computing warpgroup.
    def staged(arrivals: int):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=size.stages)

    products_staged = plgpu.Barrier(num_barriers=size.stages, orders_tensor_core=True)
    products = plgpu.Barrier(num_barriers=COMPUTING, orders_tensor_core=True)
    return {
        "own_s": (own, own),
        "own_here": plgpu.Barrier(num_arrivals=2),
        "targets": ((tile,), (tile,), tuple(kinds[kind] for kind in numbers)),
        "here": (staged(1), staged(1), staged(len(numbers))),
        "used": (products_staged, products_staged, staged(COMPUTING)),
        "products_t": (plgpu.TMEM((size.rows, COMPUTING * size.step), jnp.float32),) * 2,
        "products_full": (products, products),
        "products_free": products,
        "operands_s": (operand,) * sums,
        "operands_full": plgpu.Barrier(num_barriers=COMPUTING),
        "operands_free": products,
        "sums_t": (plgpu.TMEM((size.rows, width), jnp.float32),) * sums,
        "sums_full": plgpu.Barrier(orders_tensor_core=True),
    }


def _query_body(size: BackwardTiles, width: int):
    shape = (size.rows, size.step)

    def body(q, k, v, grad, lse, delta, query, key, start, stop, full, count, dq, **buffers):
        batch, head, rows = _block_position(size)

        # Per-row values of the block, kept in registers.
        def prepare():
            top, row_delta = (row_values(x.at[batch, head, rows]) for x in (lse, delta))
            row_codes = [row_values(query.at[batch, i, rows]) for i in range(query.shape[1])]

            def softmax_weights(logits, is_full, code_s):
                def masked(logits):
                    mask = code_mask(
                        lambda i: per_row(row_codes[i], shape), _load_columns(code_s, shape)
                    )
                    return jnp.where(mask, logits, MASKED)

                logits = lax.cond(is_full, lambda x: x, masked, logits)
                return jnp.exp2(logits - per_row(top, shape))

            def subtract_delta(d_weights, code_s):
                return d_weights - per_row(row_delta, shape)

            return softmax_weights, subtract_delta

        # Tiles of a step, and where the sum goes.
        groups = (
            (lambda part: k.at[batch, part, head],),
            (lambda part: v.at[batch, part, head],),
            (lambda part: key.at[batch, part],),
        )
        results = ((dq.at[batch, rows, head], width**-0.5),)
        own = tuple(x.at[batch, rows, head] for x in (q, grad))
        _roles(size, width, own, groups, (start, stop, full, count), prepare, results, **buffers)

    return body


def _key_value_body(size: BackwardTiles, width: int):
    shape = (size.rows, size.step)

    def body(q, k, v, grad, lse, delta, query, key, start, stop, full, count, dk, dv, **buffers):
        batch, head, rows = _block_position(size)

        # Per-row values of the block, kept in registers.
        def prepare():
            code = row_values(key.at[batch, rows])

            def softmax_weights(logits, is_full, columns_s, lse_s, delta_s):
                def masked(logits):
                    mask = code_mask(
                        lambda i: _load_columns(columns_s.at[i], shape),
                        per_row(code, shape),
                    )
                    return jnp.where(mask, logits, MASKED)

                logits = lax.cond(is_full, lambda x: x, masked, logits)
                return jnp.exp2(logits - _load_columns(lse_s, shape))

            def subtract_delta(d_weights, columns_s, lse_s, delta_s):
                return d_weights - _load_columns(delta_s, shape)

            return softmax_weights, subtract_delta

        # Tiles of a step, and where the sums go.
        groups = (
            (lambda part: q.at[batch, part, head],),
            (lambda part: grad.at[batch, part, head],),
            (
                lambda part: query.at[batch, :, part],
                lambda part: lse.at[batch, head, part],
                lambda part: delta.at[batch, head, part],
            ),
        )
        results = ((dk.at[batch, rows, head], width**-0.5), (dv.at[batch, rows, head], 1.0))
        own = tuple(x.at[batch, rows, head] for x in (k, v))
        _roles(size, width, own, groups, (start, stop, full, count), prepare, results, **buffers)

    return body


def _block_position(size: BackwardTiles):
    """Batch, head and rows of this thread block."""
    head, row, batch = (lax.axis_index(name) for name in ("head", "row", "batch"))
    return batch, head, pl.ds(row * size.rows, size.rows)


def _roles(
    size: BackwardTiles, width: int, own, groups, maps, prepare: Callable, results, **buffers
):
    """Assigns the roles in a thread block of `own` rows; a step loads the sources in `groups`.

    `prepare()` loads the block's per-row values and returns `softmax_weights(logits, is_full,
    *numbers)` and `subtract_delta(d_weights, *numbers)`. `results` are (output, scale) of each sum.
    """
    # 1. The tile ranges of this block.
    warpgroup = lax.axis_index("warpgroup")
    row, batch = (lax.axis_index(name) for name in ("row", "batch"))
    *parts, count = maps
    ranges = tuple(x.at[batch, row] for x in parts)
    steps = count[batch, row]

    # 2. Loader and issuer warps.
    @pl.when(warpgroup == CONTROL)
    def _control():
        plgpu.set_max_registers(CONTROL_REGISTERS, action="decrease")

        @plgpu.warp_map
        def _warps(warp):
            @pl.when(warp == LOADER)
            def _load():
                for source, target in zip(own, buffers["own_s"], strict=True):
                    plgpu.copy_gmem_to_smem(source, target, buffers["own_here"])
                staged = (buffers[name] for name in ("targets", "here", "used"))
                produce(ranges, steps, size.stages, size.step, groups, *staged)

            @pl.when(warp == ISSUER)
            def _issue():
                _products(size, steps, **buffers)

    # 3. Computing warpgroups, which also write the results.
    @pl.when(warpgroup != CONTROL)
    def _compute():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        parity = warpgroup - 1
        _steps(size, width, parity, ranges, steps, *prepare(), **buffers)
        for i, (out, scale) in enumerate(results):

            @pl.when(parity == i)
            def _result(i=i, out=out, scale=scale):
                _write(size, width, steps, buffers["sums_t"][i], buffers["own_s"][i], out, scale)


def _products(
    size, steps, *, own_s, own_here, targets, here, used, products_t, products_full, products_free,
    operands_s, operands_full, operands_free, sums_t, sums_full, **_,
):  # fmt: skip
    """Issues all products: those of step t + 1 before the gradient products of step t."""
    tiles = [group[0] for group in targets[:2]]
    plgpu.barrier_wait(own_here)

    def products(t):
        slot, half = slots(t, size.stages)

        @pl.when(t >= COMPUTING)
        def _wait_products_free():
            plgpu.barrier_wait(products_free.at[half])

        for i, (left, right) in enumerate(zip(own_s, tiles, strict=True)):
            plgpu.barrier_wait(here[i].at[slot])
            target = products_t[i].at[:, pl.ds(half * size.step, size.step)]
            right = right.at[slot].transpose((1, 0))
            plgpu.tcgen05_mma(target, left, right, products_full[i].at[half], accumulate=False)
        for free in used[len(sums_t) : 2]:  # tiles that no sum reads
            plgpu.tcgen05_commit_arrive(free.at[slot])

    def sums(t):
        slot, half = slots(t, size.stages)
        plgpu.barrier_wait(operands_full.at[half])
        for i, target in enumerate(sums_t):
            left, right = operands_s[i].at[half], tiles[i].at[slot]
            plgpu.tcgen05_mma(target, left, right, used[i].at[slot], accumulate=t > 0)
        plgpu.tcgen05_commit_arrive(operands_free.at[half])

    overlapped(steps, products, sums)
    plgpu.tcgen05_commit_arrive(sums_full)
    drain(steps, products_free)


def _steps(
    size, width, parity, ranges, steps, softmax_weights, subtract_delta, *, targets, here, used,
    products_t, products_full, products_free, operands_s, operands_full, operands_free, sums_full,
    **_,
):  # fmt: skip
    """Computes the operands of the gradient products in every second step, from step `parity`."""
    columns = pl.ds(parity * size.step, size.step)

    def step(t, slot, tile, is_full, carry):
        plgpu.barrier_wait(here[2].at[slot])

        @pl.when(lax.rem(t, jnp.int32(COMPUTING)) == parity)
        def _mine():
            numbers = [x.at[slot] for x in targets[2]]
            plgpu.barrier_wait(products_full[0].at[parity])
            logits = load(products_t[0].at[:, columns]) * (width**-0.5 * LOG2_E)
            weights = softmax_weights(logits, is_full, *numbers)

            @pl.when(t >= COMPUTING)
            def _wait_operands_free():
                plgpu.barrier_wait(operands_free.at[parity])

            for target in operands_s[1:]:
                target.at[parity][...] = weights.astype(target.dtype)
            plgpu.barrier_wait(products_full[1].at[parity])
            d_weights = load(products_t[1].at[:, columns])
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(products_free.at[parity])
            d_logits = weights * subtract_delta(d_weights, *numbers)
            operands_s[0].at[parity][...] = d_logits.astype(operands_s[0].dtype)
            plgpu.commit_smem()  # also orders the plain reads of numbers before the next TMA write
            plgpu.barrier_arrive(operands_full.at[parity])

        plgpu.barrier_arrive(used[2].at[slot])
        return carry

    walk(ranges, steps, size.stages, step, ())

    @pl.when(steps > parity)
    def _last_operands_free():
        plgpu.barrier_wait(operands_free.at[parity])

    plgpu.barrier_wait(sums_full)


def _write(size, width, steps, sum_t, own_s, out, scale):
    """Writes a scaled sum to global memory through `own_s`, which no product reads any more.

    Without steps the tensor memory is uninitialised, and zeros are written.
    """
    zeros = plgpu.layout_cast(jnp.zeros((size.rows, PIECE), jnp.float32), LAYOUT)
    for i in range(width // PIECE):
        columns = pl.ds(i * PIECE, PIECE)
        values = lax.cond(
            steps > 0, lambda x: x * scale, lambda x: zeros, load(sum_t.at[:, columns])
        )
        own_s.at[:, columns][...] = values.astype(own_s.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own_s, out)
    plgpu.wait_smem_to_gmem(0)


def _load_columns(ref, shape):
    """Per-column values, broadcast to all rows."""
    numbers = plgpu.load(ref, layout=LAYOUT.reduce(0), optimized=False)
    # A single row of values would be inferred to have Hopper's layout.
    return plgpu.layout_cast(per_column(numbers, shape), LAYOUT)
