"""LongLive-2.0's released packed checkpoints, `model_4o6.pt` (reference format 1): read and write.

    {"generator": {...}, "checkpoint_format": "longlive_generator_nvfp4", "quantization": {...}}

Each of the 300 matrices `[n, k]` is stored, instead of `weight`, as four tensors below the name of
its module:

    quantized_weight_values           uint8 [N, K/2]           zero-padded: N to 128, K to 64
    quantized_weight_scale_factors    float8_e4m3fn [N*K/16]   swizzled for tensor cores
    quantized_weight_amax             float32 [1], or [] from the reference's other back ends
    quantized_weight_metadata         int32 [n, k, N, K]

Everything else is bfloat16 under the usual names. Reading removes the padding and writing restores
it; codes, scales, amax and metadata survive a round trip bit for bit.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from longlive_jax.interop.keytable import KeyRule
from longlive_jax.interop.safetensors_file import OutputTensor
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.io.packed_kernels import KernelFormat, QuantizationRecord
from longlive_jax.spec import UserError
from pallas_kernels.nvfp4 import BLOCK, RULES, swizzle, unswizzle

__all__ = [
    "ARRAY_NAMES",
    "RELEASED_FORMAT",
    "ReleasedHeader",
    "checkpoint_dict",
    "from_released",
    "is_packed",
    "key_rules",
    "module_name",
    "read_header",
    "to_released",
]

RELEASED_FORMAT, RELEASED_VERSION = "longlive_generator_nvfp4", 1
TENSOR_PREFIX = "quantized_weight_"
ROW_MULTIPLE, COLUMN_MULTIPLE = 128, 64
"""Multiples to which the rows and columns of a matrix are padded."""
ARRAY_NAMES = {"values": "codes", "scale_factors": "scales", "amax": "amax"}
"""Our names of the arrays, by those in the file."""


def is_packed(state: Mapping[str, Any]) -> bool:
    """Whether a state dict contains packed matrices."""
    return any(str(key).endswith(f"{TENSOR_PREFIX}values") for key in state)


def key_rules(theirs: str, ours: str) -> list[KeyRule]:
    """Key rules of one packed linear layer, for tensors that `from_released` has converted."""
    names = ((f"{theirs}.{TENSOR_PREFIX}{t}", f"{ours}.kernel.{o}") for t, o in ARRAY_NAMES.items())
    return [KeyRule(key, path, optional=True) for key, path in names]


@dataclasses.dataclass(frozen=True)
class ReleasedHeader:
    """Metadata of a packed checkpoint.

    Attributes:
      weights: scale rule of the weights.
      activations: scale rule of the activations.
      header: all plain values next to the state dict, kept for the export.
    """

    weights: str
    activations: str
    header: Mapping[str, Any]

    def record(self, kernels: list[str]) -> QuantizationRecord:
        """The quantization record for the manifest, given the paths of the packed kernels."""
        form = KernelFormat("nvfp4", self.weights, 1, self.activations)  # type: ignore[arg-type]
        merged = str(self.header.get("source_lora_ckpt") or "")
        return QuantizationRecord(
            "nvfp4", dict.fromkeys(kernels, form), merged, header=dict(self.header)
        )


def read_header(contents: Any, where: str) -> ReleasedHeader:
    """The metadata next to a packed state dict.

    Files without metadata (safetensors) are assumed to follow the reference: rule mse for both.
    Raises UserError, naming the file `where`, for another format, version or scale rule.
    """
    # 1. Format and version.
    is_mapping = isinstance(contents, Mapping)
    header = {k: v for k, v in contents.items() if _is_plain(v)} if is_mapping else {}
    quantization = header.get("quantization") or {}
    if not isinstance(quantization, Mapping):
        raise UserError(
            f"{where}: quantization must be a dictionary, got {type(quantization).__name__}; copy "
            "or download the file again"
        )
    checks = (
        ("checkpoint_format", header.get("checkpoint_format", RELEASED_FORMAT), RELEASED_FORMAT),
        (
            "checkpoint_version",
            header.get("checkpoint_version", RELEASED_VERSION),
            RELEASED_VERSION,
        ),
        ("quantization.format", quantization.get("format", "nvfp4"), "nvfp4"),
        ("quantization.materialized", quantization.get("materialized", True), True),
    )
    for name, value, expected in checks:
        if value != expected:
            raise UserError(
                f"{where}: {name} must be {expected!r}, got {value!r}; convert the bfloat16 "
                "checkpoint, and pack it with `longlive quantize`"
            )
    # 2. Scale rules.
    weights, activations = _scale_rules(quantization, where)
    return ReleasedHeader(weights, activations, header)


def _scale_rules(quantization: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Scale rules of weights and activations, which may be nested in `rules`."""
    rules = quantization.get("rules")
    settings = {**quantization, **(rules if isinstance(rules, Mapping) else {})}
    weights, activations = (
        settings.get(f"{what}_scale_rule") or settings.get("scale_rule") or "mse"
        for what in ("weight", "activation")
    )
    for what, rule in (("weights", weights), ("activations", activations)):
        if rule not in RULES:
            raise UserError(
                f"{where}: unknown scale rule {rule!r} of {what}; known: {', '.join(RULES)}"
            )
    if settings.get("weight_scale_2d"):
        raise UserError(
            f"{where}: its weights are in 16x16 blocks, which are for training; only 1x16 blocks "
            "are read. Convert the bfloat16 checkpoint, and pack it with `longlive quantize`"
        )
    return str(weights), str(activations)


