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
from pallas_kernels.attention.mosaic.hopper_products import (
    LAYOUT,
    add_products,
    await_slot,
    col_values,
    product,
    product_and_sum,
    row_values,
    zeros,
)
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
BLIND = MASKED / 2
"""Row maximum of queries that have seen no key: below all logits, above masked ones."""


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile sizes of the forward kernel.

    Attributes:
      queries: queries of a warpgroup.
      keys: keys per step.
      stages: pipeline stages, i.e. steps that are loaded ahead; at least two.
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
    maps = jax.tree.map(lambda x: broadcast_batch(x, b), tiles)
    return kernel(
        q, k, v, query, key, maps.start, maps.stop, maps.full, maps.count, maps.order
    )  # fmt: skip


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
        "turn": plgpu.Barrier(num_barriers=WARPGROUPS),
    }


def _body(size: ForwardTiles, width: int, simulated: bool):
    def body(q, k, v, query, key, start, stop, full, count, order, out, lse, *, own, **staged):
        # 1. The tile ranges of this thread block.
        warpgroup = lax.axis_index("warpgroup")
        head, place, batch = (lax.axis_index(name) for name in ("head", "row", "batch"))
        row = order[batch, place]
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
            loads = {name: staged[name] for name in ("targets", "here", "used")}
            produce(ranges, steps, size.stages, size.keys, sources, **loads)

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
            empty = top <= BLIND
            acc = acc * per_row(jnp.where(empty, 0.0, 1 / total), acc.shape)
            q_s[...] = acc.astype(q_s.dtype)
            logits = top * (width**-0.5 * LOG2_E) + jnp.log(total) * LOG2_E
            lse_s[...] = jnp.where(empty, -MASKED, logits)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_s, out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_s, lse.at[batch, head, rows])
            plgpu.wait_smem_to_gmem(0)

    return body


def _consume(size, width, simulated, q_s, row_codes, ranges, steps, *, targets, here, used, turn):
    """Online softmax over the tiles of all ranges.

    A step issues its own logits and the previous step's values together; the softmax of the logits
    runs while the tensor core multiplies the values. The warpgroups take turns to issue, so that
    one's softmax also runs beside the other's products.

    Returns the accumulated values, the row maxima of the logits, and the row sums.
    """
    # 1. The first logits and the last values, which no other product accompanies.
    warpgroup, row = lax.axis_index("warpgroup"), LAYOUT.reduce(1)
    (keys, _), (values,) = targets
    softmax = _softmax(size, width, row_codes, steps, targets, here, used)

    def first(top, total):
        plgpu.barrier_wait(here[0].at[0])
        logits = product(q_s, keys.at[0])
        weights, top, total, _ = softmax(logits, 0, 0, ranges[2][0] == 1, top, total)
        return weights.astype(values.dtype), top, total

    def last(acc, weights):
        slot = lax.rem(steps - 1, jnp.int32(size.stages))
        plgpu.barrier_wait(here[1].at[slot])
        (acc,) = add_products((acc, weights, values.at[slot]), simulated=simulated)
        plgpu.barrier_arrive(used[1].at[slot])
        return acc

    # 2. All steps. A row may have none.
    top = plgpu.layout_cast(jnp.full((size.queries,), BLIND, jnp.float32), row)
    total = plgpu.layout_cast(jnp.zeros((size.queries,), jnp.float32), row)
    acc, weights = zeros((size.queries, width)), zeros((size.queries, size.keys), values.dtype)
    pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
    weights, top, total = lax.cond(
        steps > 0, first, lambda top, total: (weights, top, total), top, total
    )
    step = _step(size, simulated, q_s, softmax, targets, here, used, turn)
    carry = (acc, weights, top, total)
    acc, weights, top, total = walk(ranges, steps, size.stages, step, carry, first=1)
    acc = lax.cond(steps > 0, last, lambda acc, weights: acc, acc, weights)
    pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
    return acc, top, total


def _softmax(size, width, row_codes, steps, targets, here, used):
    """A step of the online softmax: (weights, row maxima, row sums, factor of earlier sums)."""
    shape = (size.queries, size.keys)
    scale = width**-0.5 * LOG2_E
    _, codes = targets[0]

    def run(logits, t, slot, is_full, top, total):
        def masked(logits):
            code = per_column(col_values(codes.at[slot]), shape)
            plgpu.commit_smem()  # orders this plain read before the next TMA write
            visible = code_mask(lambda i: per_row(row_codes[i], shape), code)
            return jnp.where(visible, logits, MASKED)

        logits = lax.cond(is_full, lambda x: x, masked, logits)
        plgpu.barrier_arrive(used[0].at[slot])
        new_top = jnp.maximum(top, logits.max(axis=1))
        fade = jnp.exp2((top - new_top) * scale)
        weights = jnp.exp2((logits - per_row(new_top, shape)) * scale)
        total = total * fade + weights.sum(axis=1)
        await_slot(here[0], t + 1, steps, size.stages)  # the keys of the next step
        return weights, new_top, total, fade

    return run


def _step(size, simulated, q_s, softmax, targets, here, used, turn):
    """A step: its own logits and their softmax, and the values of the step before."""
    warpgroup = lax.axis_index("warpgroup")
    (keys, _), (values,) = targets

    def run(t, slot, tile, is_full, carry):
        acc, weights, top, total = carry
        before = lax.rem(t - 1, jnp.int32(size.stages))
        plgpu.barrier_wait(here[1].at[before])
        plgpu.barrier_wait(turn.at[warpgroup])
        (weights, top, total, fade), acc = product_and_sum(
            (q_s, keys.at[slot]),
            acc,
            (weights, values.at[before]),
            lambda: plgpu.barrier_arrive(turn.at[1 - warpgroup]),
            lambda logits: softmax(logits, t, slot, is_full, top, total),
            simulated=simulated,
        )
        plgpu.barrier_arrive(used[1].at[before])
        return acc * per_row(fade, acc.shape), weights.astype(values.dtype), top, total

    return run
