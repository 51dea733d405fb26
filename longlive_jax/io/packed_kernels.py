"""Packed kernels on disk: arrays of plain types below the kernel's path, and a record of the rules.

    blocks.ffn.up.kernel.codes    uint8 [layers, o, i/2], low nibble first   | float8_e4m3fn (FP8)
    blocks.ffn.up.kernel.scales   float8_e4m3fn [layers, o, i/16]            | float32 [layers, o]
    blocks.ffn.up.kernel.amax     float32 [layers]                           | none
    blocks.ffn.up.kernel.{a,b}    a LoRA kept beside it, if there is one

The manifest's `quantization` says for each component which kernels are packed and how (`Record`).
Shapes and types are checked against it and against the model before an array is read.
"""

import dataclasses
import os
from collections.abc import Container, Mapping
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from longlive_jax.io.arrays import ArraySpec, Path, Shape, flatten, nest
from longlive_jax.io.checkpoint import PARTS, QUANTIZATION, is_part, read_manifest
from longlive_jax.quant.low_rank import LowRank
from longlive_jax.quant.packed import Fp8Kernel, PackedKernel
from longlive_jax.quant.policy import Format
from longlive_jax.spec import UserError, build
from pallas_kernels.dispatch import Implementation
from pallas_kernels.nvfp4 import BLOCK, NVFP4, Rule, pack, unpack

__all__ = [
    "Record",
    "arrays_of",
    "check",
    "dense",
    "part_specs",
    "record_of",
    "restore",
    "with_parts",
]

F8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How one kernel is packed: the part of a policy's `Format` that inference needs."""

    kind: Literal["nvfp4", "fp8"] = "nvfp4"
    weights: Rule = "mse"
    tile: Literal[1, 16] = 1
    activations: Rule = "mse"

    @classmethod
    def of(cls, form: Format) -> "Kernel":
        """The same of a policy's format."""
        return cls(form.kind, form.weights, form.tile, form.activations)

    @property
    def form(self) -> Format:
        """As a policy says it, without a recipe of training."""
        return Format(self.kind, self.weights, self.tile, self.activations)


@dataclasses.dataclass(frozen=True)
class Record:
    """What a checkpoint remembers of its packing.

    Attributes:
      policy: its name, for the record; `kernels` is what counts.
      kernels: format by path, `blocks/ffn/up/kernel`.
      merged_lora: file name of a LoRA that is in the packed kernels.
      branch_lora: file name of a LoRA that is beside them.
      branch_scale: alpha / r of the latter.
      header: plain values of the file that was read, to be written again.
    """

    policy: str
    kernels: Mapping[str, Kernel]
    merged_lora: str = ""
    branch_lora: str = ""
    branch_scale: float = 1.0
    header: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """One line for people."""
        forms = list(dict.fromkeys(kernel.form for kernel in self.kernels.values()))
        parts = [f"{self.policy}: {'; '.join(map(str, forms))}"]
        parts += [f"LoRA {self.merged_lora} merged"] * bool(self.merged_lora)
        parts += [f"LoRA {self.branch_lora} beside"] * bool(self.branch_lora)
        return ", ".join(parts)


def record_of(folder: str | os.PathLike, component: str = "dit") -> Record | None:
    """How a component of a checkpoint directory is packed; None if it is not.

    Raises UserError for a record that is damaged.
    """
    found = read_manifest(folder).get(QUANTIZATION, {})
    if not isinstance(found, Mapping) or component not in found:
        return None
    where = f"{folder}: quantization of {component}"
    record = build(Record, found[component], path=where)
    if not isinstance(record.kernels, Mapping) or not record.kernels:
        raise UserError(f"{where}: names no kernels; quantize the checkpoint again")
    kernels = {p: build(Kernel, k, path=f"{where}: {p}") for p, k in record.kernels.items()}
    return dataclasses.replace(record, kernels=kernels)


