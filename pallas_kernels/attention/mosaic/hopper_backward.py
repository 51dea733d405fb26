"""Block-sparse attention backward on Hopper: one kernel for dq, one for dk and dv.

Probabilities are computed again from the forward's log-sum-exp (arXiv:2205.14135, algorithm 4), so
nothing of size [queries, keys] exists. dq walks the map of query tiles; dk and dv walk the map of
key tiles with everything transposed. Neither needs atomics: the result does not depend on timing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.attention.mosaic.columns import SINKS, seen
from pallas_kernels.attention.mosaic.hopper_forward import (
    LAYOUT,
    WARPGROUPS,
    add_product,
    column,
    product,
    row_of,
)
from pallas_kernels.attention.mosaic.parts import (
    LOG2_E,
    MASKED,
    SWIZZLED,
    Saved,
    tall,
    whole,
    wide,
)
from pallas_kernels.attention.mosaic.walk import produce, walk
from pallas_kernels.attention.tilemap import TileMap


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Rows that a warpgroup owns, rows of a step, and steps that are loaded ahead."""

    own: int = 64
    step: int = 64
    stages: int = 2

    @property
    def rows(self) -> int:
        """Rows of a block, which share their tile of the map."""
        return WARPGROUPS * self.own


def query_gradient(
    saved: Saved, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> Float[Array, "b q n d"]:
    """dq; `tiles` maps `size.rows` queries to tiles of `size.step` keys."""
    staged = (("tile", "number"), ("tile",))
    (dq,) = _call(_query_body, staged, saved, tiles, size, (saved.q,), interpret)
    return dq


def key_value_gradient(
    saved: Saved, tiles: TileMap, size: BackwardTiles, *, interpret=None
) -> tuple[Float[Array, "b k n d"], Float[Array, "b k n d"]]:
    """(dk, dv); `tiles` maps `size.rows` keys to tiles of `size.step` queries."""
    staged = (("tile", "columns", "float"), ("tile", "float"))
    return _call(_key_value_body, staged, saved, tiles, size, (saved.k, saved.v), interpret)


def _call(make_body, groups, saved: Saved, tiles: TileMap, size: BackwardTiles, like, interpret):
    """Runs a body whose steps load `groups` of parts of these kinds."""
    b, length, heads, width = like[0].shape
    own = plgpu.SMEM((WARPGROUPS, size.own, width), saved.q.dtype, transforms=SWIZZLED)
    slots = (size.stages, size.step)
    kinds = {
        "tile": plgpu.SMEM((*slots, width), saved.q.dtype, transforms=SWIZZLED),
        "number": plgpu.SMEM(slots, jnp.int32),
        "float": plgpu.SMEM(slots, jnp.float32),
        "columns": plgpu.SMEM((size.stages, SINKS + 1, size.step), jnp.int32),
    }
    used = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=size.stages)
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
    query, key = (whole(x, b) for x in (saved.columns.query, saved.columns.key))
    maps = jax.tree.map(lambda x: whole(x, b), tiles)
    return kernel(
        saved.q, saved.k, saved.v, saved.grad, saved.lse, saved.delta, query, key,
        maps.start, maps.stop, maps.full, maps.count,
    )  # fmt: skip


def _query_body(size: BackwardTiles, width: int, simulated: bool):
    shape = (size.own, size.step)

    def body(q, k, v, grad, lse, delta, query, key, start, stop, full, count, dq, **shared):
        def compute(place, rows, ranges, steps, own, staged_s, here, used):
            batch, head = place
            q_s, grad_s = own
            top, drop = (row_of(x.at[batch, head, rows]) for x in (lse, delta))
            per_row = [row_of(query.at[batch, i, rows]) for i in range(query.shape[1])]

            def step(t, slot, tile, is_full, acc):
                (k_s, code_s), (v_s,) = ((x.at[slot] for x in group) for group in staged_s)
                plgpu.barrier_wait(here[0].at[slot])
                logits = product(q_s, k_s, shape) * (width**-0.5 * LOG2_E)

                def mask():
                    code = tall(column(code_s), shape)
                    return seen(lambda i: wide(per_row[i], shape), code)

                logits = _masked(logits, is_full, mask)
                weights = jnp.exp2(logits - wide(top, shape))
                plgpu.barrier_wait(here[1].at[slot])
                to_weights = product(grad_s, v_s, shape)
                plgpu.barrier_arrive(used[1].at[slot])
                to_logits = weights * (to_weights - wide(drop, shape))
                acc = add_product(acc, to_logits.astype(k.dtype), k_s, simulated)
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
        _roles(size, (q, grad), sources, ranges, compute, **shared)

    return body


def _key_value_body(size: BackwardTiles, width: int, simulated: bool):
    shape = (size.own, size.step)

    def body(q, k, v, grad, lse, delta, query, key, start, stop, full, count, dk, dv, **shared):
        def compute(place, rows, ranges, steps, own, staged_s, here, used):
            batch, head = place
            k_s, v_s = own
            code = row_of(key.at[batch, rows])

            def step(t, slot, tile, is_full, carry):
                to_k, to_v = carry
                (q_s, columns_s, lse_s), (grad_s, delta_s) = (
                    (x.at[slot] for x in group) for group in staged_s
                )
                plgpu.barrier_wait(here[0].at[slot])
                logits = product(k_s, q_s, shape) * (width**-0.5 * LOG2_E)

                def mask():
                    return seen(lambda i: tall(column(columns_s.at[i]), shape), wide(code, shape))

                logits = _masked(logits, is_full, mask)
                weights = jnp.exp2(logits - tall(column(lse_s), shape))
                plgpu.barrier_wait(here[1].at[slot])
                to_v = add_product(to_v, weights.astype(q.dtype), grad_s, simulated)
                to_weights = product(v_s, grad_s, shape)
                to_logits = weights * (to_weights - tall(column(delta_s), shape))
                plgpu.barrier_arrive(used[1].at[slot])
                to_k = add_product(to_k, to_logits.astype(q.dtype), q_s, simulated)
                plgpu.barrier_arrive(used[0].at[slot])
                return to_k, to_v

            zeros = (_zeros(size.own, width), _zeros(size.own, width))
            to_k, to_v = walk(ranges, steps, size.stages, step, zeros)
            k_s[...] = (to_k * width**-0.5).astype(k_s.dtype)
            v_s[...] = to_v.astype(v_s.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_s, dk.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(v_s, dv.at[batch, rows, head])
            plgpu.wait_smem_to_gmem(0)

        sources = functools.partial(_query_parts, q, grad, query, lse, delta)
        ranges = (start, stop, full, count)
        _roles(size, (k, v), sources, ranges, compute, **shared)

    return body


def _masked(logits, is_full, mask):
    """Logits of visible pairs; `mask()` says which those are where a tile is not full."""
    return lax.cond(is_full, lambda x: x, lambda x: jnp.where(mask(), x, MASKED), logits)


def _query_parts(q, grad, query, lse, delta, batch, head):
    """What a step over queries loads, in the two groups in which it is needed."""
    return (
        (
            lambda part: q.at[batch, part, head],
            lambda part: query.at[batch, :, part],
            lambda part: lse.at[batch, head, part],
        ),
        (lambda part: grad.at[batch, part, head], lambda part: delta.at[batch, head, part]),
    )


def _roles(size, own, sources, ranges, compute, *, own_s, own_here, staged_s, here, used):
    """One warpgroup loads all steps; every other loads its own rows and computes."""
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
