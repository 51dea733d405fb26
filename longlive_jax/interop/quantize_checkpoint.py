"""Packs the DiT of a checkpoint directory layer by layer, and copies the other components.

Memory holds one matrix of one layer, and the scales of all its layers. Unpacked copies of the
kernels are not written. Everything that can be wrong is checked before the first byte is written.
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import __version__
from longlive_jax.interop.finite import check_finite
from longlive_jax.interop.lora_file import merged
from longlive_jax.interop.lora_spec import LoraSpec, LoraStack
from longlive_jax.io.arrays import ArraySpec, ArrayWriter, Shape, TreePath, nest
from longlive_jax.io.checkpoint import (
    QUANTIZATION_KEY,
    TOKENIZER,
    CheckpointWriter,
    is_packed_array,
    open_component,
    read_manifest,
)
from longlive_jax.io.packed_kernels import (
    KernelFormat,
    QuantizationRecord,
    dense_shapes,
    packed_arrays,
    packed_specs,
    read_quantization,
)
from longlive_jax.io.progress import ProgressCallback, no_progress
from longlive_jax.quant.packed import pack_kernel
from longlive_jax.quant.policy import Format, QuantPolicy
from longlive_jax.spec import UserError
from longlive_jax.typing import Array

__all__ = ["ArraySource", "LoraSpec", "QuantizationReport", "quantize_checkpoint"]

COMPONENT = "dit"


class ArraySource(Protocol):
    """Arrays by path, read layer by layer: an `ArrayReader`, or the weights of a training run."""

    @property
    def specs(self) -> Mapping[TreePath, ArraySpec]:
        """Shapes and dtypes by path."""

    def read(self, path: TreePath) -> np.ndarray:
        """The array at a path."""

    def layers(self, path: TreePath) -> Iterator[np.ndarray]:
        """The slices of an array along its leading axis."""


@dataclasses.dataclass(frozen=True)
class QuantizationReport:
    """What was written.

    Attributes:
      record: quantization record of the DiT.
      bytes_before: size of the DiT in the source.
      bytes_after: size of the DiT in the output.
    """

    record: QuantizationRecord
    bytes_before: int
    bytes_after: int


def quantize_checkpoint(
    source: Path,
    out: Path,
    policy: QuantPolicy,
    *,
    weights: ArraySource | None = None,
    lora: LoraSpec | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> QuantizationReport:
    """Copies the checkpoint directory `source` to `out` with the DiT's kernels packed.

    A packed checkpoint is accepted if it was packed by the same policy and a LoRA branch is added.

    Args:
      policy: kernels to pack, and their formats.
      weights: weights of the DiT instead of the checkpoint's own.
      lora: LoRA to merge, or to add as a branch.
      dtype: dtype of the DiT's other floating-point arrays.
      overwrite: replace components that `out` already has.
      progress: callback after every array.

    Raises UserError if the checkpoint is missing, damaged, or packed by another policy, if the
    policy or the LoRA does not match it, or if `out` has these components. `out` is then unchanged.
    """
    if out.resolve() == source.resolve():
        raise UserError(f"--out={out} is the checkpoint itself; choose another folder")
    # 1. Plan.
    reader, settings = open_component(source, COMPONENT)
    plan = _plan(source, weights or reader, policy, lora, np.dtype(jnp.dtype(dtype)))
    # 2. Write.
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        _copy_others(source, writer, overwrite=overwrite)
        provenance = read_manifest(source)["provenance"].get(COMPONENT, {})
        array_writer = writer.add_component(
            COMPONENT,
            plan.specs,
            settings,
            provenance={"packed_by": f"longlive-jax {__version__}", "from": provenance},
            quantization=plan.record,
        )
        plan.write(array_writer, progress)
        writer.commit()
    return QuantizationReport(plan.record, _nbytes(plan.weights.specs), _nbytes(plan.specs))


def _nbytes(specs: Mapping[TreePath, ArraySpec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def _copy_others(source: Path, writer: CheckpointWriter, *, overwrite: bool) -> None:
    """Copies the files of all other components, the sampling settings and the tokenizer."""
    manifest = read_manifest(source)
    for name in manifest["components"]:
        if name != COMPONENT:
            shutil.copytree(source / name, writer.stage(name))
            for group in ("components", "arrays", "provenance"):
                writer.manifest[group][name] = manifest[group].get(name, {})
    known = {"format", "components", "arrays", "provenance", QUANTIZATION_KEY}
    writer.manifest |= {k: v for k, v in manifest.items() if k not in known}
    if (source / TOKENIZER).is_file() and (overwrite or not (writer.folder / TOKENIZER).exists()):
        writer.add_tokenizer(source / TOKENIZER)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The arrays of a DiT and how each is written.

    Attributes:
      weights: arrays of the source.
      formats: formats of the kernels to pack; empty if they are packed already.
      adapters: LoRA, or None.
      merge: whether the LoRA is merged; otherwise it becomes a branch.
      specs: specs of the arrays to be written.
      record: quantization record to be written.
      origin: where the weights come from, for messages.
    """

    weights: ArraySource
    formats: Mapping[TreePath, Format]
    adapters: LoraStack | None
    merge: bool
    specs: Mapping[TreePath, ArraySpec]
    record: QuantizationRecord
    origin: str

    def write(self, writer: ArrayWriter, progress: ProgressCallback) -> None:
        """Writes all arrays."""
        done, total = 0, _nbytes(self.weights.specs)
        for path, spec in self.weights.specs.items():
            if path in self.formats:
                self._write_packed(writer, path)
            else:
                value = check_finite(self.weights.read(path), ".".join(path), self.origin)
                value = value.astype(self.specs[path].dtype, copy=False)
                writer.write(path, [value], stacked=False)
            done += spec.nbytes
            progress(COMPONENT, done, total)
        self._write_branches(writer)

    def _write_packed(self, writer: ArrayWriter, path: TreePath) -> None:
        """Packs a kernel: codes are written layer by layer, the small other arrays at the end."""
        form = self.formats[path]
        layers: dict[str, list[np.ndarray]] = {}

        def codes() -> Iterator[np.ndarray]:
            for layer, kernel in enumerate(self.weights.layers(path)):
                check_finite(kernel, ".".join(path), self.origin)
                if self.merge and self.adapters is not None:
                    kernel = merged(self.adapters.files, path, layer, kernel)
                for name, value in _pack(jnp.asarray(kernel), form).items():
                    layers.setdefault(name, []).append(np.asarray(value))
                yield layers["codes"].pop()

        writer.write((*path, "codes"), codes(), stacked=True)
        for name, values in layers.items():
            if name != "codes":
                writer.write((*path, name), values, stacked=True)

    def _write_branches(self, writer: ArrayWriter) -> None:
        """Writes both factors of every LoRA branch."""
        if self.adapters is None or self.merge:
            return
        for path in self.adapters.shapes():
            target = (*path[:-1], "kernel", path[-1])
            spec = self.specs[target]
            layers = (self.adapters.layer(path, index) for index in range(spec.shape[0]))
            writer.write(target, (x.astype(spec.dtype) for x in layers), stacked=True)


