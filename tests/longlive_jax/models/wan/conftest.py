"""Golden files of the DiT, with parameters as trees and arrays channels-last."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.interop.keys_dit import ORIGINAL
from longlive_jax.models.params import abstract
from longlive_jax.models.wan import DiT, DiTConfig

RENAMED = {
    "num_heads": "heads",
    "num_layers": "layers",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
}


def nested(leaves):
    """{path: array} as nested dictionaries."""
    out = {}
    for path, value in leaves.items():
        *parents, name = path
        branch = out
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return out


class Golden:
    """Arrays, meta data, model and parameters of one golden file."""

    def __init__(self, path, **settings):
        with np.load(path) as z:
            self.arrays = {key: z[key] for key in z.files if key != "__meta__"}
            self.meta = json.loads(bytes(z["__meta__"]))
        fields = {RENAMED.get(key, key): value for key, value in self.meta["config"].items()}
        self.cfg = DiTConfig(**fields, **settings)
        self.graphdef, self.shapes = abstract(lambda: DiT(self.cfg, rngs=nnx.Rngs(0)))
        self.params = self.tree("w/")

    def tree(self, prefix):
        """Tensors under a prefix, in original naming, as a parameter tree."""
        names = [name for name in self.arrays if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): self.arrays[name] for name in names}
        leaves = ORIGINAL.forward({key: value.shape for key, value in tensors.items()})
        params = {}
        for leaf in leaves:
            arrays = [leaf.to_param(tensors[key]) for key in leaf.keys]
            params[leaf.path] = jnp.asarray(np.stack(arrays) if leaf.rule.stacked else arrays[0])
        return nested(params)

    def video(self, name):
        """An array [b, c, f, h, w] with channels last."""
        return jnp.asarray(np.moveaxis(self.arrays[name], 1, -1))

    def __getitem__(self, name):
        return jnp.asarray(self.arrays[name])


@pytest.fixture(scope="session")
def bidirectional(goldens):
    return Golden(goldens / "dit_bidirectional.npz")


@pytest.fixture(scope="session")
def forced(goldens):
    return Golden(goldens / "dit_teacher_forcing.npz")
