"""Parameters of an NVFP4 training loss: float32 masters with their packed forms.

    quantize_for_loss = quant.prepare(params)       # once per update: packs every matrix
    loss = lambda params: model_loss(quantize_for_loss(params, key), ...)
    grads = jax.grad(loss)(params)                  # gradients of the float32 masters

The optimizer, the EMA and the checkpoints only contain float32 masters. On a mesh a packed matrix
is sharded like its master, and devices all-gather the packed form: 4.5 bits per value.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longlive_jax.quant.arithmetic import PackedPair, is_simulated, transpose_tiles
from longlive_jax.quant.policy import Format, QuantPolicy, QuantSpec, kernel_path, named
from longlive_jax.quant.recipe import ProductConfig, TrainingKernel
from longlive_jax.quant.shards import (
    TILE,
    check_blocks,
    nvfp4_spec,
    splits_into_tiles,
    transposed,
)
from longlive_jax.quant.traffic import traffic_note
from longlive_jax.typing import Array, Params
from pallas_kernels.dispatch import Implementation
from pallas_kernels.nvfp4 import ScaleLayout, linear_implementation, quantize

__all__ = ["QuantizedTraining"]

_ROUNDING = 0x4E56
"""Folded into a key, so that rounding noise is independent of the loss's use of the same key."""


@dataclasses.dataclass(frozen=True)
class QuantizedTraining:
    """NVFP4 training of a run's parameters.

    Attributes:
      policy: selects the matrices and their formats; every format has a recipe.
      axes: mesh axes over which tokens are sharded; () outside of `shard_map`.
      implementation: implementation of quantize and matmul.
      untiled: paths of matrices whose shards do not split into scale tiles; the kernel's product
        reorders their scales at every call.
    """

    policy: QuantPolicy
    axes: tuple[str, ...] = ()
    implementation: Implementation = "auto"
    untiled: frozenset[str] = frozenset()

    @classmethod
    def of(cls, spec: QuantSpec, axes: tuple[str, ...] = ()) -> "QuantizedTraining":
        """Builds it from the settings of a run.

        Raises ValueError if the policy does not train matrices, and `Unsupported` if the
        implementation cannot run on this machine.
        """
        policy = named(spec.policy)
        if not policy.trains:
            frozen = any(form.recipe is not None for _, form in policy.rules)
            use = "freezes its matrices" if frozen else "is for inference"
            raise ValueError(
                f"quant.policy {policy.name} {use}; 'nvfp4_train' trains them, or 'none'"
            )
        if policy.rules:
            linear_implementation(spec.implementation, trains=True)
        return cls(policy, axes, spec.implementation)

    def prepare(self, params: Params) -> Callable[[Params, Array], Params]:
        """Packs the matrices of `params`.

        Returns `quantize_for_loss(params, key)`, which replaces each selected matrix by a
        `TrainingKernel` of its master, its packed form and a key for rounding.
        """
        formats = self.policy.formats(params)
        packed = _select(params, formats, lambda path, x: self._packed(path, x, formats[path]))

        def quantize_for_loss(params: Params, key: Array) -> Params:
            key = jax.random.fold_in(key, _ROUNDING)
            indices = {path: i for i, path in enumerate(formats)}

            def training_kernel(path: str, master: Array) -> TrainingKernel:
                own = jax.random.fold_in(key, indices[path])
                layers = master.shape[:-2]
                keys = jax.random.split(own, layers) if layers else own
                return TrainingKernel(master, packed[path], keys, self._config(formats[path]))

            return _replace(params, _select(params, formats, training_kernel))

        return quantize_for_loss

    def specs(self, specs: Any, params: Params) -> Any:
        """PartitionSpecs of the quantized parameters, from those and the shapes of the masters."""
        formats = self.policy.formats(params)
        shapes = _select(params, formats, lambda _path, x: x.shape)

        def training_kernel(path: str, spec: P) -> TrainingKernel:
            form = formats[path]
            first = transposed(spec, path)
            packed = partial(nvfp4_spec, rule=form.weights, layout=self._layout(path, shapes[path]))
            second = packed(transposed(first, path)) if self._keeps_transpose else None
            pair = PackedPair(packed(first), second)
            return TrainingKernel(spec, pair, P(), self._config(form))  # type: ignore[arg-type]

        return _replace(specs, _select(specs, formats, training_kernel))

    def for_shards(self, specs: Any, params: Params, sizes: Any) -> "QuantizedTraining":
        """This quantization on a mesh whose axes have these sizes.

        Raises ValueError if the shards of a matrix do not split into blocks.
        """
        self.check_shards(specs, params, sizes)
        shapes = _select(params, self.policy.formats(params), lambda _path, x: x.shape)
        by_path = _select(specs, shapes, lambda _path, spec: spec)
        untiled = {
            path
            for path, shape in shapes.items()
            if not splits_into_tiles(shape, by_path[path], sizes)
        }
        return dataclasses.replace(self, untiled=frozenset(untiled))

    def check_shards(self, specs: Any, params: Params, sizes: Any) -> None:
        """Raises ValueError if the shards of a matrix do not split into blocks.

        `sizes` maps the mesh's axes to their sizes.
        """
        formats = self.policy.formats(params)
        shapes = _select(params, formats, lambda _path, x: x.shape)

        _select(specs, formats, lambda path, spec: check_blocks(path, shapes[path], spec, sizes))

    def describe(self, params: Params) -> str:
        """One line: what is quantized, and which implementation computes it."""
        text = self.policy.describe(params)
        if not self.policy.rules:
            return text
        if is_simulated(self.implementation):
            return f"{text}; computed by xla, NVFP4 values multiplied in bfloat16"
        chosen = linear_implementation(self.implementation, trains=True)
        return f"{text}; computed by {chosen}{traffic_note(chosen, trains=True)}"

    def _config(self, form: Format) -> ProductConfig:
        return ProductConfig(form, self.axes, self.implementation)

    @property
    def _keeps_transpose(self) -> bool:
        """Whether W is packed for both products; simulated products transpose values instead."""
        return bool(self.policy.rules) and not is_simulated(self.implementation)

    def _layout(self, path: str, shape: tuple[int, ...]) -> ScaleLayout:
        """The layout of a matrix's scales: tiles if a kernel reads them."""
        kernel = linear_implementation(self.implementation, trains=True) == "mosaic"
        divides = not any(size % TILE for size in shape[-2:]) and path not in self.untiled
        return "tiles" if kernel and divides else "rows"

    def _packed(self, path: str, master: Array, form: Format) -> PackedPair:
        # Tiles are the same in both directions, but the array's layout is fixed here.
        weight = quantize(
            jax.lax.stop_gradient(master).astype(jnp.float32),
            rule=form.weights,
            block_rows=form.tile,
            lead=master.ndim - 2,
            transpose=True,
            scale_layout=self._layout(path, master.shape),
            implementation=linear_implementation(self.implementation, trains=True),
        )
        return PackedPair(weight, transpose_tiles(weight) if self._keeps_transpose else None)


def _select[T](tree: Any, formats: Iterable[str], convert: Callable[[str, Any], T]) -> dict[str, T]:
    """`convert(path, leaf)` for the leaves that have a format, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    by_path = {kernel_path(keys): leaf for keys, leaf in leaves}
    return {path: convert(path, by_path[path]) for path in formats}


def _replace(tree: Any, others: dict[str, Any]) -> Any:
    """`tree` with the leaves at the paths of `others` replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: others.get(kernel_path(keys), leaf),
        tree,
        is_leaf=lambda x: isinstance(x, P),
    )
