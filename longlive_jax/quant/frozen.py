"""Frozen packed parameters below trained low-rank branches.

    frozen = freeze(params, named("nvfp4_frozen"), gradient=True)    # once
    adapted = with_adapter(with_rounding_keys(frozen, key), adapter, spec)   # in every loss

Packed matrices multiply quantized activations (W4A4 or FP8) and pass a quantized gradient on; they
have none themselves. With `gradient` an NVFP4 matrix is kept a second time, transposed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from longlive_jax.quant.arithmetic import is_simulated, transpose_tiles
from longlive_jax.quant.low_rank import LowRank
from longlive_jax.quant.packed import Fp8Kernel, PackedKernel, quantize_params
from longlive_jax.quant.policy import Format, QuantPolicy, kernel_path
from longlive_jax.quant.shards import check_blocks, nvfp4_spec, splits_into_tiles, transposed
from longlive_jax.typing import Array, Params
from pallas_kernels.dispatch import Implementation
from pallas_kernels.nvfp4 import with_scale_layout

__all__ = ["fit_shards", "freeze", "frozen_specs", "with_axes", "with_rounding_keys"]

_ROUNDING = 0x4652
"""Folded into a key, so that rounding noise is independent of a loss's use of the same key."""


def freeze(
    params: Params,
    policy: QuantPolicy,
    *,
    gradient: bool,
    implementation: Implementation = "auto",
    dtype: DTypeLike | None = None,
    axes: tuple[str, ...] = (),
) -> Params:
    """Packs the kernels that the policy selects, for use without a gradient of their own.

    Args:
      params: parameters of a model, kernels `[*layers, i, o]` as arrays; abstract under
        `jax.eval_shape`.
      policy: selects the kernels and their formats.
      gradient: whether activations have a gradient: NVFP4 matrices get a transposed copy where
        products read one, and output gradients are quantized by the format's recipe (FP8: to E4M3).
      implementation: implementation of quantize and matmul.
      dtype: dtype of all other floating-point parameters; None keeps theirs.
      axes: mesh axes over which tokens are sharded where the kernels are used, inside `shard_map`;
        the scale of a tensor is then that of all its tokens.

    Raises ValueError if the policy does not match the model, or, with `gradient`, if an NVFP4
    format has no recipe.
    """
    formats = policy.formats(params)
    for path, form in formats.items() if gradient else ():
        if form.kind == "nvfp4" and form.recipe is None:
            raise ValueError(
                f"quant.policy {policy.name}: {path} has no recipe for the gradient; "
                "'nvfp4_frozen' has one, and 'fp8' needs none"
            )
    packed = quantize_params(params, policy, implementation=implementation, dtype=dtype)

    def prepare(keys: tuple, node: Any) -> Any:
        if isinstance(node, PackedKernel):
            node = dataclasses.replace(node, axes=axes)
            return _with_gradient(node, formats[kernel_path(keys)]) if gradient else node
        if isinstance(node, Fp8Kernel):
            return dataclasses.replace(node, quantize_gradient=gradient)
        return node

    return jax.tree_util.tree_map_with_path(prepare, packed, is_leaf=_is_packed)


def _with_gradient(kernel: PackedKernel, form: Format) -> PackedKernel:
    """The kernel with its format's recipe, and its transposed copy where products read one."""
    if is_simulated(kernel.implementation, trains=False):
        return dataclasses.replace(kernel, recipe=form.recipe)
    weight, layers = kernel.weight, kernel.weight.shape[:-2]
    # One layer at a time, so that only one is unpacked.
    transposed = lax.map(transpose_tiles, weight) if layers else transpose_tiles(weight)
    return dataclasses.replace(kernel, recipe=form.recipe, transposed=transposed)


def with_rounding_keys(params: Params, key: Array) -> Params:
    """Gives every kernel whose recipe rounds stochastically its key, one a layer.

    The same key gives the same noise; other parameters are returned as they are.
    """
    key, index = jax.random.fold_in(key, _ROUNDING), 0

    def attach(node: Any) -> Any:
        nonlocal index
        if not isinstance(node, PackedKernel) or node.recipe is None:
            return node
        own, layers = jax.random.fold_in(key, index), node.weight.shape[:-2]
        index += 1
        return dataclasses.replace(node, key=jax.random.split(own, layers) if layers else own)

    return jax.tree.map(attach, params, is_leaf=_is_packed)


def with_axes(params: Params, axes: tuple[str, ...]) -> Params:
    """Frozen parameters for tokens that are sharded over `axes`; () outside of `shard_map`."""
    return jax.tree.map(
        lambda x: dataclasses.replace(x, axes=axes) if isinstance(x, PackedKernel) else x,
        params,
        is_leaf=_is_packed,
    )


def fit_shards(params: Params, specs: Any, sizes: Mapping[str, int]) -> Params:
    """Frozen parameters whose arrays can be sharded over mesh axes of these sizes.

    Kernels whose shards do not split into tiles of scales get their scales row by row. `specs` are
    the PartitionSpecs of the model's arrays, kernels `[layers, i, o]`. Raises ValueError if shards
    of a packed kernel do not split into blocks.
    """

    def fit(keys: tuple, node: Any, spec: P) -> Any:
        if not _is_packed(node):
            return node
        check_blocks(kernel_path(keys), node.shape, spec, sizes)
        if isinstance(node, Fp8Kernel) or splits_into_tiles(node.shape, spec, sizes):
            return node
        pair = (node.weight, node.transposed)
        weight, second = (None if x is None else with_scale_layout(x, "rows") for x in pair)
        return dataclasses.replace(node, weight=weight, transposed=second)

    return jax.tree_util.tree_map_with_path(fit, params, specs, is_leaf=_is_packed)


def frozen_specs(params: Params, specs: Any) -> Any:
    """PartitionSpecs of frozen parameters, from those of the model's arrays.

    Args:
      params: frozen parameters or their shapes (`fit_shards`); a low-rank branch follows the axes
        of its kernel.
      specs: PartitionSpecs of the model's arrays, kernels `[layers, i, o]`.

    The result has the static settings of the kernels, so it fits `shard_map` and `Gather`. Raises
    ValueError if layers are sharded.
    """

    def convert(keys: tuple, node: Any, spec: P) -> Any:
        if not _is_packed(node):
            return spec
        own = transposed(spec, kernel_path(keys))
        branch = None if node.branch is None else _branch_spec(node.branch, own)
        if isinstance(node, Fp8Kernel):
            of_rows: Any = {"codes": own, "scales": P(*own[:2])}
            return dataclasses.replace(node, branch=branch, **of_rows)
        weight, second = node.weight, node.transposed
        if second is not None:
            second = nvfp4_spec(transposed(own, ""), second.rule, second.scale_layout)
        return dataclasses.replace(
            node,
            weight=nvfp4_spec(own, weight.rule, weight.scale_layout),
            transposed=second,
            branch=branch,
            key=None if node.key is None else P(),
        )

    return jax.tree_util.tree_map_with_path(convert, params, specs, is_leaf=_is_packed)


def _branch_spec(branch: LowRank, spec: P) -> LowRank:
    """The specs of a branch whose kernel is sharded as `spec`, `[layers, o, i]`."""
    _, outputs, inputs = spec
    replicated: Any = P()
    parts: Any = {"a": P(None, inputs, None), "b": P(None, None, outputs)}
    if branch.dropout is not None:
        parts["dropout"] = dataclasses.replace(branch.dropout, key=replicated)
    return dataclasses.replace(branch, **parts)


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedKernel | Fp8Kernel)
