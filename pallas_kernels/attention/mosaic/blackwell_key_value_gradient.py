"""Block-sparse attention backward on Blackwell: dk and dv.

A thread block holds 128 keys and visits tiles of 128 queries. All products have keys as rows, so
that weights and d_logits are left operands in tensor memory, where they replace the products that
they are computed from. The computing warpgroups share the columns of each step.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.blackwell_backward import (
    COMPUTING,
    PARTS,
    SHORT_STAGES,
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
    walk_ahead,
    write,
)
from pallas_kernels.attention.mosaic.columns import code_mask
from pallas_kernels.attention.mosaic.primitives import LOG2_E, SWIZZLED, BackwardInputs, per_row
from pallas_kernels.attention.tilemap import TileMap


def key_value_gradient(
    saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"]]:
    """(dk, dv); `tiles` maps `size.rows` keys to tiles of `size.step` queries."""
    scratch = _scratch(size, saved.q.shape[-1], saved.q.dtype)
    dk, dv = launch(_body(size), saved, tiles, size, (saved.k, saved.v), scratch, interpret)
    return dk, dv


def _scratch(size: BackwardTiles, width: int, dtype):
    """Shared memory (`_s`), tensor memory (`_t`) and barriers.

    `here` barriers signal that a tile has arrived, `used` that its slot may be overwritten, `full`
    and `free` that a buffer has been written or read, `read` that both warpgroups have read it.
    """
    own = plgpu.SMEM((size.rows, width), dtype, transforms=SWIZZLED)
    product_and_operand = plgpu.RefUnion(
        plgpu.TMEM((size.rows, size.step), jnp.float32),
        plgpu.TMEM((size.rows, size.step), dtype, packed=True),
    )
    product = plgpu.Barrier(orders_tensor_core=True)
    both = plgpu.Barrier(num_arrivals=COMPUTING, orders_tensor_core=True)
    parts = plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=PARTS, orders_tensor_core=True)
    return staged_scratch(size, width, dtype) | {
        "own_s": (own, own),
        "own_here": plgpu.Barrier(num_arrivals=2),
        "logits": product_and_operand,
        "logits_full": product,
        "logits_read": both,
        "weights_full": parts,
        "weights_free": product,
        "d_weights": product_and_operand,
        "d_weights_full": product,
        "d_weights_read": both,
        "d_logits_full": both,
        "d_logits_free": product,
        "sums_t": (plgpu.TMEM((size.rows, width), jnp.float32),) * 2,
        "sums_full": product,
    }


def _body(size: BackwardTiles):
    def body(
        q, k, v, grad, lse, delta, query, key, start, stop, full, count, order, dk, dv, **buffers
    ):
        # 1. The rows of this thread block.
        position = block_position(size, start, stop, full, count, order)
        head, batch, rows, ranges, steps = position
        own_s = buffers["own_s"]

        # 2. Roles.
        def load():
            load_tiles(size, position, (k, v), (q, grad), **buffers)

        def compute(parity):
            code = row_values(key.at[batch, rows])

            def columns(i, start, count):
                return query.at[batch, i, pl.ds(start, count)]

            numbers = lse.at[batch, head], delta.at[batch, head]
            _steps(size, q.shape[-1], parity, (ranges, steps), numbers, (code, columns), **buffers)
            for i, (out, scale) in enumerate(((dk, q.shape[-1] ** -0.5), (dv, 1.0))):

                @pl.when(parity == i)
                def _result(i=i, out=out, scale=scale):
                    write(steps, buffers["sums_t"][i], own_s[i], out.at[batch, rows, head], scale)

        assign_roles(load, lambda: _products(size, steps, **buffers), compute)

    return body


def _products(size, steps, *, own_here, weights_free, d_logits_free, sums_full, **buffers):
    """Issues all products.

    The order is dk of the step before, the gradients of the weights, dv, and the logits of the step
    after: the tensor core works on the first two during the exponentials of this step, and on the
    last two while d_logits are computed.
    """
    buffers |= {"weights_free": weights_free, "d_logits_free": d_logits_free}
    plgpu.barrier_wait(own_here)

    def step(t, _):
        pl.when(t >= 1)(lambda: _add_dk(size, t - 1, **buffers))
        _d_weights(t, **buffers)
        _add_dv(size, t, **buffers)
        pl.when(t + 1 < steps)(lambda: _logits(size, t + 1, **buffers))

    pl.when(steps >= 1)(lambda: _logits(size, jnp.int32(0), **buffers))
    lax.fori_loop(0, steps, step, None)

    # Every phase of a barrier is observed.
    @pl.when(steps >= 1)
    def _last():
        _add_dk(size, steps - 1, **buffers)
        for free in (weights_free, d_logits_free):
            plgpu.barrier_wait(free)

    plgpu.tcgen05_commit_arrive(sums_full)


def _logits(size, t, *, own_s, targets, here, logits, logits_full, weights_free, **_):
    """Keys times queries of step `t`, over the weights of the step before."""
    slot = slot_of(t, size.stages)
    plgpu.barrier_wait(here[0].at[slot])
    pl.when(t >= 1)(lambda: plgpu.barrier_wait(weights_free))
    right = targets[0][0].at[slot].transpose((1, 0))
    plgpu.tcgen05_mma(logits[0], own_s[0], right, accumulate=False)
    plgpu.tcgen05_commit_arrive(logits_full)


def _d_weights(t, *, own_s, targets, here, d_weights, d_weights_full, d_logits_free, **_):
    """Values times gradients of step `t`, over the d_logits of the step before."""
    slot = slot_of(t, SHORT_STAGES)
    plgpu.barrier_wait(here[1].at[slot])
    pl.when(t >= 1)(lambda: plgpu.barrier_wait(d_logits_free))
    right = targets[1][0].at[slot].transpose((1, 0))
    plgpu.tcgen05_mma(d_weights[0], own_s[1], right, accumulate=False)
    plgpu.tcgen05_commit_arrive(d_weights_full)


def _add_dv(size, t, *, targets, used, logits, weights_full, weights_free, sums_t, **_):
    """Adds weights times gradients of step `t` to dv, each part as soon as it is there."""
    slot = slot_of(t, SHORT_STAGES)
    for i in range(PARTS):
        part = pl.ds(i * (size.step // PARTS), size.step // PARTS)
        plgpu.barrier_wait(weights_full.at[i])
        left, right = logits[1].at[:, part], targets[1][0].at[slot, part]
        plgpu.tcgen05_mma(sums_t[1], left, right, accumulate=(t > 0) if i == 0 else True)
    plgpu.tcgen05_commit_arrive(used[1].at[slot])
    plgpu.tcgen05_commit_arrive(weights_free)


def _add_dk(size, t, *, targets, used, d_weights, d_logits_full, d_logits_free, sums_t, **_):
    """Adds d_logits times queries of step `t` to dk."""
    slot = slot_of(t, size.stages)
    plgpu.barrier_wait(d_logits_full)
    plgpu.tcgen05_mma(sums_t[0], d_weights[1], targets[0][0].at[slot], accumulate=t > 0)
    plgpu.tcgen05_commit_arrive(used[0].at[slot])
    plgpu.tcgen05_commit_arrive(d_logits_free)


def _steps(size, width, parity, visits, numbers, mask_columns, *, sums_full, **buffers):
    """Computes weights and d_logits of every step, in this warpgroup's columns of each part.

    `numbers` are log-sum-exp and delta of all queries; `mask_columns` are the codes of the rows'
    keys, and a function from (column number, first query, count) to a mask column of queries.
    """
    (ranges, steps), (code, query_columns) = visits, mask_columns
    starts, piece = own_columns(size, parity)
    parts, shape = [pl.ds(start, piece) for start in starts], (size.rows, piece)

    # Numbers of the columns of a tile.
    def fetch(tile):
        queries = [pl.ds(tile * size.step + start, piece) for start in starts]
        return tuple(tuple(column_values(x.at[part]) for part in queries) for x in numbers)

    def step(t, tile, is_full, fetched):
        lse, delta = fetched

        def mask(i):
            def column(j):
                queries = query_columns(j, tile * size.step + starts[i], piece)
                return along_columns(column_values(queries), shape)

            return code_mask(column, per_row(code, shape))

        scale = width**-0.5 * LOG2_E
        weights = _pass_weights(parts, shape, scale, lse, is_full, mask, **buffers)
        _pass_d_logits(parts, shape, weights, delta, is_full, **buffers)

    walk_ahead(ranges, steps, numbers[0].shape[0] // size.step, fetch, step)
    plgpu.barrier_wait(sums_full)


def _pass_weights(
    parts, shape, scale, lse, is_full, mask, *, logits, logits_full, logits_read, weights_full, **_
) -> list:
    """Passes the weights of a step to the products, one part after the other; returns them."""
    logits_t, weights_t = logits
    plgpu.barrier_wait(logits_full)
    products = _read(logits_t, parts, logits_read)
    exponents = [x * scale - along_columns(y, shape) for x, y in zip(products, lse, strict=True)]
    weights = softmax_weights(is_full, exponents, mask)
    plgpu.barrier_wait(logits_read)
    for i, (part, x) in enumerate(zip(parts, weights, strict=True)):
        store(weights_t.at[:, part], x)
        plgpu.commit_tmem()
        plgpu.barrier_arrive(weights_full.at[i])
    return weights


def _pass_d_logits(
    parts, shape, weights, delta, is_full, *, d_weights, d_weights_full, d_weights_read,
    d_logits_full, **_,
) -> None:  # fmt: skip
    """Passes the gradients of the logits to the products: those of the weights, times these."""
    d_weights_t, d_logits_t = d_weights
    plgpu.barrier_wait(d_weights_full)
    products = _read(d_weights_t, parts, d_weights_read)
    d_logits = [
        times_weights(is_full, y - along_columns(z, shape), x)
        for x, y, z in zip(weights, products, delta, strict=True)
    ]
    plgpu.barrier_wait(d_weights_read)
    for part, x in zip(parts, d_logits, strict=True):
        store(d_logits_t.at[:, part], x)
    plgpu.commit_tmem()
    plgpu.barrier_arrive(d_logits_full)


def _read(product_t, parts, barrier) -> list:
    """This warpgroup's columns of a product; both have read theirs before one overwrites it."""
    columns = [load(product_t.at[:, part]) for part in parts]
    plgpu.wait_load_tmem()
    plgpu.barrier_arrive(barrier)
    return columns
