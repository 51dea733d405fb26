"""Packed kernels on disk: plain arrays below the kernel's path, and a record of their formats.

    array                         NVFP4                                       FP8
    blocks.ffn.up.kernel.codes    uint8 [layers, o, i/2], low nibble first    float8_e4m3fn
    blocks.ffn.up.kernel.scales   float8_e4m3fn [layers, o, i/16]             float32 [layers, o]
    blocks.ffn.up.kernel.amax     float32 [layers]                            none
    blocks.ffn.up.kernel.{a,b}    LoRA branch, if there is one                the same

The manifest's `quantization` records which kernels of a component are packed, and how
(`QuantizationRecord`). Shapes and dtypes are checked against this record and against the model
before an array is read.
"""

import dataclasses
import os
from collections.abc import Container, Mapping
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from longlive_jax.io.arrays import ArraySpec, Shape, TreePath, flatten, nest
from longlive_jax.io.checkpoint import (
    PACKED_ARRAYS,
    QUANTIZATION_KEY,
    is_packed_array,
    read_manifest,
)
from longlive_jax.quant.low_rank import LowRank
from longlive_jax.quant.packed import Fp8Kernel, PackedKernel, scale_layout
from longlive_jax.quant.policy import Format
from longlive_jax.spec import UserError, build
from pallas_kernels.dispatch import Implementation
from pallas_kernels.nvfp4 import BLOCK, NVFP4, Rule, pack, unpack, with_scale_layout

__all__ = [
    "KernelFormat",
    "QuantizationRecord",
    "check_packed_arrays",
    "dense_shapes",
    "packed_arrays",
    "packed_specs",
    "read_quantization",
    "restore_packed",
    "with_packed_shapes",
]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class KernelFormat:
    """Format of one packed kernel: the fields of a policy's `Format` that inference needs.

    Attributes:
      kind: element format.
      weights: scale rule of the kernel.
      tile: rows that share a scale.
      activations: scale rule of the activations it is multiplied with.
    """

    kind: Literal["nvfp4", "fp8"] = "nvfp4"
    weights: Rule = "mse"
    tile: Literal[1, 16] = 1
    activations: Rule = "mse"

    @classmethod
    def of(cls, form: Format) -> "KernelFormat":
        """The inference part of a policy's format."""
        return cls(form.kind, form.weights, form.tile, form.activations)

    @property
    def form(self) -> Format:
        """The policy's format, without a training recipe."""
        return Format(self.kind, self.weights, self.tile, self.activations)


@dataclasses.dataclass(frozen=True)
class QuantizationRecord:
    """Manifest entry on the packed kernels of a component.

    Attributes:
      policy: policy name, for information only; `kernels` decides.
      kernels: format by kernel path, such as `blocks/ffn/up/kernel`.
      merged_lora: file name of the LoRA merged into the kernels before packing, or "".
      branch_lora: file name of the LoRA stored as branches next to the kernels, or "".
      branch_scale: scale alpha / r of the LoRA branches.
      header: metadata of the released file it was converted from, for the export.
    """

    policy: str
    kernels: Mapping[str, KernelFormat]
    merged_lora: str = ""
    branch_lora: str = ""
    branch_scale: float = 1.0
    header: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """A one-line summary for messages."""
        forms = list(dict.fromkeys(kernel.form for kernel in self.kernels.values()))
        texts = [f"{self.policy}: {'; '.join(map(str, forms))}"]
        texts += [f"LoRA {self.merged_lora} merged"] * bool(self.merged_lora)
        texts += [f"LoRA {self.branch_lora} as a branch"] * bool(self.branch_lora)
        return ", ".join(texts)


def read_quantization(
    folder: str | os.PathLike, component: str = "dit"
) -> QuantizationRecord | None:
    """The quantization record of a component of a checkpoint directory, or None if not packed.

    Raises UserError if the record is damaged.
    """
    records = read_manifest(folder).get(QUANTIZATION_KEY, {})
    if not isinstance(records, Mapping) or component not in records:
        return None
    where = f"{folder}: quantization of {component}"
    record = build(QuantizationRecord, records[component], path=where)
    if not isinstance(record.kernels, Mapping) or not record.kernels:
        raise UserError(f"{where}: names no kernels; quantize the checkpoint again")
    kernels = {p: build(KernelFormat, k, path=f"{where}: {p}") for p, k in record.kernels.items()}
    return dataclasses.replace(record, kernels=kernels)


