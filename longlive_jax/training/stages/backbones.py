"""Frozen backbones of distillation: read array by array, packed layer by layer, sharded at once."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from longlive_jax.interop.components import RUN_FIELDS
from longlive_jax.io.arrays import TreePath, flatten, nest
from longlive_jax.io.checkpoint import open_component
from longlive_jax.io.completeness import require_components
from longlive_jax.io.packed_kernels import read_quantization
from longlive_jax.models.wan import DiTConfig
from longlive_jax.parallel import rules
from longlive_jax.parallel.mesh import AXES
from longlive_jax.quant.frozen import fit_shards, freeze, frozen_specs
from longlive_jax.quant.policy import QuantPolicy, named
from longlive_jax.spec import UserError, build
from longlive_jax.training.stages.dit_training import put_shards
from longlive_jax.typing import Params
from pallas_kernels.dispatch import Implementation

__all__ = ["FrozenForm", "model_of", "read_backbone"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenForm:
    """The form in which devices keep the parameters of a frozen DiT.

    Attributes:
      policy: name of the policy that packs kernels.
      gradient: whether the model's activations have a gradient.
      dtype: dtype of kernels that are not packed; vectors are float32.
      implementation: implementation of quantize and matmul.
    """

    policy: str = "none"
    gradient: bool = False
    dtype: str = "bfloat16"
    implementation: Implementation = "auto"

    def apply(self, params: Params, mesh: Mesh) -> Params:
        """Parameters in this form, before they are divided over the mesh."""
        frozen = freeze(
            params,
            self.quantization,
            gradient=self.gradient,
            implementation=self.implementation,
            axes=AXES if mesh.size > 1 else (),
        )
        return jax.tree_util.tree_map_with_path(self._cast, frozen)

    @property
    def quantization(self) -> QuantPolicy:
        """The policy."""
        return named(self.policy)

    def abstract(self, model: Params, mesh: Mesh) -> tuple[Params, Any]:
        """Shapes and PartitionSpecs of a model of these shapes in this form.

        Raises ValueError if the policy does not fit the model, or the mesh does not divide it.
        """
        specs = rules.specs_for(rules.DIT, model)
        rules.check_divides(mesh, specs, model)

        def make(params: Params) -> Params:
            return fit_shards(self.apply(params, mesh), specs, mesh.shape)

        shapes = jax.eval_shape(make, model)
        return shapes, frozen_specs(shapes, specs)

    def dtype_of(self, name: str) -> Any:
        """Dtype of an array that is not packed, by the last name of its path."""
        return jnp.dtype(self.dtype if name == "kernel" else jnp.float32)

    def _cast(self, keys: tuple, leaf: Any) -> Any:
        """`leaf` in its dtype, unless it is a field of a packed kernel."""
        own = isinstance(keys[-1], jax.tree_util.DictKey)
        return leaf.astype(self.dtype_of(keys[-1].key)) if own else leaf


def model_of(folder: Path, **computing: Any) -> DiTConfig:
    """Configuration of a checkpoint's DiT, with these settings of the run.

    Raises UserError for a folder without a DiT, and for one whose matrices are packed.
    """
    stored = require_components(folder, "dit")["components"]["dit"]
    if read_quantization(folder, "dit") is not None:
        raise UserError(
            f"{folder}: its DiT is packed; give the checkpoint that it was packed from, and choose "
            "the format by config.precision"
        )
    settings = {k: v for k, v in stored.items() if k not in RUN_FIELDS} | computing
    return build(DiTConfig, settings, path=f"{folder}: dit")


def read_backbone(folder: Path, model: Params, form: FrozenForm, mesh: Mesh) -> Params:
    """The DiT of a checkpoint in a form, divided over the mesh.

    One array at a time is read, and one layer of a kernel at a time is packed, in float32.

    Args:
      folder: checkpoint directory.
      model: shapes of the DiT's parameters.
      form: form in which they are kept.
      mesh: devices.

    Raises UserError if the checkpoint is damaged or of another model.
    """
    # 1. What is read, and how it is divided.
    reader, _ = open_component(folder, "dit")
    _check_shapes(folder, {path: spec.shape for path, spec in reader.specs.items()}, model)
    formats, divided = form.quantization.formats(model), flatten(form.abstract(model, mesh)[1])
    plain = flatten(rules.specs_for(rules.DIT, model))
    # 2. Array by array.
    frozen = {}
    for path in flatten(model):
        if "/".join(path) in formats:
            layers = (_frozen_layer(path, layer, form, mesh) for layer in reader.layers(path))
            kernel = {path[-1]: _stacked(layers)}
            value = fit_shards(kernel, {path[-1]: plain[path]}, mesh.shape)[path[-1]]
        else:
            value = reader.read(path).astype(form.dtype_of(path[-1]), copy=False)
        frozen[path] = _on_mesh(value, divided[path], mesh)
    return nest(frozen)


def _frozen_layer(path: TreePath, layer: np.ndarray, form: FrozenForm, mesh: Mesh) -> Any:
    """A layer of a kernel in its packed form, on the host."""
    tree = form.apply(nest({path: jnp.asarray(layer, jnp.float32)}), mesh)
    return jax.device_get(flatten(tree)[path])


def _stacked(layers: Iterable[Any]) -> Any:
    """Packed kernels as one with a leading axis of layers, on the host."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)


def _on_mesh(value: Any, specs: Any, mesh: Mesh) -> Any:
    """Host arrays over the mesh: every device takes its own part."""
    return jax.tree.map(lambda array, spec: put_shards(np.asarray(array), mesh, spec), value, specs)


def _check_shapes(folder: Path, stored: Mapping[TreePath, tuple[int, ...]], model: Params) -> None:
    """Raises UserError for the first array that is not as the model has it."""
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(model).items()}
    for path in sorted({*stored, *expected}):
        if stored.get(path) != expected.get(path):
            raise UserError(
                f"{folder}: {'/'.join(path)} is {stored.get(path)} there and {expected.get(path)} "
                "in its settings; convert the checkpoint again"
            )
