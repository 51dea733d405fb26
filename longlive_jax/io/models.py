"""From a checkpoint directory to a model: settings, parameters, and a module around them."""

import os
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from longlive_jax.io.checkpoint import load_component
from longlive_jax.models.params import abstract, with_params
from longlive_jax.models.umt5 import UMT5, UMT5Config
from longlive_jax.models.vae import VAE, VAEConfig
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.spec import build

MODELS: dict[str, tuple[type, type]] = {
    "dit": (DiT, DiTConfig),
    "vae": (VAE, VAEConfig),
    "umt5": (UMT5, UMT5Config),
}


def load_model(
    folder: str | os.PathLike, name: str, *, param_dtype: DTypeLike | None = None, **run: Any
) -> Any:
    """The module of component `name` ("dit", "vae" or "umt5") with its parameters.

    `run` sets what a run may choose, such as `dtype` of the computation; `param_dtype` casts the
    parameters while they are read. Raises UserError for a missing, foreign or damaged directory.
    """
    make, config = MODELS[name]
    params, settings = load_component(folder, name, dtype=param_dtype)
    cfg: Any = build(config, settings | run, path=f"{folder}: settings of {name}")
    graphdef, _ = abstract(lambda: make(cfg, rngs=nnx.Rngs(0)))
    return with_params(graphdef, params)