def packed_specs(kernel: KernelFormat, shape: Shape) -> dict[str, ArraySpec]:
    """Specs of the stored arrays of a packed kernel `[*layers, i, o]`, without a LoRA branch."""
    *layers, inputs, outputs = shape
    if kernel.kind == "fp8":
        return {
            "codes": ArraySpec((*layers, outputs, inputs), E4M3),
            "scales": ArraySpec((*layers, outputs), np.dtype(np.float32)),
        }
    return {
        "codes": ArraySpec((*layers, outputs, inputs // 2), np.dtype(np.uint8)),
        "scales": ArraySpec((*layers, outputs, inputs // BLOCK), E4M3),
        "amax": ArraySpec((*layers,), np.dtype(np.float32)),
    }


def dense_shapes(shapes: Mapping[TreePath, Shape]) -> dict[TreePath, Shape]:
    """Parameter shapes with the arrays of every packed kernel replaced by its `[*layers, i, o]`."""
    result = {path: shape for path, shape in shapes.items() if not is_packed_array(path)}
    for path, shape in shapes.items():
        if is_packed_array(path) and path[-1] == "codes":
            *layers, outputs, stored = shape
            inputs = 2 * stored if (*path[:-1], "amax") in shapes else stored
            result[path[:-1]] = (*layers, inputs, outputs)
    return result


def with_packed_shapes(
    expected: Mapping[TreePath, Shape], paths: Container[TreePath]
) -> dict[TreePath, Shape]:
    """Parameter shapes with each kernel whose codes are in `paths` replaced by its NVFP4 arrays."""
    result: dict[TreePath, Shape] = {}
    for path, shape in expected.items():
        if (*path, "codes") in paths:
            specs = packed_specs(KernelFormat(), shape)
            result |= {(*path, name): spec.shape for name, spec in specs.items()}
        else:
            result[path] = shape
    return result


def packed_arrays(kernel: PackedKernel | Fp8Kernel) -> dict[str, jax.Array]:
    """The arrays in which a packed kernel is stored, by name."""
    if isinstance(kernel, Fp8Kernel):
        arrays = {"codes": kernel.codes, "scales": kernel.scales}
    else:
        weight = kernel.weight
        arrays = {"codes": pack(weight.codes), "scales": weight.row_scales, "amax": weight.amax}
    if kernel.branch is not None:
        arrays |= {"a": kernel.branch.a, "b": kernel.branch.b}
    return arrays


def restore_packed(
    params: Mapping[Any, Any],
    record: QuantizationRecord,
    *,
    implementation: Implementation = "auto",
) -> dict[Any, Any]:
    """Loaded parameters with the stored arrays of every packed kernel joined into one module.

    `check_packed_arrays` must have accepted them.
    """
    flat = flatten(params)
    for name, kernel in record.kernels.items():
        path = tuple(name.split("/"))
        arrays = {key: flat.pop((*path, key)) for key in PACKED_ARRAYS if (*path, key) in flat}
        flat[path] = _kernel(arrays, kernel, record.branch_scale, implementation)
    return nest(flat)


def _kernel(
    arrays: Mapping[str, Any], kernel: KernelFormat, scale: float, implementation: Implementation
) -> PackedKernel | Fp8Kernel:
    branch = LowRank(arrays["a"], arrays["b"], scale) if "a" in arrays else None
    if kernel.kind == "fp8":
        return Fp8Kernel(arrays["codes"], arrays["scales"], branch)
    codes = _unpack_codes(arrays["codes"])
    weight = NVFP4(codes, arrays["scales"], arrays["amax"], kernel.weights)
    weight = with_scale_layout(weight, scale_layout(implementation))
    return PackedKernel(weight, branch, kernel.activations, implementation)


_unpack_codes = jax.jit(unpack)


def check_packed_arrays(
    specs: Mapping[TreePath, ArraySpec],
    record: QuantizationRecord | None,
    expected: Mapping[TreePath, Shape],
    where: str,
) -> None:
    """Checks a component's packed arrays against its quantization record.

    Args:
      specs: specs of all stored arrays.
      record: quantization record of the component, or None if it is not packed.
      expected: parameter shapes of the unpacked model.
      where: checkpoint name for messages.

    Raises UserError, with the first problems, if an array of a recorded kernel is missing or has
    another shape or dtype, or if a packed array belongs to no recorded kernel.
    """
    problems, unrecorded = [], {path for path in specs if is_packed_array(path)}
    # 1. Every recorded kernel has its arrays.
    for name, kernel in (record.kernels if record is not None else {}).items():
        path = tuple(name.split("/"))
        if path not in expected:
            problems.append(f"{name} is not a kernel of this model")
            continue
        for key, want in packed_specs(kernel, expected[path]).items():
            spec = specs.get((*path, key))
            if spec != want:
                got = "missing" if spec is None else f"{spec.dtype} {spec.shape}"
                problems.append(f"{name}/{key} is {got} instead of {want.dtype} {want.shape}")
        unrecorded -= {(*path, key) for key in PACKED_ARRAYS}
        problems += _branch_problems(specs, path, expected[path])
    # 2. Every packed array belongs to a recorded kernel.
    problems += [f"{'/'.join(path)} is not in the record" for path in sorted(unrecorded)]
    if problems:
        more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{where}: its arrays do not match its quantization record: "
            f"{'; '.join(problems[:4])}{more}; quantize the checkpoint again"
        )


def _branch_problems(
    specs: Mapping[TreePath, ArraySpec], path: TreePath, shape: Shape
) -> list[str]:
    """What is wrong with the LoRA branch of a kernel, which need not have one."""
    factors = [specs.get((*path, key)) for key in ("a", "b")]
    a, b = (None if spec is None else spec.shape for spec in factors)
    if a is None and b is None:
        return []
    *layers, inputs, outputs = shape
    fits = a is not None and a[:-1] == (*layers, inputs) and b == (*layers, a[-1], outputs)
    if fits:
        return []
    return [f"{'/'.join(path)} has LoRA factors of shapes {a} and {b} for a kernel {tuple(shape)}"]
