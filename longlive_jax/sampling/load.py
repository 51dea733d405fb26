"""Loads the DiT in the requested precision: the checkpoint's own, or quantized at load time.

Everything that cannot work raises before weights are read: a policy other than that of a quantized
checkpoint, widths that do not split into blocks, an implementation that does not run here.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from longlive_jax.io.arrays import nest
from longlive_jax.io.checkpoint import open_component
from longlive_jax.io.models import load_model
from longlive_jax.io.packed_kernels import (
    KernelFormat,
    QuantizationRecord,
    dense_shapes,
    read_quantization,
)
from longlive_jax.models.params import params_of, with_params
from longlive_jax.models.per_layer import unstack
from longlive_jax.models.wan import DiT
from longlive_jax.quant.packed import quantize_params
from longlive_jax.quant.policy import Format, QuantSpec, named
from longlive_jax.spec import UserError
from longlive_jax.typing import Params
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.nvfp4 import select_implementation

__all__ = ["PLATFORMS_WITH_LAYERS_APART", "check_quantization", "layers_apart", "load_dit"]

PLATFORMS_WITH_LAYERS_APART = ("gpu", "cuda")
"""Where loaded parameters and caches have an array per layer. A loop over stacks copies them, which
costs more there than the longer compilation of an unrolled loop."""


def load_dit(
    folder: str | os.PathLike, quant: QuantSpec, *, param_dtype: DTypeLike, dtype: DTypeLike
) -> DiT:
    """The DiT of a checkpoint directory, with quantized kernels if it or `quant` has a policy.

    Args:
      folder: checkpoint directory.
      quant: "none" as its policy loads the checkpoint unchanged. Any other policy must be that of a
        quantized checkpoint; a checkpoint that is not quantized is quantized here.
      param_dtype: dtype of all parameters that are not quantized.
      dtype: dtype of the computation.

    Raises UserError for a policy or an implementation that cannot work.
    """
    is_packed, formats = check_quantization(folder, quant)
    if is_packed or not formats:
        return load_model(
            folder, "dit", param_dtype=param_dtype, dtype=dtype, implementation=quant.implementation
        )
    dit = load_model(folder, "dit", dtype=dtype)
    packed = quantize_params(
        params_of(dit),
        named(quant.policy),
        implementation=quant.implementation,
        dtype=jnp.dtype(param_dtype),
    )
    return with_params(dit, packed)


def check_quantization(
    folder: str | os.PathLike, quant: QuantSpec
) -> tuple[bool, dict[str, Format]]:
    """Whether a checkpoint is quantized, and the formats of its kernels under `quant`.

    Reads no weights. Raises UserError for a policy or an implementation that cannot work.
    """
    formats, record = _formats(folder, quant), read_quantization(folder)
    if record is not None:
        _check_same(folder, record, formats, quant)
        formats = {name: kernel.form for name, kernel in record.kernels.items()}
    _check_available(formats, quant)
    return record is not None, formats


def layers_apart(params: Params, *, consume: bool = False) -> Params:
    """Parameters of a DiT whose layers have arrays of their own; see `models.per_layer`.

    A cache for them is `empty_cache(..., per_layer=True)`. With `consume` the stacks are deleted
    one by one.
    """
    return params | {"blocks": unstack(params["blocks"], consume=consume)}


def _formats(folder: str | os.PathLike, quant: QuantSpec) -> dict[str, Format]:
    """Formats of this checkpoint's kernels under the policy, from the manifest alone."""
    reader, _ = open_component(folder, "dit")
    shapes = dense_shapes({path: spec.shape for path, spec in reader.specs.items()})
    tree = nest({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    try:
        return named(quant.policy).formats(tree)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error


def _check_same(
    folder: str | os.PathLike,
    record: QuantizationRecord,
    formats: dict[str, Format],
    quant: QuantSpec,
) -> None:
    """UserError if the policy differs from that of the quantized checkpoint."""
    kernels = {name: KernelFormat.of(form) for name, form in formats.items()}
    if kernels and kernels != dict(record.kernels):
        forms = "; ".join(map(str, dict.fromkeys(formats.values())))
        raise UserError(
            f"quant.policy is {quant.policy} ({forms}), but {Path(folder)} is packed as "
            f"{record.describe()}; leave quant.policy out, or use a checkpoint that is not packed"
        )


def _check_available(formats: dict[str, Format], quant: QuantSpec) -> None:
    """UserError if the implementation is named and does not run here."""
    kinds, name = {form.kind for form in formats.values()}, quant.implementation
    if not kinds and name != "auto":
        raise UserError(
            f"quant.implementation is {name}, but nothing is quantized; set quant.policy to nvfp4"
        )
    if "fp8" in kinds and name not in ("auto", "xla"):
        raise UserError(
            f"quant.implementation is {name}, but FP8 products have only XLA's; use auto or xla"
        )
    if "nvfp4" in kinds:
        try:
            for op in ("matmul", "quantize"):
                select_implementation(op, implementation=name)
        except (Unsupported, ValueError) as error:
            raise UserError(f"quant.implementation: {error}") from error
