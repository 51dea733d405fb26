"""Parameters as a loss in NVFP4 sees them: masters, and beside each what it is packed to.

    dress = quant.prepare(params)                   # once an update: every matrix is packed
    loss = lambda params: model_loss(dress(params, key), ...)
    grads = jax.grad(loss)(params)                  # of the float32 masters

The optimizer, averages and saves never see anything but float32 masters. Over a mesh a packed
matrix lies as its master does, and is what devices fetch from each other: 4.5 bits a number.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from longlive_jax.quant.policy import Format, QuantPolicy, QuantSpec, named, path_of
from longlive_jax.quant.recipe import How, TrainingKernel
from longlive_jax.typing import Array, Params
from pallas_kernels.dispatch import Implementation, capability
from pallas_kernels.nvfp4 import BLOCK, NVFP4, quantize, which

__all__ = ["QuantizedTraining"]

_ROUNDING = 0x4E56
"""Folded into a key, so that what rounds is not what a loss draws from the same key."""


@dataclasses.dataclass(frozen=True)
class QuantizedTraining:
    """A policy for a run.

    Attributes:
      policy: which matrices, and how; every format has a recipe.
      axes: of the mesh, over which tokens are shared out; () where there is no `shard_map`.
      implementation: of quantize and matmul.
    """

    policy: QuantPolicy
    axes: tuple[str, ...] = ()
    implementation: Implementation = "auto"

    @classmethod
    def of(cls, spec: QuantSpec, axes: tuple[str, ...] = ()) -> "QuantizedTraining":
        """Raises ValueError for a policy that is for inference only, `Unsupported` for an
        implementation that this machine has not."""
        policy = named(spec.policy)
        if not policy.trains:
            raise ValueError(
                f"quant.policy {policy.name} is for inference; 'nvfp4_train' trains, or 'none'"
            )
        if policy.rules:
            which("matmul", implementation=spec.implementation)
        return cls(policy, axes, spec.implementation)

    def prepare(self, params: Params) -> Callable[[Params, Array], Params]:
        """Packs the matrices of `params`; `dress(params, key)` puts these beside the masters."""
        formats = self.policy.formats(params)
        packed = _at(params, formats, lambda path, x: self._packed(x, formats[path]))

        def dress(params: Params, key: Array) -> Params:
            key = jax.random.fold_in(key, _ROUNDING)
            places = {path: i for i, path in enumerate(formats)}

            def one(path: str, master: Array) -> TrainingKernel:
                own = jax.random.fold_in(key, places[path])
                layers = master.shape[:-2]
                keys = jax.random.split(own, layers) if layers else own
                return TrainingKernel(master, packed[path], keys, self._how(formats[path]))

            return _replaced(params, _at(params, formats, one))

        return dress

    def specs(self, specs: Any, params: Params) -> Any:
        """PartitionSpecs of dressed parameters, given those of the masters and their shapes."""
        formats = self.policy.formats(params)

        def one(path: str, spec: P) -> TrainingKernel:
            form = formats[path]
            turned = _turned(spec, path)
            packed: Any = NVFP4(turned, turned, P(), form.weights)  # type: ignore[arg-type]
            return TrainingKernel(spec, packed, P(), self._how(form))  # type: ignore[arg-type]

        return _replaced(specs, _at(specs, formats, one))

    def check_parts(self, specs: Any, params: Params, sizes: Any) -> None:
        """ValueError for a matrix of which a device's part is no whole number of blocks.

        `sizes` are the mesh's axes.
        """
        formats = self.policy.formats(params)
        shapes = _at(params, formats, lambda _path, x: x.shape)

        def one(path: str, spec: P) -> None:
            for size, names in zip(shapes[path], spec, strict=False):
                parts = _parts(sizes, names)
                if parts > 1 and size % (BLOCK * parts):
                    raise ValueError(
                        f"{path} {shapes[path]}: {size} over {parts} devices are no whole blocks "
                        f"of {BLOCK} each; choose fewer devices along {names}, or quant.policy none"
                    )

        _at(specs, formats, one)

    def describe(self, params: Params) -> str:
        """One line: what is quantized, and what computes."""
        said = self.policy.describe(params)
        if not self.policy.rules:
            return said
        names = {op: which(op, implementation=self.implementation) for op in ("quantize", "matmul")}
        if names["matmul"] == "xla" and not capability().startswith("10."):
            how = "xla, as the values that NVFP4 holds, multiplied in bfloat16"
        else:
            how = ", ".join(f"{op} {name}" for op, name in names.items())
        return f"{said}; computed by {how}"

    def _how(self, form: Format) -> How:
        return How(form, self.axes, self.implementation)

    def _packed(self, master: Array, form: Format) -> NVFP4:
        # Tiles are the same in both directions, but an array lies as it is made.
        return quantize(
            jax.lax.stop_gradient(master).astype(jnp.float32),
            rule=form.weights,
            block_rows=form.tile,
            lead=master.ndim - 2,
            transpose=True,
            implementation=self.implementation,
        )


def _at[T](tree: Any, formats: dict[str, Format], make: Callable[[str, Any], T]) -> dict[str, T]:
    """`make(path, leaf)` of the leaves that have a format."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, P))
    found = {path_of(keys): leaf for keys, leaf in leaves}
    return {path: make(path, found[path]) for path in formats}


def _replaced(tree: Any, others: dict[str, Any]) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: others.get(path_of(keys), leaf),
        tree,
        is_leaf=lambda x: isinstance(x, P),
    )


def _turned(spec: P, path: str) -> P:
    """How `[layers, o, i]` lies if `[layers, i, o]` lies so; layers are whole everywhere."""
    layers, inputs, outputs = (*spec, None, None, None)[:3]
    if layers is not None:
        raise ValueError(f"{path}: layers are split over {layers}; quantized ones stay together")
    return P(None, outputs, inputs)


def _parts(sizes: Any, names: Any) -> int:
    found = 1
    for name in (names,) if isinstance(names, str) else names or ():
        found *= sizes[name]
    return found
