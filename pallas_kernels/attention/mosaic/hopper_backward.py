"""Block-sparse attention backward on Hopper: one kernel for dq, one for dk and dv.

Probabilities are recomputed from the forward pass's log-sum-exp (arXiv:2205.14135, algorithm 4), so
no [queries, keys] array is materialized. The dq kernel walks the map of query tiles; the dk and dv
kernel walks the map of key tiles, with everything transposed. Neither uses atomics, so results are
deterministic.
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
from pallas_kernels.attention.mosaic.hopper_forward import (
    LAYOUT,
    WARPGROUPS,
    add_product,
    col_values,
    product,
    row_values,
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
      stages: pipeline stages, i.e. steps that are loaded ahead.
    """

    own: int = 64
    step: int = 64
    stages: int = 2

    @property
    def rows(self) -> int:
        """Rows of a thread block, i.e. of a tile of the map."""
        return WARPGROUPS * self.own


def query_gradient(
    saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> Float[Array, "b q n d"]:
    """dq; `tiles` maps `size.rows` queries to tiles of `size.step` keys."""
    staged = (("tile", "number"), ("tile",))
    (dq,) = _call(_query_body, staged, saved, tiles, size, (saved.q,), interpret)
    return dq


def key_value_gradient(
    saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"]]:
    """(dk, dv); `tiles` maps `size.rows` keys to tiles of `size.step` queries."""
    staged = (("tile", "columns", "float"), ("tile", "float"))
    return _call(_key_value_body, staged, saved, tiles, size, (saved.k, saved.v), interpret)


def _call(
    make_body, groups, saved: BackwardInputs, tiles: TileMap, size: BackwardTiles, like, interpret
):
    """Launches a kernel whose steps load `groups` of buffers of the given kinds."""
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
    used = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=size.stages)
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
            "staged_s": tuple(tuple(kinds[kind] for kind in group) for group in groups),
            "here": tuple(
                plgpu.Barrier(num_arrivals=len(group), num_barriers=size.stages) for group in groups
            ),
            "used": (used, used),
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
        maps.start, maps.stop, maps.full, maps.count,
    )  # fmt: skip