def _is_plain(value: Any) -> bool:
    """Whether a value can be stored in a manifest."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def from_released(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """A state dict with the packed matrices in our layout.

    Values lose their padding, scales are unswizzled to rows, and amax becomes a scalar. The
    metadata tensors are validated and removed. Raises UserError that names the first matrices
    whose tensors do not match their metadata.
    """
    result, problems = dict(tensors), []
    for key in tensors:
        module = module_name(key)
        if key != f"{module}.{TENSOR_PREFIX}values":
            continue
        try:
            result |= _matrix_from_released(result, module)
        except ValueError as error:
            problems.append(f"{module}: {error}")
    metadata = f"{TENSOR_PREFIX}metadata"
    result = {key: tensor for key, tensor in result.items() if not key.endswith(metadata)}
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{where}: damaged NVFP4 weights: {'; '.join(problems[:4])}{more}; copy or download "
            "the file again"
        )
    return result


def _matrix_from_released(tensors: Mapping[str, LazyTensor], module: str) -> dict[str, LazyTensor]:
    """Values, scales and amax of one matrix in our layout.

    Raises ValueError if a tensor is missing or does not match the metadata.
    """
    # 1. The tensors in the file.
    names = (*ARRAY_NAMES, "metadata")
    missing = [name for name in names if f"{module}.{TENSOR_PREFIX}{name}" not in tensors]
    if missing:
        raise ValueError(f"{', '.join(TENSOR_PREFIX + name for name in missing)} missing")
    values, scales, amax, metadata = (tensors[f"{module}.{TENSOR_PREFIX}{name}"] for name in names)
    rows, columns = _matrix_size(metadata, values, scales, amax)

    # 2. The arrays in our layout, computed when they are read.
    def read_codes() -> np.ndarray:
        padded = values.read()
        if padded[rows:].any() or padded[:, columns // 2 :].any():
            raise UserError(f"{module}: its padding is not zero; copy or download the file again")
        return np.ascontiguousarray(padded[:rows, : columns // 2])

    def read_scales() -> np.ndarray:
        return np.asarray(unswizzle(jnp.asarray(scales.read()), rows, columns // BLOCK))

    arrays: dict[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]] = {
        "values": ((rows, columns // 2), values.dtype, read_codes),
        "scale_factors": ((rows, columns // BLOCK), scales.dtype, read_scales),
        "amax": ((), amax.dtype, lambda: amax.read().reshape(())),
    }
    return {f"{module}.{TENSOR_PREFIX}{name}": LazyTensor(*array) for name, array in arrays.items()}


def _matrix_size(
    metadata: LazyTensor, values: LazyTensor, scales: LazyTensor, amax: LazyTensor
) -> tuple[int, int]:
    """Rows and columns of a matrix without padding.

    Raises ValueError if the shapes and dtypes of the tensors do not match the metadata.
    """
    # 1. The metadata.
    if metadata.shape != (4,) or not np.issubdtype(metadata.dtype, np.integer):
        raise ValueError(f"metadata must be four integers, got {metadata.dtype} {metadata.shape}")
    rows, columns, padded_rows, padded_columns = map(int, metadata.read())
    if rows < 1 or columns < 1 or columns % BLOCK:
        raise ValueError(f"{rows} x {columns} is not a matrix in blocks of {BLOCK}")
    padded = (padded_rows, padded_columns)
    if padded != (expected := (_round_up(rows, ROW_MULTIPLE), _round_up(columns, COLUMN_MULTIPLE))):
        raise ValueError(f"{rows} x {columns} is padded to {padded} instead of {expected}")
    # 2. The tensors.
    blocks = padded_rows * padded_columns // BLOCK
    specs = (
        ("values", values, "uint8", [(padded_rows, padded_columns // 2)]),
        ("scale_factors", scales, "float8_e4m3fn", [(blocks,)]),
        ("amax", amax, "float32", [(1,), ()]),
    )
    for name, tensor, dtype, shapes in specs:
        if tensor.shape not in shapes or tensor.dtype.name != dtype:
            got = f"{tensor.dtype} {tensor.shape}"
            raise ValueError(f"{name} is {got}, its metadata says {dtype} {shapes[0]}")
    return rows, columns


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def module_name(key: str) -> str:
    """The module of a packed tensor's key."""
    return key.rpartition(f".{TENSOR_PREFIX}")[0]


