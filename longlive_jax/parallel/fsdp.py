"""FSDP: parameters are all-gathered where they are used, and gradients are reduce-scattered.

Inside `shard_map` a device holds one shard of every array. `Gather` all-gathers the parameters of
one module when that module is called. Under remat the backward pass gathers them again, so at most
one layer is gathered at a time.
"""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from longlive_jax.parallel.rules import Specs, path_of
from longlive_jax.typing import Array
from pallas_kernels.nvfp4 import pack, unpack

type Axes = str | tuple[str, ...]

FACTORS = re.compile(r"(.*/)?branch/[ab]")
"""Paths of the factors of low-rank branches."""


@dataclasses.dataclass(frozen=True)
class Gather:
    """All-gathers a module's parameters: `gather(module, "blocks")` for one layer of the blocks.

    Attributes:
      specs: PartitionSpecs of all parameters, as nested dictionaries.
      dtype: dtype in which the parameters of layers are communicated; None keeps their own dtype.
        Gradients are communicated in float32, packed numbers of a byte or less unchanged. Factors
        of low-rank branches keep their dtype, so that their gradients are not rounded.
    """

    specs: Specs
    dtype: DTypeLike | None = None

    def __call__[M: nnx.Module](self, module: M, *path: str, stacked: bool = True) -> M:
        """`module`, whose parameters are at `path` in `specs`, with all shards gathered.

        With `stacked`, the module is one layer: its arrays lack the leading axis of `specs`.
        """
        specs = self.specs
        for key in path:
            specs = specs[key]
        graphdef, state = nnx.split(module, nnx.Param)
        params = self.tree(nnx.to_pure_dict(state), specs, stacked=stacked, dtype=self.dtype)
        return nnx.merge(graphdef, nnx.State(params))

    def tree(
        self, params: Any, specs: Specs, *, stacked: bool = False, dtype: DTypeLike | None = None
    ) -> Any:
        """Gathers a tree of sharded arrays, communicated in `dtype` or in their own dtype."""

        def gather(keys: tuple, x: Array, spec: P) -> Array:
            sent = None if FACTORS.fullmatch(path_of(keys)) else dtype
            for axis, names in enumerate(spec[1:] if stacked else spec):
                if names is not None:
                    x = gather_shards(x, names, axis, sent)
            return x

        return jax.tree_util.tree_map_with_path(gather, params, specs)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather_shards(x: Array, names: Axes, axis: int, dtype: DTypeLike | None) -> Array:
    """All-gathers `x` over the mesh axes `names` along `axis`, cast to `dtype` before sending.

    The gradient is reduce-scattered in float32: it is summed over devices, and each device keeps
    its own shard.
    """
    if jnp.dtype(x.dtype).itemsize == 1:
        return _gather_bytes(x, names, axis)
    return lax.all_gather(x.astype(dtype or x.dtype), names, axis=axis, tiled=True)


def _gather_bytes(x: Array, names: Axes, axis: int) -> Array:
    """All-gathers 4- and 8-bit floats as bytes, because collectives do not support their dtypes."""
    is_fp4 = x.dtype == jnp.float4_e2m1fn
    data = pack(x) if is_fp4 else lax.bitcast_convert_type(x, jnp.uint8)
    data = lax.all_gather(data, names, axis=axis, tiled=True)
    return unpack(data) if is_fp4 else lax.bitcast_convert_type(data, x.dtype)


def _forward(x: Array, names: Axes, axis: int, dtype: DTypeLike | None):
    return gather_shards(x, names, axis, dtype), jnp.zeros((0,), x.dtype)


def _backward(names: Axes, axis: int, _dtype, prototype: Array, grad: Array):
    summed = lax.psum_scatter(grad.astype(jnp.float32), names, scatter_dimension=axis, tiled=True)
    return (summed.astype(prototype.dtype),)


gather_shards.defvjp(_forward, _backward)
