"""A checkpoint directory to a packed one: the DiT layer by layer, the rest as it is.

Memory holds one matrix of one layer, and the scales of its layers; weights in full precision are
not written. What can be wrong is found before the first byte.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import __version__
from longlive_jax.interop.convert import Adapters
from longlive_jax.io.arrays import ArrayFiller, ArraySpec, Path, Shape, nest
from longlive_jax.io.checkpoint import (
    QUANTIZATION,
    TOKENIZER,
    CheckpointWriter,
    is_part,
    open_component,
    read_manifest,
)
from longlive_jax.io.packed_kernels import Kernel, Record, arrays_of, dense, part_specs, record_of
from longlive_jax.quant.packed import pack
from longlive_jax.quant.policy import Format, QuantPolicy
from longlive_jax.spec import UserError
from longlive_jax.typing import Array

__all__ = ["Lora", "Packing", "Weights", "quantize_checkpoint"]

COMPONENT = "dit"
Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


class Weights(Protocol):
    """Arrays by path, read layer by layer: an `ArrayReader`, or a save of a run that trains."""

    @property
    def specs(self) -> Mapping[Path, ArraySpec]:
        """Shapes and types."""

    def read(self, path: Path) -> np.ndarray:
        """An array."""

    def layers(self, path: Path) -> Iterator[np.ndarray]:
        """Its slices along the leading axis."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """A LoRA file and what becomes of it: "merge" into the kernels before they are packed, or a
    "branch" beside them in high precision."""

    path: FilePath
    mode: Literal["merge", "branch"] = "merge"
    alpha: float | None = None


@dataclasses.dataclass(frozen=True)
class Packing:
    """What was written: the record, and bytes of the DiT before and after."""

    record: Record
    before: int
    after: int


def quantize_checkpoint(
    source: FilePath,
    out: FilePath,
    policy: QuantPolicy,
    *,
    weights: Weights | None = None,
    lora: Lora | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Packing:
    """Writes the checkpoint directory `source` to `out` with the kernels of the DiT packed.

    Args:
      policy: which kernels, and how.
      weights: of the DiT, in place of the checkpoint's own.
      lora: to be merged, or kept beside.
      dtype: of all other floating-point arrays of the DiT.
      overwrite: replace components that `out` already has.

    A checkpoint that is packed already is taken as it is if the policy is its own and a LoRA comes
    beside it. Raises UserError for a checkpoint that is missing, foreign, damaged or packed by
    other rules, for a policy or a LoRA that does not fit it, and if `out` is taken; `out` is
    untouched then.
    """
    if out.resolve() == source.resolve():
        raise UserError(f"--out={out} is the checkpoint itself; choose another folder")
    reader, settings = open_component(source, COMPONENT)
    job = _job(source, weights or reader, policy, lora, np.dtype(jnp.dtype(dtype)))
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        _copy_others(source, writer, overwrite=overwrite)
        provenance = read_manifest(source)["provenance"].get(COMPONENT, {})
        filler = writer.component(
            COMPONENT,
            job.specs,
            settings,
            provenance={"packed_by": f"longlive-jax {__version__}", "from": provenance},
            quantization=job.record,
        )
        done, total = 0, _bytes(job.weights.specs)
        for path, spec in job.weights.specs.items():
            job.write(filler, path)
            done += spec.nbytes
            progress(COMPONENT, done, total)
        job.write_branches(filler)
        writer.commit()
    return Packing(job.record, total, _bytes(job.specs))


def _bytes(specs: Mapping[Path, ArraySpec]) -> int:
    return sum(spec.nbytes for spec in specs.values())


def _copy_others(source: FilePath, writer: CheckpointWriter, *, overwrite: bool) -> None:
    """All that is not the DiT, file by file, and the settings for sampling."""
    manifest = read_manifest(source)
    for name in manifest["components"]:
        if name != COMPONENT:
            shutil.copytree(source / name, writer.stage(name))
            for group in ("components", "arrays", "provenance"):
                writer.manifest[group][name] = manifest[group].get(name, {})
    known = {"format", "components", "arrays", "provenance", QUANTIZATION}
    writer.manifest |= {k: v for k, v in manifest.items() if k not in known}
    if (source / TOKENIZER).is_file() and (overwrite or not (writer.folder / TOKENIZER).exists()):
        writer.tokenizer(source / TOKENIZER)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Arrays of a DiT, and what each becomes."""

    weights: Weights
    formats: Mapping[Path, Format]  # of kernels that are yet to be packed
    adapters: Adapters | None
    merge: bool
    specs: Mapping[Path, ArraySpec]
    record: Record

    def write(self, filler: ArrayFiller, path: Path) -> None:
        """Writes what becomes of one array."""
        if path in self.formats:
            self._write_packed(filler, path)
        else:
            value = self.weights.read(path).astype(self.specs[path].dtype, copy=False)
            filler.fill(path, [value], stacked=False)

    def _write_packed(self, filler: ArrayFiller, path: Path) -> None:
        """Codes as they come; the other parts are small and wait."""
        form = self.formats[path]
        rest: dict[str, list[np.ndarray]] = {}

        def codes() -> Iterator[np.ndarray]:
            for layer, kernel in enumerate(self.weights.layers(path)):
                if self.merge and self.adapters is not None:
                    kernel = self.adapters.merged(path, layer, kernel)
                parts = _packed(jnp.asarray(kernel), form)
                for name, value in parts.items():
                    rest.setdefault(name, []).append(np.asarray(value))
                yield rest["codes"].pop()

        filler.fill((*path, "codes"), codes(), stacked=True)
        for name, pieces in rest.items():
            if name != "codes":
                filler.fill((*path, name), pieces, stacked=True)

    def write_branches(self, filler: ArrayFiller) -> None:
        """Writes both halves of every LoRA that stays beside its kernel."""
        if self.adapters is None or self.merge:
            return
        for path in self.adapters.leaves:
            stored = (*path[:-1], "kernel", path[-1])
            pieces = (x.astype(self.specs[stored].dtype) for x in self.adapters.layers(path))
            filler.fill(stored, pieces, stacked=True)


