"""Block-sparse attention forward on Hopper: wgmma, TMA, one loading and two computing warpgroups.

The structure is FlashAttention-3's (arXiv:2407.08608), over the ranges of a tile map: fully masked
tiles are skipped, and full tiles need no mask.
"""

import dataclasses

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

WARPGROUPS = 2  # computing warpgroups
LAYOUT = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile sizes of the forward kernel.

    Attributes:
      queries: queries of a warpgroup.
      keys: keys per step.
      stages: pipeline stages, i.e. steps that are loaded ahead.
    """

    queries: int = 64
    keys: int = 128
    stages: int = 2

    @property
    def rows(self) -> int:
        """Queries of a thread block, i.e. of a tile of the map."""
        return WARPGROUPS * self.queries


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
    """Output and base-2 log-sum-exp of the scaled logits; -MASKED for fully masked queries.

    Lengths must be multiples of `size.rows` and `size.keys`; `tiles` maps query tiles of
    `size.rows` to key tiles of `size.keys`.
    """
    b, length, heads, width = q.shape
    buffers = _scratch(size, width, q.dtype)
    out_type = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((b, heads, length), jnp.float32),
    )
    kernel = plgpu.kernel(
        _body(size, width, interpret is not None),
        out_type=out_type,
        grid=(heads, length // size.rows, b),
        grid_names=("head", "row", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=buffers,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        **({} if interpret is None else {"interpret": interpret}),
    )
    query, key = (broadcast_batch(x, b) for x in (columns.query, columns.key))
    ranges = jax.tree.map(lambda x: broadcast_batch(x, b), tiles)
    return kernel(q, k, v, query, key, ranges.start, ranges.stop, ranges.full, ranges.count)


def _scratch(size: ForwardTiles, width: int, dtype):
    """Scratch buffers; `here` barriers: data has arrived; `used`: a slot may be overwritten."""
    kv = plgpu.SMEM((size.stages, size.keys, width), dtype, transforms=SWIZZLED)
    used = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=size.stages)
    return {
        "own": (
            plgpu.SMEM((WARPGROUPS, size.queries, width), dtype, transforms=SWIZZLED),
            plgpu.SMEM((WARPGROUPS, size.queries), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS),
        ),
        "targets": ((kv, plgpu.SMEM((size.stages, size.keys), jnp.int32)), (kv,)),
        "here": tuple(plgpu.Barrier(num_arrivals=n, num_barriers=size.stages) for n in (2, 1)),
        "used": (used, used),
    }


def _body(size: ForwardTiles, width: int, simulated: bool):
    def body(q, k, v, query, key, start, stop, full, count, out, lse, *, own, **staged):
        # 1. The tile ranges of this thread block.
        warpgroup = lax.axis_index("warpgroup")
        head, row, batch = (lax.axis_index(name) for name in ("head", "row", "batch"))
        ranges = tuple(x.at[batch, row] for x in (start, stop, full))
        steps = count[batch, row]

        # 2. The loading warpgroup.
        @pl.when(warpgroup == WARPGROUPS)
        def _load():
            plgpu.set_max_registers(24, action="decrease")
            sources = (
                (lambda part: k.at[batch, part, head], lambda part: key.at[batch, part]),
                (lambda part: v.at[batch, part, head],),
            )
            produce(ranges, steps, size.stages, size.keys, sources, **staged)

        # 3. The computing warpgroups: attend, normalize, write.
        @pl.when(warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            base = row * size.rows + warpgroup * size.queries
            rows = pl.ds(base, size.queries)
            q_s, lse_s, arrived = (x.at[warpgroup] for x in own)
            plgpu.copy_gmem_to_smem(q.at[batch, rows, head], q_s, arrived)
            plgpu.barrier_wait(arrived)
            row_codes = [row_values(query.at[batch, i, rows]) for i in range(query.shape[1])]
            acc, top, total = _consume(
                size, width, simulated, q_s, row_codes, ranges, steps, **staged
            )
            empty = top <= MASKED
            acc = acc * per_row(jnp.where(empty, 0.0, 1 / total), acc.shape)
            q_s[...] = acc.astype(q_s.dtype)
            lse_s[...] = jnp.where(empty, -MASKED, top + jnp.log(total) * LOG2_E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_s, lse.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

    return body


def _consume(size, width, simulated, q_s, row_codes, ranges, steps, *, targets, here, used):
    """Online softmax over the tiles of all ranges.

    Returns the accumulated values, the row maxima and the row sums.
    """
    shape = (size.queries, size.keys)
    row = LAYOUT.reduce(1)
    top = plgpu.layout_cast(jnp.full(shape[:1], MASKED, jnp.float32), row)
    total = plgpu.layout_cast(jnp.zeros(shape[:1], jnp.float32), row)
    acc = plgpu.layout_cast(jnp.zeros((size.queries, width), jnp.float32), LAYOUT)

    def step(t, slot, tile, is_full, carry):
        acc, top, total = carry
        (k_s, code_s), (v_s,) = ((x.at[slot] for x in group) for group in targets)
        plgpu.barrier_wait(here[0].at[slot])
        logits = product(q_s, k_s, shape) * (width**-0.5 * LOG2_E)

        def masked(logits):
            code = per_column(col_values(code_s), shape)
            plgpu.commit_smem()  # orders this plain read before the next TMA write
            return jnp.where(
                code_mask(lambda i: per_row(row_codes[i], shape), code),
                logits,
                MASKED,
            )

        logits = lax.cond(is_full, lambda x: x, masked, logits)
        plgpu.barrier_arrive(used[0].at[slot])
        new_top = jnp.maximum(top, logits.max(axis=1))
        fade = jnp.exp2(top - new_top)
        weights = jnp.exp2(logits - per_row(new_top, shape))
        total = total * fade + weights.sum(axis=1)
        acc = acc * per_row(fade, acc.shape)
        plgpu.barrier_wait(here[1].at[slot])
        acc = add_product(acc, weights.astype(v_s.dtype), v_s, simulated)
        plgpu.barrier_arrive(used[1].at[slot])
        return acc, new_top, total

    return walk(ranges, steps, size.stages, step, (acc, top, total))


def product(left, right, shape):
    """`left @ right.T` of two tiles in shared memory, in float32 registers."""

    def run(ref):
        plgpu.wgmma(ref, left, right.transpose((1, 0)))
        return ref[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def add_product(acc, left, right, simulated: bool):
    """`acc + left @ right` with `left` in registers."""
    if simulated:  # the interpreter lacks register operands and initialised accumulators
        acc = acc + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # orders the plain read before the next TMA write
        return acc
    return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(acc))


def row_values(ref):
    """Loads one value per row of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(1), optimized=False)


def col_values(ref):
    """Loads one value per column of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(0), optimized=False)
