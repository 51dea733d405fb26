"""From a checkpoint directory to a model: settings, parameters, and a module around them."""

import os
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from longlive_jax.io.arrays import flatten
from longlive_jax.io.checkpoint import load_component, open_component
from longlive_jax.io.packed_kernels import check, record_of, restore
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.umt5 import UMT5, UMT5Config
from longlive_jax.models.vae import VAE, VAEConfig
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.spec import build
from pallas_kernels.dispatch import Implementation

MODELS: dict[str, tuple[type, type]] = {
    "dit": (DiT, DiTConfig),
    "vae": (VAE, VAEConfig),
    "umt5": (UMT5, UMT5Config),
}


def load_model(
    folder: str | os.PathLike,
    name: str,
    *,
    param_dtype: DTypeLike | None = None,
    implementation: Implementation = "auto",
    **run: Any,
) -> Any:
    """The module of component `name` ("dit", "vae" or "umt5") with its parameters.

    `run` sets what a run may choose, such as `dtype` of the computation; `param_dtype` casts the
    parameters while they are read, and `implementation` is of the products of packed kernels, which
    are loaded as they are. Raises UserError for a missing, foreign or damaged directory.
    """
    make, config = MODELS[name]
    reader, settings = open_component(folder, name)
    cfg: Any = build(config, settings | run, path=f"{folder}: settings of {name}")
    graphdef, shapes = abstract(lambda: make(cfg, rngs=nnx.Rngs(0)))
    record = record_of(folder, name)
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(shapes).items()}
    check(reader.specs, record, expected, str(folder))
    params, _ = load_component(folder, name, dtype=param_dtype)
    if record is not None:
        params = restore(params, record, implementation=implementation)
    return with_params(graphdef, params)
