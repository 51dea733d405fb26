"""Block-sparse attention backward on Blackwell: dq.

A thread block holds 128 queries and visits tiles of 128 keys. The computing warpgroups share the
columns of each step, whose weights stay in registers. Meanwhile the tensor core works on the steps
before and after.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.blackwell_backward import (
    COMPUTING,
    LAYOUT,
    SHORT_STAGES,
    TILE,
    BackwardTiles,
    along_columns,
    assign_roles,
    block_position,
    column_values,
    launch,
    load,
    load_tiles,
    own_columns,
    row_values,
    slot_of,
    softmax_weights,
    staged_scratch,
    store,
    times_weights,
    write,
)
from pallas_kernels.attention.mosaic.columns import code_mask
from pallas_kernels.attention.mosaic.primitives import LOG2_E, SWIZZLED, BackwardInputs, per_row
from pallas_kernels.attention.mosaic.walk import walk
from pallas_kernels.attention.tilemap import TileMap


def query_gradient(
    saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> Float[Array, "b q n d"]:
    """dq; `tiles` maps `size.rows` queries to tiles of `size.step` keys."""
    scratch = _scratch(size, saved.q.shape[-1], saved.q.dtype)
    (dq,) = launch(_body(size), saved, tiles, size, (saved.q,), scratch, interpret)
    return dq


def _scratch(size: BackwardTiles, width: int, dtype):
    """Shared memory (`_s`), tensor memory (`_t`) and barriers.

    `here` barriers signal that a tile has arrived, `used` that its slot may be overwritten, `full`
    and `free` that a buffer has been written or read.
    """
    own = plgpu.SMEM((size.rows, width), dtype, transforms=SWIZZLED)
    product = plgpu.Barrier(orders_tensor_core=True)
    both = plgpu.Barrier(num_arrivals=COMPUTING, orders_tensor_core=True)
    logits = plgpu.TMEM((size.rows, size.step), jnp.float32)
    return staged_scratch(size, width, dtype) | {
        "own_s": (own, own),
        "own_here": plgpu.Barrier(num_arrivals=2),
        "grad_t": plgpu.TMEM((size.rows, width), dtype, packed=True),
        "grad_full": both,
        "products_t": (logits, logits),
        "products_full": (product, product),
        "products_free": (both, both),
        "d_logits_t": plgpu.TMEM((size.rows, size.step), dtype, packed=True),
        "d_logits_full": both,
        "d_logits_free": product,
        "sum_t": plgpu.TMEM((size.rows, width), jnp.float32),
        "sum_full": product,
    }


def _body(size: BackwardTiles):
    def body(q, k, v, grad, lse, delta, query, key, start, stop, full, count, order, dq, **buffers):
        # 1. The rows of this thread block.
        position = block_position(size, start, stop, full, count, order)
        head, batch, rows, ranges, steps = position
        own_s = buffers["own_s"]

        # 2. Roles.
        def load():
            load_tiles(size, position, (q, grad), (k, v), **buffers)

        def compute(parity):
            _keep_gradient(parity, **buffers)
            numbers = tuple(row_values(x.at[batch, head, rows]) for x in (lse, delta))

            def columns(i):
                return row_values(query.at[batch, i, rows])

            def codes(start, count):
                return key.at[batch, pl.ds(start, count)]

            _steps(size, q.shape[-1], parity, (ranges, steps), numbers, (columns, codes), **buffers)

            @pl.when(parity == 0)
            def _result():
                scale = q.shape[-1] ** -0.5
                write(steps, buffers["sum_t"], own_s[0], dq.at[batch, rows, head], scale)

        assign_roles(load, lambda: _products(size, steps, **buffers), compute)

    return body


def _keep_gradient(parity, *, own_s, own_here, grad_t, grad_full, **_):
    """Copies the output's gradient to tensor memory: products read it at every step.

    Operands in tensor memory save the shared memory's bandwidth.
    """
    plgpu.barrier_wait(own_here)
    for i in range(grad_t.shape[1] // TILE):

        @pl.when(parity == i % COMPUTING)
        def _copy(i=i):
            part = pl.ds(i * TILE, TILE)
            store(grad_t.at[:, part], plgpu.load(own_s[1].at[:, part], layout=LAYOUT))

    plgpu.commit_tmem()
    plgpu.barrier_arrive(grad_full)


def _products(
    size, steps, *, own_s, own_here, grad_t, grad_full, targets, here, used, products_t,
    products_full, products_free, d_logits_t, d_logits_full, d_logits_free, sum_t, sum_full,
):  # fmt: skip
    """Issues all products: of a step's two, one before and one after dq of the step before."""
    # 1. Operands and the two kinds of products.
    tiles, left = [buffers for (buffers,) in targets], (own_s[0], grad_t)
    for barrier in (own_here, grad_full):
        plgpu.barrier_wait(barrier)

    def product(i, t):
        """Logits (i = 0) or gradients of the weights (i = 1) of step `t`."""
        slot = slot_of(t, (size.stages, SHORT_STAGES)[i])
        plgpu.barrier_wait(here[i].at[slot])
        pl.when(t >= 1)(lambda: plgpu.barrier_wait(products_free[i]))
        right = tiles[i].at[slot].transpose((1, 0))
        plgpu.tcgen05_mma(products_t[i], left[i], right, accumulate=False)
        plgpu.tcgen05_commit_arrive(products_full[i])

    def add(t):
        """Adds d_logits times keys of step `t` to dq."""
        slot = slot_of(t, size.stages)
        plgpu.barrier_wait(d_logits_full)
        plgpu.tcgen05_mma(sum_t, d_logits_t, tiles[0].at[slot], accumulate=t > 0)
        plgpu.tcgen05_commit_arrive(used[0].at[slot])
        plgpu.tcgen05_commit_arrive(d_logits_free)

    # 2. Their order.
    def step(t, _):
        product(1, t)
        plgpu.tcgen05_commit_arrive(used[1].at[slot_of(t, SHORT_STAGES)])
        pl.when(t >= 1)(lambda: add(t - 1))
        pl.when(t + 1 < steps)(lambda: product(0, t + 1))

    pl.when(steps >= 1)(lambda: product(0, jnp.int32(0)))
    lax.fori_loop(0, steps, step, None)
    pl.when(steps >= 1)(lambda: add(steps - 1))
    plgpu.tcgen05_commit_arrive(sum_full)

    @pl.when(steps >= 1)
    def _last_free():
        for free in products_free:
            plgpu.barrier_wait(free)


