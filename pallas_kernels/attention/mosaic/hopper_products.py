"""Tensor-core products of one Hopper warpgroup, several in flight at a time.

The softmax of one product's result runs while the next product is in flight. Interpreters lack
register operands and stored accumulators, so `simulated` products run one after the other.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

LAYOUT = plgpu.Layout.WGMMA


def product(left, right) -> Array:
    """`left @ right.T` of two tiles in shared memory, in float32 registers."""

    def run(ref):
        plgpu.wgmma(ref, left, right.transpose((1, 0)))
        return ref[...]

    return pl.run_scoped(run, _accumulator(left, right))


def product_pair(first, second, issued: Callable, beside: Callable, *, simulated: bool):
    """Issues two products `left @ right.T` of tiles in shared memory together.

    Args:
      first: left and right operand.
      second: left and right operand.
      issued: called as soon as both are issued.
      beside: called with the first result, while the second product is in flight. It must end in a
        branch: the compiler may move what follows the last branch behind the wait for the second.
      simulated: whether the kernel is interpreted.

    Returns:
      The result of `beside` and the second product.
    """
    if simulated:
        results = product(*first), product(*second)
        issued()
        return beside(results[0]), results[1]

    def run(first_ref, second_ref):
        for ref, (left, right) in ((first_ref, first), (second_ref, second)):
            plgpu.wgmma(ref, left, right.transpose((1, 0)))
        issued()
        result = beside(plgpu.wgmma_accumulator_load(first_ref, wait_n=1))
        return result, second_ref[...]

    return pl.run_scoped(run, _accumulator(*first), _accumulator(*second))


def product_and_sum(
    first, total: Array, second, issued: Callable, beside: Callable, *, simulated: bool
):
    """Issues `left @ right.T` of `first` and `total + left @ right` of `second` together.

    The left operand of `second` is in registers. The other arguments are those of `product_pair`.

    Returns:
      The result of `beside` and the sum.
    """
    if simulated:
        logits = product(*first)
        issued()
        return beside(logits), add_products((total, *second), simulated=True)[0]

    def run(ref, total_ref):
        total_ref[...] = total
        plgpu.wgmma(ref, first[0], first[1].transpose((1, 0)))
        plgpu.wgmma(total_ref, *second)
        issued()
        result = beside(plgpu.wgmma_accumulator_load(ref, wait_n=1))
        return result, total_ref[...]

    return pl.run_scoped(run, _accumulator(*first), _like(total))


def add_products(*sums: tuple[Array, Array, Any], simulated: bool) -> list[Array]:
    """`total + left @ right` for each `(total, left, right)`, with `left` in registers."""
    if simulated:
        results = [
            total + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
            for total, left, right in sums
        ]
        plgpu.commit_smem()  # orders the plain reads before the next TMA write
        return results

    def run(*refs):
        for ref, (total, _, _) in zip(refs, sums, strict=True):
            ref[...] = total
        for ref, (_, left, right) in zip(refs, sums, strict=True):
            plgpu.wgmma(ref, left, right)
        return [ref[...] for ref in refs]

    return pl.run_scoped(run, *(_like(total) for total, _, _ in sums))


def row_values(ref) -> Array:
    """Loads one value per row of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(1), optimized=False)


def col_values(ref) -> Array:
    """Loads one value per column of a tile."""
    return plgpu.load(ref, layout=LAYOUT.reduce(0), optimized=False)


def zeros(shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    """Zeros in the layout of an accumulator."""
    return plgpu.layout_cast(jnp.zeros(shape, dtype), LAYOUT)


def await_slot(barrier, t, steps, stages: int) -> None:
    """Waits until the data of step `t` has arrived, unless there is no such step."""

    @pl.when(t < steps)
    def _():
        plgpu.barrier_wait(barrier.at[lax.rem(jnp.int32(t), jnp.int32(stages))])


def _accumulator(left, right):
    return plgpu.ACC((left.shape[0], right.shape[0]), jnp.float32)


def _like(total):
    rows, columns = total.shape
    return plgpu.ACC((rows, columns), jnp.float32)
