"""Loading models from a checkpoint directory."""

import os
from typing import Any

from flax import nnx
from jax.typing import DTypeLike

from longlive_jax.io.arrays import flatten
from longlive_jax.io.checkpoint import load_component, open_component
from longlive_jax.io.packed_kernels import check_packed_arrays, read_quantization, restore_packed
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
    """The module of a component, with its parameters.

    Args:
      folder: checkpoint directory.
      name: component: "dit", "vae" or "umt5".
      param_dtype: floating-point dtype of the parameters; as stored if None. Packed kernels keep
        their dtypes.
      implementation: implementation of the matrix products with packed kernels.
      **run: config fields that do not change the weights, such as the compute `dtype`.

    Raises UserError if the directory is missing, not a checkpoint, or damaged.
    """
    # 1. Settings, and the shapes that the model expects.
    make, config = MODELS[name]
    reader, settings = open_component(folder, name)
    cfg: Any = build(config, settings | run, path=f"{folder}: settings of {name}")
    graphdef, shapes = abstract(lambda: make(cfg, rngs=nnx.Rngs(0)))
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(shapes).items()}
    # 2. Packed kernels, checked before an array is read.
    record = read_quantization(folder, name)
    check_packed_arrays(reader.specs, record, expected, str(folder))
    # 3. Parameters.
    params, _ = load_component(folder, name, dtype=param_dtype)
    if record is not None:
        params = restore_packed(params, record, implementation=implementation)
    return with_params(graphdef, params)