def part_specs(kernel: Kernel, shape: Shape) -> dict[str, ArraySpec]:
    """Names, shapes and types of what a kernel `[*layers, i, o]` is stored as, without a LoRA."""
    *layers, inputs, outputs = shape
    if kernel.kind == "fp8":
        return {
            "codes": ArraySpec((*layers, outputs, inputs), F8),
            "scales": ArraySpec((*layers, outputs), np.dtype(np.float32)),
        }
    return {
        "codes": ArraySpec((*layers, outputs, inputs // 2), np.dtype(np.uint8)),
        "scales": ArraySpec((*layers, outputs, inputs // BLOCK), F8),
        "amax": ArraySpec((*layers,), np.dtype(np.float32)),
    }


def dense(shapes: Mapping[Path, Shape]) -> dict[Path, Shape]:
    """Shapes of the parameters, each packed kernel as the `[*layers, i, o]` it stands for."""
    found = {path: shape for path, shape in shapes.items() if not is_part(path)}
    for path, shape in shapes.items():
        if is_part(path) and path[-1] == "codes":
            *layers, outputs, stored = shape
            inputs = 2 * stored if (*path[:-1], "amax") in shapes else stored
            found[path[:-1]] = (*layers, inputs, outputs)
    return found


def with_parts(expected: Mapping[Path, Shape], paths: Container[Path]) -> dict[Path, Shape]:
    """Shapes of a model's parameters, the kernels that `paths` has the codes of as their parts."""
    found: dict[Path, Shape] = {}
    for path, shape in expected.items():
        if (*path, "codes") in paths:
            parts = part_specs(Kernel(), shape)
            found |= {(*path, name): spec.shape for name, spec in parts.items()}
        else:
            found[path] = shape
    return found


def arrays_of(kernel: PackedKernel | Fp8Kernel) -> dict[str, jax.Array]:
    """A packed kernel as it is stored."""
    if isinstance(kernel, Fp8Kernel):
        found = {"codes": kernel.codes, "scales": kernel.scales}
    else:
        weight = kernel.weight
        found = {"codes": pack(weight.codes), "scales": weight.scales, "amax": weight.amax}
    if kernel.branch is not None:
        found |= {"a": kernel.branch.a, "b": kernel.branch.b}
    return found


def restore(
    params: Mapping[Any, Any],
    record: Record,
    *,
    implementation: Implementation = "auto",
) -> dict[Any, Any]:
    """Loaded parameters, which `check` found right, with packed kernels in place of their parts."""
    flat = flatten(params)
    for name, kernel in record.kernels.items():
        path = tuple(name.split("/"))
        parts = {part: flat.pop((*path, part)) for part in PARTS if (*path, part) in flat}
        flat[path] = _kernel(parts, kernel, record.branch_scale, implementation)
    return nest(flat)


def _kernel(
    parts: Mapping[str, Any], kernel: Kernel, scale: float, implementation: Implementation
) -> PackedKernel | Fp8Kernel:
    branch = LowRank(parts["a"], parts["b"], scale) if "a" in parts else None
    if kernel.kind == "fp8":
        return Fp8Kernel(parts["codes"], parts["scales"], branch)
    codes = _unpacked(parts["codes"])
    weight = NVFP4(codes, parts["scales"], parts["amax"], kernel.weights)
    return PackedKernel(weight, branch, kernel.activations, implementation)


_unpacked = jax.jit(unpack)


def check(
    specs: Mapping[Path, ArraySpec],
    record: Record | None,
    expected: Mapping[Path, Shape],
    where: str,
) -> None:
    """UserError unless all parts of the recorded kernels are there in their shapes, and no other.

    `expected` are the shapes of the model's own parameters.
    """
    wrong, parts = [], {path for path in specs if is_part(path)}
    for name, kernel in (record.kernels if record is not None else {}).items():
        path = tuple(name.split("/"))
        if path not in expected:
            wrong.append(f"{name} is no kernel of this model")
            continue
        for part, want in part_specs(kernel, expected[path]).items():
            found = specs.get((*path, part))
            if found != want:
                said = "missing" if found is None else f"{found.dtype} {found.shape}"
                wrong.append(f"{name}/{part} is {said} instead of {want.dtype} {want.shape}")
        parts -= {(*path, part) for part in PARTS}
        wrong += _wrong_branch(specs, path, expected[path])
    wrong += [f"{'/'.join(path)} is not in the record" for path in sorted(parts)]
    if wrong:
        more = f", and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(
            f"{where}: its arrays are not what its record of quantization says: "
            f"{'; '.join(wrong[:4])}{more}; quantize the checkpoint again"
        )


def _wrong_branch(specs: Mapping[Path, ArraySpec], path: Path, shape: Shape) -> list[str]:
    halves = [specs.get((*path, part)) for part in ("a", "b")]
    a, b = (None if half is None else half.shape for half in halves)
    if a is None and b is None:
        return []
    *layers, inputs, outputs = shape
    good = a is not None and a[:-1] == (*layers, inputs) and b == (*layers, a[-1], outputs)
    return [] if good else [f"{'/'.join(path)} has a LoRA of shapes {a} and {b}"]
