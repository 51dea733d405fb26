"""Golden files, and models with their weights, loaded in the same way as by the converter."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.interop.components import COMPONENTS, Component, expected_shapes, identify
from longlive_jax.interop.keytable import KeyTable, Leaf
from longlive_jax.io.arrays import flatten, nest
from longlive_jax.models.params import abstract, with_params
from longlive_jax.typing import Params


class Golden:
    """A golden file.

    Attributes:
      arrays: arrays of the file by name; weights are under `w/<original key>`.
      meta: settings of the file.
    """

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as file:
            self.arrays: dict[str, np.ndarray] = {key: file[key] for key in file.files}
        if "__meta__" not in self.arrays:
            raise ValueError("has no __meta__, so it is not a golden file")
        self.meta: dict[str, Any] = json.loads(bytes(self.arrays.pop("__meta__")))

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `prefix`, by the rest of their names."""
        return {
            key.removeprefix(prefix): value
            for key, value in self.arrays.items()
            if key.startswith(prefix)
        }

    def frames(self, key: str, channels: int) -> jnp.ndarray:
        """Latents or pixels `[b, f, h, w, c]`, whose channels are axis `channels` in the file."""
        return jnp.asarray(np.moveaxis(self.arrays[key], channels, -1))

    @functools.cached_property
    def dit(self) -> "Model":
        """The DiT with the file's weights and `meta["config"]`."""
        return load("dit", self.under("w/"), self.meta["config"])


@dataclasses.dataclass(frozen=True)
class Model:
    """A model from a state dict.

    Attributes:
      config: settings of the model.
      graphdef: graph definition of the module.
      params: parameters of the module.
      leaves: arrays of `params` with their keys in the state dict.
    """

    config: Any
    graphdef: nnx.GraphDef
    params: Params
    leaves: Sequence[Leaf]

    def around(self, params: Params) -> Any:
        """The module with other parameters."""
        return with_params(self.graphdef, params)

    def state_dict(self, tree: Params, keys: Sequence[str]) -> dict[str, np.ndarray]:
        """The entries `keys` of a tree like `params` (such as gradients), by original key."""
        flat = flatten(tree)
        out: dict[str, np.ndarray] = {}
        for leaf in self.leaves:
            value = np.asarray(flat[leaf.path])
            for layer, key in enumerate(leaf.keys):
                if key in keys:
                    out[key] = leaf.to_tensor(value[layer] if leaf.rule.stacked else value)
        return out


def load(name: str, tensors: Mapping[str, np.ndarray], hints: Mapping[str, Any]) -> Model:
    """Component `name` ("dit", "vae" or "umt5") from a state dict in original naming.

    This follows the conversion: the naming is recognised, settings are inferred from the shapes and
    checked against `hints`, and exactly the expected keys must exist in the expected shapes.
    """
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    component, table = identify(shapes, "weights of the golden")
    if component.name != name:
        raise ValueError(f"weights are those of {component.name}, not of {name}")
    collected = table.match_keys(shapes)
    collected.report.check(table.name)
    return assemble(component, table, tensors, component.settings(collected.shapes, hints))


def assemble(
    component: Component, table: KeyTable, tensors: Mapping[str, np.ndarray], config: Any
) -> Model:
    """A model with settings `config` from a state dict, through a key table."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    leaves = table.forward(shapes, expected=expected_shapes(component, config))
    flat = {}
    for leaf in leaves:
        layers = [leaf.to_param(tensors[key]) for key in leaf.keys]
        flat[leaf.path] = jnp.asarray(np.stack(layers) if leaf.rule.stacked else layers[0])
    make = component.make
    if make is None:
        raise ValueError(f"{component.name} is not a model by itself")
    graphdef, _ = abstract(lambda: make(config))
    return Model(config, graphdef, nest(flat), leaves)


def zeros_for(
    table: KeyTable, expected: Mapping[tuple[str, ...], tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """A state dict of zeros with all keys of a model with these shapes."""
    out: dict[str, np.ndarray] = {}
    for leaf in table.backward(expected):
        shape = leaf.shape[1:] if leaf.rule.stacked else leaf.shape
        out |= {key: leaf.to_tensor(np.zeros(shape, np.float32)) for key in leaf.keys}
    return out


VAE = COMPONENTS["vae"]