@functools.partial(jax.jit, static_argnames="form")
def _pack(kernel: Array, form: Format) -> dict[str, Array]:
    return packed_arrays(pack_kernel(kernel, form))


def _plan(
    source: Path,
    weights: ArraySource,
    policy: QuantPolicy,
    lora: LoraSpec | None,
    dtype: np.dtype,
) -> _Plan:
    """Checks policy, packed kernels and LoRA against each other; UserError if they conflict."""
    # 1. Formats of the kernels.
    shapes = dense_shapes({path: spec.shape for path, spec in weights.specs.items()})
    formats = _formats(source, policy, shapes)
    kernels = {"/".join(path): KernelFormat.of(form) for path, form in formats.items()}
    record = QuantizationRecord(policy.name, kernels)
    current = read_quantization(source)
    if current is not None:
        _check_repack(source, current, record, lora)
        record, formats = current, {}
    # 2. LoRA.
    merge = lora is not None and lora.mode == "merge"
    adapters = None if lora is None else lora.open()
    if adapters is not None:
        for file, _ in adapters.files:
            file.check(shapes)
        name = adapters.name
        record = (
            dataclasses.replace(record, merged_lora=name)
            if merge
            else dataclasses.replace(record, branch_lora=name, branch_scale=adapters.scale)
        )
    # 3. Arrays to be written.
    specs = _specs(weights, formats, dtype)
    if adapters is not None and not merge:
        specs |= _branch_specs(adapters, record, shapes, dtype)
    return _Plan(weights, formats, adapters, merge, specs, record, str(source))


def _formats(
    source: Path, policy: QuantPolicy, shapes: Mapping[TreePath, Shape]
) -> dict[TreePath, Format]:
    """The policy's formats by path; raises UserError if it does not match the model."""
    tree = nest({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    try:
        formats = policy.formats(tree)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    if not formats:
        raise UserError(f"policy {policy.name} packs nothing; pass --policy=nvfp4 or fp8")
    return {tuple(name.split("/")): form for name, form in formats.items()}


def _check_repack(
    source: Path,
    current: QuantizationRecord,
    requested: QuantizationRecord,
    lora: LoraSpec | None,
) -> None:
    """Raises UserError unless the packed kernels can stay and a first LoRA branch is added."""
    if current.kernels != requested.kernels:
        raise UserError(
            f"{source} is packed by {current.describe()}, not by {requested.describe()}; quantize "
            "the checkpoint it was made from"
        )
    if lora is None or lora.mode != "branch" or current.branch_lora:
        raise UserError(
            f"{source} is packed already ({current.describe()}); only one LoRA branch can be added "
            "to it (--adapter=PATH --adapter_mode=branch)"
        )


def _specs(
    weights: ArraySource, formats: Mapping[TreePath, Format], dtype: np.dtype
) -> dict[TreePath, ArraySpec]:
    """Specs of the arrays to be written, without LoRA branches."""
    specs: dict[TreePath, ArraySpec] = {}
    for path, spec in weights.specs.items():
        if path in formats:
            arrays = packed_specs(KernelFormat.of(formats[path]), spec.shape)
            specs |= {(*path, name): array for name, array in arrays.items()}
        else:
            can_cast = jnp.issubdtype(spec.dtype, jnp.floating) and not is_packed_array(path)
            specs[path] = ArraySpec(spec.shape, dtype if can_cast else spec.dtype)
    return specs


def _branch_specs(
    adapters: LoraStack,
    record: QuantizationRecord,
    shapes: Mapping[TreePath, Shape],
    dtype: np.dtype,
) -> dict[TreePath, ArraySpec]:
    """Specs of the LoRA branches; UserError for an adapter of a kernel that is not packed."""
    specs = {}
    for path, shape in adapters.shapes().items():
        kernel = (*path[:-1], "kernel")
        if "/".join(kernel) not in record.kernels:
            raise UserError(
                f"{adapters.name}: adapts {'/'.join(kernel)}, which the policy does not pack; "
                "merge it (--adapter_mode=merge)"
            )
        specs[(*kernel, path[-1])] = ArraySpec((shapes[kernel][0], *shape[1:]), dtype)
    return specs