def _query_body(size: BackwardTiles, width: int, simulated: bool):
    shape = (size.own, size.step)

    def body(q, k, v, grad, lse, delta, query, key, start, stop, full, count, dq, **buffers):
        def compute(position, rows, ranges, steps, own, tiles, here, used):
            batch, head = position
            q_s, grad_s = own
            top, row_delta = (row_values(x.at[batch, head, rows]) for x in (lse, delta))
            row_codes = [row_values(query.at[batch, i, rows]) for i in range(query.shape[1])]

            def step(t, slot, tile, is_full, acc):  # dq += weights * (grad @ v^T - delta) @ k
                (k_s, code_s), (v_s,) = ((x.at[slot] for x in group) for group in tiles)
                plgpu.barrier_wait(here[0].at[slot])
                logits = product(q_s, k_s, shape) * (width**-0.5 * LOG2_E)

                def mask():
                    code = per_column(col_values(code_s), shape)
                    return code_mask(lambda i: per_row(row_codes[i], shape), code)

                logits = _masked(logits, is_full, mask)
                weights = jnp.exp2(logits - per_row(top, shape))
                plgpu.barrier_wait(here[1].at[slot])
                d_weights = product(grad_s, v_s, shape)
                plgpu.barrier_arrive(used[1].at[slot])
                d_logits = weights * (d_weights - per_row(row_delta, shape))
                acc = add_product(acc, d_logits.astype(k.dtype), k_s, simulated)
                plgpu.barrier_arrive(used[0].at[slot])
                return acc

            acc = walk(ranges, steps, size.stages, step, _zeros(size.own, width))
            q_s[...] = (acc * width**-0.5).astype(q_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, dq.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        def sources(batch, head):
            return (
                (lambda part: k.at[batch, part, head], lambda part: key.at[batch, part]),
                (lambda part: v.at[batch, part, head],),
            )

        ranges = (start, stop, full, count)
        _roles(size, (q, grad), sources, ranges, compute, **buffers)

    return body


def _key_value_body(size: BackwardTiles, width: int, simulated: bool):
    shape = (size.own, size.step)

    def body(q, k, v, grad, lse, delta, query, key, start, stop, full, count, dk, dv, **buffers):
        def compute(position, rows, ranges, steps, own, tiles, here, used):
            batch, head = position
            k_s, v_s = own
            code = row_values(key.at[batch, rows])

            def step(t, slot, tile, is_full, carry):  # dv += weights @ grad, dk += d_logits @ q
                dk_sum, dv_sum = carry
                (q_s, code_s, lse_s), (grad_s, delta_s) = ((x.at[slot] for x in g) for g in tiles)
                plgpu.barrier_wait(here[0].at[slot])
                logits = product(k_s, q_s, shape) * (width**-0.5 * LOG2_E)

                def mask():
                    return code_mask(
                        lambda i: per_column(col_values(code_s.at[i]), shape), per_row(code, shape)
                    )

                logits = _masked(logits, is_full, mask)
                weights = jnp.exp2(logits - per_column(col_values(lse_s), shape))
                plgpu.barrier_wait(here[1].at[slot])
                dv_sum = add_product(dv_sum, weights.astype(q.dtype), grad_s, simulated)
                d_weights = product(v_s, grad_s, shape)
                d_logits = weights * (d_weights - per_column(col_values(delta_s), shape))
                plgpu.barrier_arrive(used[1].at[slot])
                dk_sum = add_product(dk_sum, d_logits.astype(q.dtype), q_s, simulated)
                plgpu.barrier_arrive(used[0].at[slot])
                return dk_sum, dv_sum

            zeros = (_zeros(size.own, width), _zeros(size.own, width))
            dk_sum, dv_sum = walk(ranges, steps, size.stages, step, zeros)
            k_s[...] = (dk_sum * width**-0.5).astype(k_s.dtype)
            v_s[...] = dv_sum.astype(v_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_s, dk.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(v_s, dv.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        sources = functools.partial(_query_parts, q, grad, query, lse, delta)
        ranges = (start, stop, full, count)
        _roles(size, (k, v), sources, ranges, compute, **buffers)

    return body


def _masked(logits, is_full, mask):
    """Masks the logits of a tile that is not full; `mask()` computes the mask."""
    return lax.cond(is_full, lambda x: x, lambda x: jnp.where(mask(), x, MASKED), logits)


def _query_parts(q, grad, query, lse, delta, batch, head):
    """Sources of a step over queries, in two groups that are loaded separately."""
    return (
        (
            lambda part: q.at[batch, part, head],
            lambda part: query.at[batch, :, part],
            lambda part: lse.at[batch, head, part],
        ),
        (lambda part: grad.at[batch, part, head], lambda part: delta.at[batch, head, part]),
    )


def _roles(size, own, sources, ranges, compute, *, own_s, own_here, staged_s, here, used):
    """Assigns the roles: one warpgroup loads all steps; the others load their rows and compute."""
    warpgroup = lax.axis_index("warpgroup")
    head, row, batch = (lax.axis_index(name) for name in ("head", "row", "batch"))
    *parts, count = ranges
    parts = tuple(x.at[batch, row] for x in parts)
    steps = count[batch, row]

    @pl.when(warpgroup == WARPGROUPS)
    def _load():
        plgpu.set_max_registers(24, action="decrease")
        groups = sources(batch, head)
        produce(parts, steps, size.stages, size.step, groups, staged_s, here, used)

    @pl.when(warpgroup < WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        rows = pl.ds(row * size.rows + warpgroup * size.own, size.own)
        targets = [x.at[warpgroup] for x in own_s]
        arrived = own_here.at[warpgroup]
        for source, target in zip(own, targets, strict=True):
            plgpu.copy_gmem_to_smem(source.at[batch, rows, head], target, arrived)
        plgpu.barrier_wait(arrived)
        compute((batch, head), rows, parts, steps, targets, staged_s, here, used)


def _zeros(rows: int, width: int):
    return plgpu.layout_cast(jnp.zeros((rows, width), jnp.float32), LAYOUT)