def _steps(
    size, width, parity, visits, numbers, columns, *, products_t, products_full, products_free,
    d_logits_t, d_logits_full, d_logits_free, sum_full, **_,
):  # fmt: skip
    """Computes d_logits of every step, in this warpgroup's columns.

    `numbers` are log-sum-exp and delta of the rows; `columns` are a function from a number to that
    mask column of the rows, and one from (first key, count) to the codes of keys.
    """
    (ranges, steps), (lse, delta), (row_columns, codes) = visits, numbers, columns
    starts, piece = own_columns(size, parity)
    parts, shape = [pl.ds(start, piece) for start in starts], (size.rows, piece)

    def step(t, slot, tile, is_full, carry):
        def mask(i):
            code = column_values(codes(tile * size.step + starts[i], piece))
            code = along_columns(code, shape)
            return code_mask(lambda column: per_row(row_columns(column), shape), code)

        # 1. Weights, in registers.
        plgpu.barrier_wait(products_full[0])
        logits = [load(products_t[0].at[:, part]) for part in parts]
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(products_free[0])
        exponents = [x * (width**-0.5 * LOG2_E) - per_row(lse, shape) for x in logits]
        weights = softmax_weights(is_full, exponents, mask)

        # 2. Their gradients times the weights.
        plgpu.barrier_wait(products_full[1])
        d_weights = [load(products_t[1].at[:, part]) for part in parts]
        plgpu.wait_load_tmem()
        plgpu.barrier_arrive(products_free[1])
        pl.when(t >= 1)(lambda: plgpu.barrier_wait(d_logits_free))
        for part, x, y in zip(parts, weights, d_weights, strict=True):
            store(d_logits_t.at[:, part], times_weights(is_full, y - per_row(delta, shape), x))
        plgpu.commit_tmem()
        plgpu.barrier_arrive(d_logits_full)
        return carry

    walk(ranges, steps, 1, step, ())
    pl.when(steps >= 1)(lambda: plgpu.barrier_wait(d_logits_free))
    plgpu.barrier_wait(sum_full)
