"""Random adapters for small models."""

import jax
import numpy as np

from longlive_jax.adapters import Adapter
from longlive_jax.adapters.branches import kernel_shapes
from longlive_jax.io.arrays import nest


def random_adapter(params, rank=4, seed=0, *, alpha=None, dtype=np.float32, spread=0.3, **fields):
    """An adapter of every kernel of the blocks."""
    rng, factors = np.random.default_rng(seed), {}
    for path, (layers, inputs, outputs) in kernel_shapes(params).items():
        for side, shape in (("a", (layers, inputs, rank)), ("b", (layers, rank, outputs))):
            values = rng.normal(size=shape) * spread
            factors[(*path[:-1], side)] = values.astype(dtype)
    return Adapter(nest(factors), (rank if alpha is None else alpha) / rank, **fields)


def same_bits(tree, other):
    """Whether two trees have the same structure, dtypes and bytes."""
    leaves, others = (jax.tree_util.tree_flatten_with_path(x)[0] for x in (tree, other))
    assert [keys for keys, _ in leaves] == [keys for keys, _ in others]
    return all(
        np.asarray(x).dtype == np.asarray(y).dtype
        and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for (_, x), (_, y) in zip(leaves, others, strict=True)
    )
