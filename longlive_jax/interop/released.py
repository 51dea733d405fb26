"""The packed checkpoints of LongLive-2.0, `model_4o6.pt` (reference format 1): in and out.

    {"generator": {...}, "checkpoint_format": "longlive_generator_nvfp4", "quantization": {...}}

For each of the 300 matrices `[n, k]` it holds, below the module's name,

    quantized_weight_values           uint8 [N, K/2]           rows to 128, columns to 64, zeros
    quantized_weight_scale_factors    float8_e4m3fn [N*K/16]   in the order of tensor cores
    quantized_weight_amax             float32 [1], or [] from the reference's other back ends
    quantized_weight_metadata         int32 [n, k, N, K]

and no `weight`; everything else is bfloat16 under the usual names. Reading drops the padding, and
writing puts it back: codes, scales, amax and metadata are the same bits again.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from longlive_jax.interop.keytable import KeyRule
from longlive_jax.interop.safetensors_file import Outgoing
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.io.packed_kernels import Kernel, Record
from longlive_jax.spec import UserError
from pallas_kernels.nvfp4 import BLOCK, RULES, swizzle, unswizzle

__all__ = [
    "FORMAT",
    "Packed",
    "header_of",
    "is_packed",
    "module_of",
    "parts_of",
    "rules",
    "tensors_of",
    "whole",
]

FORMAT, VERSION = "longlive_generator_nvfp4", 1
STEM = "quantized_weight_"
ROWS, COLUMNS = 128, 64
"""Multiples that values are padded to."""
PARTS = {"values": "codes", "scale_factors": "scales", "amax": "amax"}
"""Their names of the arrays to ours."""


def is_packed(state: Mapping[str, Any]) -> bool:
    """Whether a state dict holds packed matrices."""
    return any(str(key).endswith(f"{STEM}values") for key in state)


def rules(theirs: str, ours: str) -> list[KeyRule]:
    """Key rules of one packed linear, for tensors that `parts_of` has put in our form."""
    names = ((f"{theirs}.{STEM}{t}", f"{ours}.kernel.{o}") for t, o in PARTS.items())
    return [KeyRule(key, path, optional=True) for key, path in names]


@dataclasses.dataclass(frozen=True)
class Packed:
    """What the values around the state dict say: scale rules of weights and activations."""

    weights: str
    activations: str
    header: Mapping[str, Any]

    def record(self, kernels: list[str]) -> Record:
        """For the manifest, given the paths of the packed kernels."""
        form = Kernel("nvfp4", self.weights, 1, self.activations)  # type: ignore[arg-type]
        merged = str(self.header.get("source_lora_ckpt") or "")
        return Record("nvfp4", dict.fromkeys(kernels, form), merged, header=dict(self.header))


def header_of(value: Any, where: str) -> Packed:
    """Reads the values around a packed state dict; UserError for another format or other rules.

    Files without such values (safetensors) are taken for the reference's: rule mse for both.
    """
    header = {k: v for k, v in value.items() if _plain(v)} if isinstance(value, Mapping) else {}
    found = header.get("quantization") or {}
    wrong = {
        "checkpoint_format": (header.get("checkpoint_format", FORMAT), FORMAT),
        "checkpoint_version": (header.get("checkpoint_version", VERSION), VERSION),
        "quantization.format": (found.get("format", "nvfp4"), "nvfp4"),
        "quantization.materialized": (found.get("materialized", True), True),
    }
    for name, (said, wanted) in wrong.items():
        if said != wanted:
            raise UserError(
                f"{where}: {name} is {said!r} and {wanted!r} is read; convert the bfloat16 "
                "checkpoint, and pack it with `longlive quantize`"
            )
    named = found.get("rules")
    given = {**found, **(named if isinstance(named, Mapping) else {})}
    weights, activations = (
        given.get(f"{what}_scale_rule") or given.get("scale_rule") or "mse"
        for what in ("weight", "activation")
    )
    for what, rule in (("weights", weights), ("activations", activations)):
        if rule not in RULES:
            raise UserError(f"{where}: scale rule {rule!r} of {what}; known: {', '.join(RULES)}")
    if given.get("weight_scale_2d"):
        raise UserError(f"{where}: weights in 16x16 blocks are of training; 1x16 ones are read")
    return Packed(str(weights), str(activations), header)


def _plain(value: Any) -> bool:
    """Whether a value can stand in a manifest."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def parts_of(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """The state dict with packed matrices without padding, scales row by row and amax a scalar.

    Their metadata is read and judged here, and gone. Raises UserError naming everything that
    does not fit.
    """
    plain, wrong = dict(tensors), []
    for key in tensors:
        module = module_of(key)
        if key != f"{module}.{STEM}values":
            continue
        try:
            plain |= _parts(plain, module)
        except ValueError as error:
            wrong.append(f"{module}: {error}")
    plain = {key: tensor for key, tensor in plain.items() if not key.endswith(f"{STEM}metadata")}
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{where}: damaged NVFP4 weights: {'; '.join(wrong[:4])}{more}")
    return plain


def _parts(tensors: Mapping[str, LazyTensor], module: str) -> dict[str, LazyTensor]:
    """The three tensors of one matrix in our form; ValueError if its metadata does not fit."""
    lacking = [n for n in (*PARTS, "metadata") if f"{module}.{STEM}{n}" not in tensors]
    if lacking:
        raise ValueError(f"without {', '.join(STEM + name for name in lacking)}")
    values, scales, amax, metadata = (
        tensors[f"{module}.{STEM}{name}"] for name in (*PARTS, "metadata")
    )
    rows, columns = _sizes(metadata, values, scales, amax)

    def codes() -> np.ndarray:
        whole = values.read()
        if whole[rows:].any() or whole[:, columns // 2 :].any():
            raise UserError(f"{module}: its padding is not zero; copy or download the file again")
        return np.ascontiguousarray(whole[:rows, : columns // 2])

    def ordered() -> np.ndarray:
        return np.asarray(unswizzle(jnp.asarray(scales.read()), rows, columns // BLOCK))

    made: dict[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]] = {
        "values": ((rows, columns // 2), values.dtype, codes),
        "scale_factors": ((rows, columns // BLOCK), scales.dtype, ordered),
        "amax": ((), amax.dtype, lambda: amax.read().reshape(())),
    }
    return {f"{module}.{STEM}{name}": LazyTensor(*tensor) for name, tensor in made.items()}


def _sizes(
    metadata: LazyTensor, values: LazyTensor, scales: LazyTensor, amax: LazyTensor
) -> tuple[int, int]:
    """Rows and columns without padding, once everything is found to agree."""
    if metadata.shape != (4,) or not np.issubdtype(metadata.dtype, np.integer):
        raise ValueError(f"metadata is {metadata.dtype} {metadata.shape}, not four whole numbers")
    rows, columns, padded_rows, padded_columns = map(int, metadata.read())
    if rows < 1 or columns < 1 or columns % BLOCK:
        raise ValueError(f"{rows} x {columns} is no matrix in blocks of {BLOCK}")
    found = (padded_rows, padded_columns)
    if found != (wanted := (_up(rows, ROWS), _up(columns, COLUMNS))):
        raise ValueError(f"{rows} x {columns} padded to {found} instead of {wanted}")
    blocks = padded_rows * padded_columns // BLOCK
    want = (
        ("values", values, "uint8", [(padded_rows, padded_columns // 2)]),
        ("scale_factors", scales, "float8_e4m3fn", [(blocks,)]),
        ("amax", amax, "float32", [(1,), ()]),
    )
    for name, tensor, dtype, shapes in want:
        if tensor.shape not in shapes or tensor.dtype.name != dtype:
            said = f"{tensor.dtype} {tensor.shape}"
            raise ValueError(f"{name} is {said}, its metadata says {dtype} {shapes[0]}")
    return rows, columns


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def module_of(key: str) -> str:
    """The module that a packed tensor belongs to."""
    return key.rpartition(f".{STEM}")[0]


def whole(tensors: Mapping[str, Outgoing], record: Record) -> dict[str, Any]:
    """What the file holds: the values around the state dict are those it was read with, if any."""
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
    about = {"checkpoint_format": FORMAT, "checkpoint_version": VERSION}
    return {"generator": {f"model.{k}": t for k, t in tensors.items()}} | about | header


def tensors_of(
    module: str, shape: tuple[int, int], read: Callable[[str], np.ndarray]
) -> dict[str, Outgoing]:
    """The tensors of one packed matrix `[n, k]` as the reference saves them.

    `read` gives an array by our name: codes uint8 `[n, k/2]`, scales `[n, k/16]`, amax `[]`.
    """
    rows, columns = shape
    padded = (_up(rows, ROWS), _up(columns, COLUMNS))

    def values() -> np.ndarray:
        return _enlarged(read("codes"), (padded[0], padded[1] // 2))

    def scales() -> np.ndarray:
        whole = _enlarged(read("scales"), (padded[0], padded[1] // BLOCK))
        return np.asarray(swizzle(jnp.asarray(whole)))

    metadata = np.array([rows, columns, *padded], np.int32)
    made = {
        "values": Outgoing((padded[0], padded[1] // 2), np.dtype(np.uint8), values),
        "scale_factors": Outgoing(
            (padded[0] * padded[1] // BLOCK,), np.dtype(ml_dtypes.float8_e4m3fn), scales
        ),
        "amax": Outgoing((1,), np.dtype(np.float32), lambda: read("amax").reshape(1)),
        "metadata": Outgoing((4,), np.dtype(np.int32), functools.partial(np.array, metadata)),
    }
    return {f"{module}.{STEM}{name}": tensor for name, tensor in made.items()}


def _enlarged(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    out = np.zeros(shape, array.dtype)
    out[: array.shape[0], : array.shape[1]] = array
    return out
