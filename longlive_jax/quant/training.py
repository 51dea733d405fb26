"""Parameters of an NVFP4 training loss: float32 masters with their packed forms.

    quantize_for_loss = quant.prepare(params)       # once per update: packs every matrix
    loss = lambda params: model_loss(quantize_for_loss(params, key), ...)
    grads = jax.grad(loss)(params)                  # gradients of the float32 masters

The optimizer, the EMA and the checkpoints only contain float32 masters. On a mesh a packed matrix
is sharded like its master, and devices all-gather the packed form: 4.5 bits per value.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longlive_jax.quant.policy import Format, QuantPolicy, QuantSpec, kernel_path, named
from longlive_jax.quant.recipe import ProductConfig, TrainingKernel
from longlive_jax.typing import Array, Params
from pallas_kernels.dispatch import Implementation, capability
from pallas_kernels.nvfp4 import BLOCK, NVFP4, quantize, select_implementation

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
    """

    policy: QuantPolicy
    axes: tuple[str, ...] = ()
    implementation: Implementation = "auto"

    @classmethod
    def of(cls, spec: QuantSpec, axes: tuple[str, ...] = ()) -> "QuantizedTraining":
        """Builds it from the settings of a run.

        Raises ValueError if the policy is for inference only, and `Unsupported` if the
        implementation cannot run on this machine.
        """
        policy = named(spec.policy)
        if not policy.trains:
            raise ValueError(
                f"quant.policy {policy.name} is for inference; 'nvfp4_train' trains, or 'none'"
            )
        if policy.rules:
            select_implementation("matmul", implementation=spec.implementation)
        return cls(policy, axes, spec.implementation)

    def prepare(self, params: Params) -> Callable[[Params, Array], Params]:
        """Packs the matrices of `params`.

        Returns `quantize_for_loss(params, key)`, which replaces each selected matrix by a
        `TrainingKernel` of its master, its packed form and a key for rounding.
        """
        formats = self.policy.formats(params)
        packed = _select(params, formats, lambda path, x: self._packed(x, formats[path]))

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

        def training_kernel(path: str, spec: P) -> TrainingKernel:
            form = formats[path]
            transposed = _transposed(spec, path)
            packed: Any = NVFP4(transposed, transposed, P(), form.weights)  # type: ignore[arg-type]
            return TrainingKernel(spec, packed, P(), self._config(form))  # type: ignore[arg-type]

        return _replace(specs, _select(specs, formats, training_kernel))

    def check_shards(self, specs: Any, params: Params, sizes: Any) -> None:
        """Raises ValueError if the shards of a matrix do not split into blocks.

        `sizes` maps the mesh's axes to their sizes.
        """
        formats = self.policy.formats(params)
        shapes = _select(params, formats, lambda _path, x: x.shape)

        def check(path: str, spec: P) -> None:
            for size, names in zip(shapes[path], spec, strict=False):
                shards = _num_shards(sizes, names)
                if shards > 1 and size % (BLOCK * shards):
                    raise ValueError(
                        f"{path} {shapes[path]}: {size} over {shards} devices must be a multiple "
                        f"of {BLOCK} each; choose fewer devices along {names}, or quant.policy none"
                    )

        _select(specs, formats, check)

    def describe(self, params: Params) -> str:
        """One line: what is quantized, and which implementation computes it."""
        text = self.policy.describe(params)
        if not self.policy.rules:
            return text
        names = {
            op: select_implementation(op, implementation=self.implementation)
            for op in ("quantize", "matmul")
        }
        if names["matmul"] == "xla" and not capability().startswith("10."):
            method = "xla, NVFP4 values multiplied in bfloat16"
        else:
            method = ", ".join(f"{op} {name}" for op, name in names.items())
        return f"{text}; computed by {method}"

    def _config(self, form: Format) -> ProductConfig:
        return ProductConfig(form, self.axes, self.implementation)

    def _packed(self, master: Array, form: Format) -> NVFP4:
        # Tiles are the same in both directions, but the array's layout is fixed here.
        return quantize(
            jax.lax.stop_gradient(master).astype(jnp.float32),
            rule=form.weights,
            block_rows=form.tile,
            lead=master.ndim - 2,
            transpose=True,
            implementation=self.implementation,
        )


def _select[T](
    tree: Any, formats: dict[str, Format], convert: Callable[[str, Any], T]
) -> dict[str, T]:
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


def _transposed(spec: P, path: str) -> P:
    """The spec of `[layers, o, i]` from that of `[layers, i, o]`; layers must not be sharded."""
    layers, inputs, outputs = (*spec, None, None, None)[:3]
    if layers is not None:
        raise ValueError(
            f"{path}: layers are sharded over {layers}; quantized layers must be replicated"
        )
    return P(None, outputs, inputs)


def _num_shards(sizes: Any, names: Any) -> int:
    shards = 1
    for name in (names,) if isinstance(names, str) else names or ():
        shards *= sizes[name]
    return shards
