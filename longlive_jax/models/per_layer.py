"""Stacks of layers as one array per layer.

A loop over stacked arrays `[layers, ...]` has to copy a layer's slice before a library's kernel
(cuBLAS, cuDNN) can read it. With one array per layer nothing is copied, and the loop is unrolled.
Trees of either form work in the same functions: `take_layer` reads both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longlive_jax.typing import Array, Shaped

__all__ = [
    "PerLayer",
    "is_per_layer",
    "is_unstacked",
    "scan_layers",
    "take_layer",
    "unstack",
    "update_layers",
]


@struct.dataclass
class PerLayer:
    """A stacked array as one array per layer.

    Attributes:
      arrays: the array of every layer; all have the same shape and dtype.
    """

    arrays: tuple[Shaped[Array, "..."], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack, `[layers, ...]`."""
        return (len(self.arrays), *self.arrays[0].shape)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of all layers."""
        return self.arrays[0].dtype

    @property
    def size(self) -> int:
        """Number of elements of all layers."""
        return sum(x.size for x in self.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return self.size * self.dtype.itemsize

    def replace_layer(self, layer: int, array: Array) -> "PerLayer":
        """The stack with another array for one layer."""
        return PerLayer((*self.arrays[:layer], array, *self.arrays[layer + 1 :]))


def is_per_layer(x: Any) -> bool:
    """Whether `x` is a `PerLayer`: the `is_leaf` of trees that may have some."""
    return isinstance(x, PerLayer)


def is_unstacked(tree: Any) -> bool:
    """Whether a tree has a `PerLayer` in it."""
    return any(map(is_per_layer, jax.tree.leaves(tree, is_leaf=is_per_layer)))


def unstack(tree: Any, *, consume: bool = False) -> Any:
    """The tree with every array `[layers, ...]` as a `PerLayer`.

    With `consume` each array is deleted as soon as it is split, so that at most one of them exists
    twice; no one else may use them.
    """
    split = jax.jit(lambda x: PerLayer(tuple(x[i] for i in range(len(x)))))

    def convert(x: Array) -> PerLayer:
        layers = split(x)
        if consume:
            jax.block_until_ready(layers)
            x.delete()
        return layers

    return jax.tree.map(convert, tree)


def take_layer(tree: Any, layer: Array | int) -> Any:
    """One layer of every array of a tree; of a `PerLayer` by a Python integer only."""
    return jax.tree.map(
        lambda x: x.arrays[layer] if is_per_layer(x) else jnp.asarray(x)[layer],
        tree,
        is_leaf=is_per_layer,
    )


def scan_layers(
    body: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    *,
    unroll: int = 1,
) -> tuple[Any, Any]:
    """`lax.scan` over the layers of `xs`; unrolled if they have arrays of their own.

    The body is traced once in either case.
    """
    if not is_unstacked(xs):
        return jax.lax.scan(body, carry, xs, unroll=unroll)
    step, results = jax.jit(body), []
    layers, *_ = jax.tree.leaves(xs, is_leaf=is_per_layer)[0].shape
    for layer in range(layers):
        carry, result = step(carry, take_layer(xs, layer))
        results.append(result)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)


def update_layers(
    step: Callable[[Any, Any], tuple[Any, Any]],
    write: Callable[..., Any],
    carry: Any,
    xs: tuple[Any, ...],
    stored: Any,
    *,
    layers: int,
) -> tuple[Any, Any]:
    """A loop over the first `layers` layers that updates `stored` in place, layer by layer.

    Args:
      step: `(carry, (*xs, stored)) -> (carry, result)`, with one layer of `xs` and `stored`.
      write: `(stored, layer, *result) -> stored` with one layer updated.
      carry: first argument of the first step.
      xs: trees of layers that are only read.
      stored: the tree of layers that is updated.
      layers: number of steps.

    Returns the last carry and `stored`.
    """

    # Without the barrier a layer could be written before it is read, from a copy.
    def ordered(carry: Any, xs: Any) -> tuple[Any, Any]:
        return jax.lax.optimization_barrier(step(carry, xs))

    if is_unstacked((xs, stored)):
        run = jax.jit(ordered)
        for layer in range(layers):
            carry, result = run(carry, (*take_layer(xs, layer), take_layer(stored, layer)))
            stored = write(stored, layer, *result)
        return carry, stored

    def body(state: tuple[Any, Any], layer: Array) -> tuple[tuple[Any, Any], None]:
        carry, stored = state
        carry, result = ordered(carry, (*take_layer(xs, layer), take_layer(stored, layer)))
        return (carry, write(stored, layer, *result)), None

    return jax.lax.scan(body, (carry, stored), jnp.arange(layers))[0]
