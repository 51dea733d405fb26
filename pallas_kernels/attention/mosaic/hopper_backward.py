"""Block-sparse attention backward on Hopper: one kernel for dq, one for dk and dv.

Probabilities are recomputed from the forward pass's log-sum-exp (arXiv:2205.14135, algorithm 4), so
no [queries, keys] array is materialized. The dq kernel walks the map of query tiles; the dk and dv
kernel walks the map of key tiles, with everything transposed. Neither uses atomics, so results are
deterministic. A step issues both of its first products together and computes its weights while the
second is in flight.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.columns import GLOBAL_SINKS, code_mask
from pallas_kernels.attention.mosaic.hopper_forward import WARPGROUPS
from pallas_kernels.attention.mosaic.hopper_products import (
    add_products,
    await_slot,
    col_values,
    product_pair,
    row_values,
    zeros,
)
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


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile sizes of the backward kernels.

    Attributes:
      own: rows of a warpgroup.
      step: rows of the other operand per step.
      stages: pipeline stages, i.e. steps that are loaded ahead; at least two.
    """

    own: int = 64
    step: int = 64
    stages: int = 3

    @property
    def rows(self) -> int:
        """Rows of a thread block, i.e. of a tile of the map."""
        return WARPGROUPS * self.own


def query_gradient(
    saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> Float[Array, "b q n d"]:
    """dq; `tiles` maps `size.rows` queries to tiles of `size.step` keys."""
    staged = ("tile", "number", "tile")
    (dq,) = _call(_query_body, staged, saved, tiles, size, (saved.q,), interpret)
    return dq


def key_value_gradient(
    saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"]]:
    """(dk, dv); `tiles` maps `size.rows` keys to tiles of `size.step` queries."""
    staged = ("tile", "columns", "float", "tile", "float")
    return _call(_key_value_body, staged, saved, tiles, size, (saved.k, saved.v), interpret)


def _call(
    make_body, staged, saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, like, interpret
):
    """Launches a kernel whose steps load buffers of the kinds `staged`."""
    # 1. Buffers of each kind.
    b, length, heads, width = like[0].shape
    own = plgpu.SMEM((WARPGROUPS, size.own, width), saved.q.dtype, transforms=SWIZZLED)
    slots = (size.stages, size.step)
    kinds = {
        "tile": plgpu.SMEM((*slots, width), saved.q.dtype, transforms=SWIZZLED),
        "number": plgpu.SMEM(slots, jnp.int32),
        "float": plgpu.SMEM(slots, jnp.float32),
        "columns": plgpu.SMEM((size.stages, GLOBAL_SINKS + 1, size.step), jnp.int32),
    }
    # 2. The kernel. `here` barriers: data has arrived; `used`: a slot may be overwritten.
    kernel = plgpu.kernel(
        make_body(size, width, interpret is not None),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
        grid=(heads, length // size.rows, b),
        grid_names=("head", "row", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types={
            "own_s": (own, own),
            "own_here": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
            "staged_s": tuple(kinds[kind] for kind in staged),
            "here": plgpu.Barrier(num_arrivals=len(staged), num_barriers=size.stages),
            "used": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=size.stages),
            "turn": plgpu.Barrier(num_barriers=WARPGROUPS),
        },
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    query, key = (broadcast_batch(x, b) for x in (saved.columns.query, saved.columns.key))
    maps = jax.tree.map(lambda x: broadcast_batch(x, b), tiles)
    return kernel(
        saved.q, saved.k, saved.v, saved.grad, saved.lse, saved.delta, query, key,
        maps.start, maps.stop, maps.full, maps.count, maps.order,
    )  # fmt: skip


def _query_body(size: BackwardTiles, width: int, simulated: bool):
    shape = (size.own, size.step)

    def body(q, k, v, grad, lse, delta, query, key, start, stop, full, count, order, dq, **buffers):
        def compute(position, rows, ranges, steps, own, tiles, pair, used):
            batch, head = position
            q_s = own[0]
            top, row_delta = (row_values(x.at[batch, head, rows]) for x in (lse, delta))
            row_codes = [row_values(query.at[batch, i, rows]) for i in range(query.shape[1])]

            def step(t, slot, tile, is_full, acc):  # dq += weights * (grad @ v^T - delta) @ k
                k_s, code_s, v_s = (x.at[slot] for x in tiles)

                def mask():
                    code = per_column(col_values(code_s), shape)
                    return code_mask(lambda i: per_row(row_codes[i], shape), code)

                weights, d_weights = pair(t, (k_s, v_s), is_full, mask, lambda: per_row(top, shape))
                d_logits = (weights * (d_weights - per_row(row_delta, shape))).astype(k.dtype)
                (acc,) = add_products((acc, d_logits, k_s), simulated=simulated)
                plgpu.barrier_arrive(used.at[slot])
                return acc

            acc = walk(ranges, steps, size.stages, step, zeros((size.own, width)))
            q_s[...] = (acc * width**-0.5).astype(q_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, dq.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        def sources(batch, head):
            return (
                lambda part: k.at[batch, part, head],
                lambda part: key.at[batch, part],
                lambda part: v.at[batch, part, head],
            )

        ranges = (start, stop, full, count, order)
        _roles(size, width, simulated, (q, grad), sources, ranges, compute, **buffers)

    return body


def _key_value_body(size: BackwardTiles, width: int, simulated: bool):
    shape = (size.own, size.step)

    def columns(ref):
        return per_column(col_values(ref), shape)

    def body(
        q, k, v, grad, lse, delta, query, key, start, stop, full, count, order, dk, dv, **buffers
    ):
        def compute(position, rows, ranges, steps, own, tiles, pair, used):
            batch, head = position
            k_s, v_s = own
            code = row_values(key.at[batch, rows])

            def step(t, slot, tile, is_full, carry):  # dv += weights @ grad, dk += d_logits @ q
                dk_sum, dv_sum = carry
                q_s, code_s, lse_s, grad_s, delta_s = (x.at[slot] for x in tiles)

                def mask():
                    return code_mask(lambda i: columns(code_s.at[i]), per_row(code, shape))

                weights, d_weights = pair(t, (q_s, grad_s), is_full, mask, lambda: columns(lse_s))
                d_logits = weights * (d_weights - columns(delta_s))
                dv_sum, dk_sum = add_products(
                    (dv_sum, weights.astype(q.dtype), grad_s),
                    (dk_sum, d_logits.astype(q.dtype), q_s),
                    simulated=simulated,
                )
                plgpu.barrier_arrive(used.at[slot])
                return dk_sum, dv_sum

            sums = (zeros((size.own, width)), zeros((size.own, width)))
            dk_sum, dv_sum = walk(ranges, steps, size.stages, step, sums)
            k_s[...] = (dk_sum * width**-0.5).astype(k_s.dtype)
            v_s[...] = dv_sum.astype(v_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_s, dk.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(v_s, dv.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        sources = functools.partial(_query_parts, q, grad, query, lse, delta)
        ranges = (start, stop, full, count, order)
        _roles(size, width, simulated, (k, v), sources, ranges, compute, **buffers)

    return body


def _pair(size: BackwardTiles, width: int, simulated: bool, steps, own_s, here, turn):
    """The first half of a step: the weights and their gradient, from the step's two tiles.

    The warpgroups take turns to issue, so that one computes weights while the other multiplies.
    """
    warpgroup = lax.axis_index("warpgroup")

    def run(t, right, is_full, mask, top):
        def beside(logits):
            # Scaled before the mask, not in a multiply-add: rounding must be that of `top`.
            logits = logits * (width**-0.5 * LOG2_E)
            logits = lax.cond(is_full, lambda x: x, lambda x: jnp.where(mask(), x, MASKED), logits)
            weights = jnp.exp2(logits - top())
            await_slot(here, t + 1, steps, size.stages)  # the tiles of the next step
            return weights

        # The barrier keeps the tiles' descriptors from being hoisted: they would fill registers.
        first, second = (x.at[lax.optimization_barrier(warpgroup)] for x in own_s)
        plgpu.barrier_wait(turn.at[warpgroup])
        return product_pair(
            (first, right[0]),
            (second, right[1]),
            lambda: plgpu.barrier_arrive(turn.at[1 - warpgroup]),
            beside,
            simulated=simulated,
        )

    return run


def _query_parts(q, grad, query, lse, delta, batch, head):
    """Sources of a step over queries."""
    return (
        lambda part: q.at[batch, part, head],
        lambda part: query.at[batch, :, part],
        lambda part: lse.at[batch, head, part],
        lambda part: grad.at[batch, part, head],
        lambda part: delta.at[batch, head, part],
    )


def _roles(
    size, width, simulated, own, sources, ranges, compute,
    *, own_s, own_here, staged_s, here, used, turn,
):  # fmt: skip
    """Assigns the roles: one warpgroup loads all steps; the others load their rows and compute."""
    # 1. The tile ranges of this thread block.
    warpgroup = lax.axis_index("warpgroup")
    head, place, batch = (lax.axis_index(name) for name in ("head", "row", "batch"))
    *parts, count, order = ranges
    row = order[batch, place]
    parts = tuple(x.at[batch, row] for x in parts)
    steps = count[batch, row]

    # 2. The loading warpgroup.
    @pl.when(warpgroup == WARPGROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        loads = sources(batch, head)
        produce(parts, steps, size.stages, size.step, (loads,), (staged_s,), (here,), (used,))

    # 3. The computing warpgroups.
    @pl.when(warpgroup < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        rows = pl.ds(row * size.rows + warpgroup * size.own, size.own)
        targets = [x.at[warpgroup] for x in own_s]
        arrived = own_here.at[warpgroup]
        for source, target in zip(own, targets, strict=True):
            plgpu.copy_gmem_to_smem(source.at[batch, rows, head], target, arrived)
        plgpu.barrier_wait(arrived)
        await_slot(here, 0, steps, size.stages)
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        pair = _pair(size, width, simulated, steps, own_s, here, turn)
        compute((batch, head), rows, parts, steps, targets, staged_s, pair, used)
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
