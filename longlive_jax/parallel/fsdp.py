"""Parameters made whole where they are used, and their gradients summed back into parts.

Inside `shard_map` a device holds its part of every array. `Gather` fetches the others' parts of one
module at the moment it is called; under remat this happens again in the backward pass, so at most
one layer is whole at a time.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from longlive_jax.parallel.rules import Specs
from longlive_jax.typing import Array
from pallas_kernels.nvfp4 import pack, unpack

type Axes = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Gather:
    """Makes modules whole: `gather(module, "blocks")` for one layer of the stacked blocks.

    Attributes:
      specs: PartitionSpecs of all parameters, as nested dictionaries.
      dtype: that parameters of layers travel in; None: their own. Gradients travel in float32.
        Packed numbers, of a byte or less, travel as they are.
    """

    specs: Specs
    dtype: DTypeLike | None = None

    def __call__[M: nnx.Module](self, module: M, *path: str, stacked: bool = True) -> M:
        """`module` at `path` with whole parameters; `stacked`: less the first axis (layers)."""
        specs = self.specs
        for key in path:
            specs = specs[key]
        graphdef, state = nnx.split(module, nnx.Param)
        params = self.tree(nnx.to_pure_dict(state), specs, stacked=stacked, dtype=self.dtype)
        return nnx.merge(graphdef, nnx.State(params))

    def tree(
        self, params: Any, specs: Specs, *, stacked: bool = False, dtype: DTypeLike | None = None
    ) -> Any:
        """The same for a tree of arrays, which travel in `dtype` or their own."""

        def whole(x: Array, spec: P) -> Array:
            for axis, names in enumerate(spec[1:] if stacked else spec):
                if names is not None:
                    x = gathered(x, names, axis, dtype)
            return x

        return jax.tree.map(whole, params, specs)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gathered(x: Array, names: Axes, axis: int, dtype: DTypeLike | None) -> Array:
    """All parts of `x` along `axis`, cast to `dtype` before they travel.

    Its gradient is summed over the devices in float32, and each keeps its own part.
    """
    if jnp.dtype(x.dtype).itemsize == 1:
        return _in_bytes(x, names, axis)
    return lax.all_gather(x.astype(dtype or x.dtype), names, axis=axis, tiled=True)


def _in_bytes(x: Array, names: Axes, axis: int) -> Array:
    """The same of packed numbers, for collectives that know bytes but no 4- or 8-bit floats."""
    four = x.dtype == jnp.float4_e2m1fn
    data = pack(x) if four else lax.bitcast_convert_type(x, jnp.uint8)
    data = lax.all_gather(data, names, axis=axis, tiled=True)
    return unpack(data) if four else lax.bitcast_convert_type(data, x.dtype)


def _forward(x: Array, names: Axes, axis: int, dtype: DTypeLike | None):
    return gathered(x, names, axis, dtype), jnp.zeros((0,), x.dtype)


def _backward(names: Axes, axis: int, _dtype, like: Array, grad: Array):
    summed = lax.psum_scatter(grad.astype(jnp.float32), names, scatter_dimension=axis, tiled=True)
    return (summed.astype(like.dtype),)


gathered.defvjp(_forward, _backward)