def checkpoint_dict(
    tensors: Mapping[str, OutputTensor], record: QuantizationRecord
) -> dict[str, Any]:
    """Contents of a packed checkpoint: the state dict and its metadata.

    The metadata is that of the file the weights came from (`record.header`), or new.
    """
    form = next(iter(record.kernels.values()))
    header: dict[str, Any] = dict(record.header) or {
        "source_generator_ckpt": None,
        "source_lora_ckpt": record.merged_lora or None,
        "merged_lora": bool(record.merged_lora),
        "model_name": "Wan2.2-TI2V-5B",
        "quantization": {
            "format": "nvfp4",
            "backend": "longlive-jax",
            "materialized": True,
            "dtype": "bfloat16",
            "rules": {"weight_scale_rule": form.weights, "activation_scale_rule": form.activations},
        },
    }
    version = {"checkpoint_format": RELEASED_FORMAT, "checkpoint_version": RELEASED_VERSION}
    return {"generator": {f"model.{k}": t for k, t in tensors.items()}} | version | header


def to_released(
    module: str, shape: tuple[int, int], read: Callable[[str], np.ndarray]
) -> dict[str, OutputTensor]:
    """The tensors of one packed matrix in the reference's layout.

    Args:
      module: name of the module.
      shape: rows and columns `(n, k)` of the matrix.
      read: function from our array name to the array: codes uint8 `[n, k/2]`, scales `[n, k/16]`,
        amax `[]`.
    """
    rows, columns = shape
    padded = (_round_up(rows, ROW_MULTIPLE), _round_up(columns, COLUMN_MULTIPLE))

    def values() -> np.ndarray:
        return _zero_pad(read("codes"), (padded[0], padded[1] // 2))

    def scales() -> np.ndarray:
        padded_scales = _zero_pad(read("scales"), (padded[0], padded[1] // BLOCK))
        return np.asarray(swizzle(jnp.asarray(padded_scales)))

    metadata = np.array([rows, columns, *padded], np.int32)
    tensors = {
        "values": OutputTensor((padded[0], padded[1] // 2), np.dtype(np.uint8), values),
        "scale_factors": OutputTensor(
            (padded[0] * padded[1] // BLOCK,), np.dtype(ml_dtypes.float8_e4m3fn), scales
        ),
        "amax": OutputTensor((1,), np.dtype(np.float32), lambda: read("amax").reshape(1)),
        "metadata": OutputTensor((4,), np.dtype(np.int32), functools.partial(np.array, metadata)),
    }
    return {f"{module}.{TENSOR_PREFIX}{name}": tensor for name, tensor in tensors.items()}


def _zero_pad(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape, array.dtype)
    out[: array.shape[0], : array.shape[1]] = array
    return out
