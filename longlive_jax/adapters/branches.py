"""Adapters as branches of a model's kernels, or merged into them.

Every linear of the blocks gets a branch of one rank, whatever is plugged in: the factors of all
adapters side by side, then zeros. So the structure and the shapes of the parameters, and with them
the compiled program, stay the same when adapters come and go. Scales are folded into B.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from longlive_jax.adapters.adapter import Adapter
from longlive_jax.io.arrays import Shape, TreePath, flatten, nest
from longlive_jax.models.per_layer import PerLayer, is_per_layer, unstack
from longlive_jax.quant.low_rank import LoRAKernel, LowRank
from longlive_jax.spec import UserError
from longlive_jax.typing import Params

__all__ = ["MIN_RANK", "Plugged", "branch_rank", "fuse", "kernel_shapes", "plug"]

MIN_RANK = 16
"""Smallest rank of the branches; adapters of smaller ranks share one compiled program."""

Plugged = Sequence[tuple[Adapter, float]]
"""Adapters and what their scales are multiplied by."""


def branch_rank(adapters: Plugged) -> int:
    """The rank of branches with room for these adapters: a power of two."""
    total = sum(adapter.rank for adapter, _ in adapters)
    return max(MIN_RANK, 1 << (max(total, 1) - 1).bit_length())


def kernel_shapes(params: Params) -> dict[TreePath, Shape]:
    """Shapes `[l, i, o]` of the blocks' kernels by path, packed ones included."""
    return {path: tuple(kernel.shape) for path, kernel in _kernels(flatten(params)).items()}


def _kernels(flat: Mapping[TreePath, Any]) -> dict[TreePath, Any]:
    return {p: x for p, x in flat.items() if p[0] == "blocks" and p[-1] == "kernel"}


def plug(params: Params, adapters: Plugged, rank: int) -> Params:
    """The parameters with a branch of the rank on every kernel of the blocks.

    Args:
      params: parameters of a DiT: arrays, stacked or one per layer, or packed kernels, which may
        have a branch of their own; it stays, in addition.
      adapters: adapters that fit them (`Adapter.check_fits`); may be empty.
      rank: rank of the branches, at least that of all adapters together.
    """
    flat = flatten(params)
    for path, kernel in _kernels(flat).items():
        like = flat[(*path[:-1], "bias")]
        own = getattr(kernel, "branch", None)
        factors = _factors(adapters, path, tuple(kernel.shape), rank)
        branch = _placed(factors, own, like)
        flat[path] = (
            _with_branch(kernel, branch)
            if hasattr(kernel, "branch")
            else LoRAKernel(kernel, branch)
        )
    return nest(flat)


def _with_branch(kernel: Any, branch: LowRank) -> Any:
    """A packed kernel, or one with a branch, with another branch."""
    return dataclasses.replace(kernel, branch=branch)


def fuse(params: Params, adapters: Plugged) -> Params:
    """The parameters with `kernel + sum of scale * a @ b`, summed in float32, in the same dtype.

    Kernels that no adapter adapts are not copied. Raises UserError if an adapted kernel is packed.
    """
    flat = flatten(params)
    for path, kernel in _kernels(flat).items():
        total = sum(adapter.rank for adapter, _ in adapters if _adapts(adapter, path))
        if not total:
            continue
        if not is_per_layer(kernel) and not isinstance(kernel, jax.Array):
            raise UserError(
                f"{'.'.join(path[:-1])} is packed, so adapters stay beside it as branches; to "
                "merge them, use `longlive quantize --adapter=PATH` on the checkpoint before it "
                "is packed"
            )
        factors = _factors(adapters, path, tuple(kernel.shape), total)
        branch = _placed(factors, None, kernel, dtype=jnp.float32)
        flat[path] = _merged(kernel, branch)
    return nest(flat)


def _adapts(adapter: Adapter, path: TreePath) -> bool:
    return (*path[:-1], "a") in adapter.factors


def _factors(
    adapters: Plugged, path: TreePath, shape: Shape, rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Factors a [l, i, rank] and b [l, rank, o] of all adapters of a kernel, float32."""
    layers, inputs, outputs = shape
    a = np.zeros((layers, inputs, rank), np.float32)
    b = np.zeros((layers, rank, outputs), np.float32)
    start = 0
    for adapter, strength in adapters:
        if _adapts(adapter, path):
            factors, end = adapter.factors, start + adapter.rank
            down, up = (np.asarray(factors[(*path[:-1], x)], np.float32) for x in "ab")
            a[: len(down), :, start:end] = down
            b[: len(up), start:end] = up * np.float32(adapter.scale * strength)
            start = end
    return a, b


def _placed(
    factors: tuple[np.ndarray, np.ndarray],
    own: LowRank | None,
    like: Any,
    *,
    dtype: DTypeLike | None = None,
) -> LowRank:
    """A branch with the dtype, the devices and the layers of the array `like`.

    `own` is a branch that the kernel has already; its factors come first.
    """
    leaf = jax.tree.leaves(like)[0]
    target = jnp.dtype(leaf.dtype if dtype is None else dtype)
    a, b = (_put(x.astype(target), leaf) for x in factors)
    if own is not None:
        first, second = (_stacked(x) for x in (own.a, own.b))
        a = jnp.concatenate([first.astype(target), a], axis=2)
        scaled = second.astype(jnp.float32) * own.scale
        b = jnp.concatenate([scaled.astype(target), b], axis=1)
    branch = LowRank(a, b)
    return unstack(branch, consume=True) if is_per_layer(like) else branch


def _put(value: np.ndarray, like: jax.Array) -> jax.Array:
    """The array on the devices of another one, and bound to them if that one is.

    Bound and unbound arguments would make two compiled programs.
    """
    if like.committed:
        return jax.device_put(value, like.sharding)
    (device,) = like.devices()
    with jax.default_device(device):
        return jnp.asarray(value)


def _stacked(x: Any) -> jax.Array:
    return jnp.stack(x.arrays) if is_per_layer(x) else x


def _merged(kernel: Any, branch: LowRank) -> Any:
    if is_per_layer(kernel):
        factors: Any = (branch.a, branch.b)
        layers = zip(kernel.arrays, *(x.arrays for x in factors), strict=True)
        return PerLayer(tuple(_merge(w, a, b) for w, a, b in layers))
    return _merge_stack(kernel, branch.a, branch.b)


@jax.jit
def _merge(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return LoRAKernel(kernel, LowRank(a, b)).merged()


@jax.jit
def _merge_stack(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """All layers, one after the other: only one is in float32."""
    return jax.lax.map(lambda x: _merge(*x), (kernel, a, b))