@functools.partial(jax.jit, static_argnames="form")
def _packed(kernel: Array, form: Format) -> dict[str, Array]:
    return arrays_of(pack(kernel, form))


def _job(
    source: FilePath,
    weights: Weights,
    policy: QuantPolicy,
    lora: Lora | None,
    dtype: np.dtype,
) -> _Job:
    shapes = dense({path: spec.shape for path, spec in weights.specs.items()})
    formats = _formats(source, policy, shapes)
    record = Record(policy.name, {"/".join(p): Kernel.of(form) for p, form in formats.items()})
    packed = record_of(source)
    merge = lora is not None and lora.mode == "merge"
    if packed is not None:
        record = _again(source, packed, record, lora)
        formats = {}
    adapters = None if lora is None else Adapters.open(lora.path, alpha=lora.alpha)
    if adapters is not None and lora is not None:
        adapters.check(shapes)
        name = lora.path.name
        record = (
            dataclasses.replace(record, merged_lora=name)
            if merge
            else dataclasses.replace(record, branch_lora=name, branch_scale=adapters.scale)
        )
    specs = _specs(weights, formats, dtype)
    if adapters is not None and not merge:
        specs |= _branch_specs(adapters, record, dtype)
    return _Job(weights, formats, adapters, merge, specs, record)


def _formats(
    source: FilePath, policy: QuantPolicy, shapes: Mapping[Path, Shape]
) -> dict[Path, Format]:
    """The policy's formats by path; UserError where it does not fit."""
    tree = nest({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()})
    try:
        formats = policy.formats(tree)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
    if not formats:
        raise UserError(f"policy {policy.name} packs nothing; say --policy=nvfp4 or fp8")
    return {tuple(name.split("/")): form for name, form in formats.items()}


def _again(source: FilePath, packed: Record, wanted: Record, lora: Lora | None) -> Record:
    """The record of a checkpoint that is packed already; UserError unless it can stay so."""
    if packed.kernels != wanted.kernels:
        raise UserError(
            f"{source} is packed by {packed.describe()}, not by {wanted.describe()}; quantize the "
            "checkpoint it was made from"
        )
    if lora is None or lora.mode != "branch" or packed.branch_lora:
        raise UserError(
            f"{source} is packed already ({packed.describe()}); only a LoRA beside it can be added "
            "(--lora=FILE --lora_mode=branch), once"
        )
    return packed


def _specs(
    weights: Weights, formats: Mapping[Path, Format], dtype: np.dtype
) -> dict[Path, ArraySpec]:
    specs: dict[Path, ArraySpec] = {}
    for path, spec in weights.specs.items():
        if path in formats:
            parts = part_specs(Kernel.of(formats[path]), spec.shape)
            specs |= {(*path, name): part for name, part in parts.items()}
        else:
            floating = jnp.issubdtype(spec.dtype, jnp.floating) and not is_part(path)
            specs[path] = ArraySpec(spec.shape, dtype if floating else spec.dtype)
    return specs


def _branch_specs(adapters: Adapters, record: Record, dtype: np.dtype) -> dict[Path, ArraySpec]:
    """Where both halves of every LoRA go; UserError beside a kernel that is not packed."""
    specs = {}
    for path, leaf in adapters.leaves.items():
        kernel = (*path[:-1], "kernel")
        if "/".join(kernel) not in record.kernels:
            raise UserError(
                f"{adapters.path}: adapts {'/'.join(kernel)}, which the policy does not pack; "
                "merge it (--lora_mode=merge)"
            )
        specs[(*kernel, path[-1])] = ArraySpec(leaf.shape, dtype)
    return specs
