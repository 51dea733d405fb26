"""Weights of other libraries to our checkpoint directory, tensor by tensor.

Everything that names and shapes can tell is checked before the first byte is written; after that
memory holds one tensor and what TensorStore has not written yet. Bits are kept: values change only
where `dtype` or `merge_lora` ask for it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from longlive_jax import __version__
from longlive_jax.interop import keys_lora
from longlive_jax.interop.components import COMPONENTS, Component, expected_shapes, identify
from longlive_jax.interop.components import saved_settings as saved
from longlive_jax.interop.keytable import Collected, KeyReport, KeyTable, Leaf
from longlive_jax.interop.sources import Source, find_sources, find_tokenizer
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.io.arrays import ArraySpec, Path, Shape
from longlive_jax.io.checkpoint import TOKENIZER, CheckpointWriter, is_part
from longlive_jax.io.packed_kernels import Record, dense, with_parts
from longlive_jax.spec import UserError

__all__ = ["Adapters", "Converted", "convert"]

Progress = Callable[[str, int, int], None]  # what, bytes done, bytes in all


@dataclasses.dataclass(frozen=True)
class Converted:
    """What became of one source."""

    component: str
    naming: str
    source: FilePath
    tensors: int
    parameters: int
    config: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A source that fits its component."""

    component: Component
    naming: str
    source: Source
    leaves: Sequence[Leaf]
    config: Any
    specs: Mapping[Path, ArraySpec]
    packing: Record | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.source.tensors[key].nbytes for leaf in self.leaves for key in leaf.keys)


def convert(
    source: FilePath,
    out: FilePath,
    *,
    use_ema: bool = False,
    heads: int | None = None,
    text_len: int | None = None,
    dtype: DTypeLike | None = None,
    merge_lora: FilePath | None = None,
    lora_alpha: float | None = None,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> list[Converted]:
    """Converts a file or folder of weights into (or adds it to) the checkpoint directory `out`.

    Args:
      use_ema: take `generator_ema` of a LongLive checkpoint instead of `generator`.
      heads: attention heads of the DiT, where neither config.json nor a head width of 128 tells.
      text_len: rows of text the DiT attends to; of config.json, or 512, if None.
      dtype: floating-point type to store; as in the source if None.
      merge_lora: a LoRA file; the stored kernels are W + B A alpha / r, summed in float32.
      lora_alpha: of that file, or of a LoRA that is converted as such; its rank if None.
      overwrite: replace components that `out` already has.

    Raises UserError, naming everything that is wrong with the keys at once, before writing; `out`
    is untouched if anything fails.
    """
    hints = {"heads": heads, "text_len": text_len, "lora_alpha": lora_alpha}
    hints = {name: value for name, value in hints.items() if value is not None}
    plans = [_plan(found, hints, dtype) for found in find_sources(source, use_ema=use_ema)]
    _distinct(plans)
    adapters = None
    if merge_lora is not None:
        adapters = Adapters.open(merge_lora, alpha=lora_alpha)
        adapters.check(_kernels(plans))
    tokenizer = find_tokenizer(source) if source.is_dir() else None
    total, done = sum(plan.nbytes for plan in plans), 0
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        for plan in plans:
            for size in _write(writer, plan, adapters if plan.component.name == "dit" else None):
                done += size
                progress(plan.component.name, done, total)
        if tokenizer is not None and (overwrite or not (out / TOKENIZER).exists()):
            writer.tokenizer(tokenizer)
        writer.commit()
    return [_report(plan) for plan in plans]


def _kernels(plans: Sequence[_Plan]) -> dict[Path, Shape]:
    """Shapes of what a LoRA can be merged into; UserError if that is packed."""
    dit = next((plan for plan in plans if plan.component.name == "dit"), None)
    if dit is not None and dit.packing is not None:
        raise UserError(
            f"{dit.source.path}: a LoRA cannot be merged into packed weights; merge it into the "
            "bfloat16 checkpoint and pack that with `longlive quantize`, or keep it beside them: "
            "`longlive quantize --lora=FILE --lora_mode=branch`"
        )
    return {leaf.path: leaf.shape for leaf in dit.leaves} if dit is not None else {}


def _plan(source: Source, hints: Mapping[str, Any], dtype: DTypeLike | None) -> _Plan:
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    component, table = identify(shapes, str(source.path))
    found = table.collect(shapes)
    found.report.add(source.report)
    try:
        leaves, config = _fit(component, table, found, {**source.hints, **hints})
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from error
    specs, mixed = {}, []
    for leaf in leaves:
        dtypes = {source.tensors[key].dtype for key in leaf.keys}
        if len(dtypes) > 1 and dtype is None:
            mixed.append(f"{leaf.keys[0]} ({', '.join(sorted(map(str, dtypes)))})")
        wanted = None if is_part(leaf.path) else dtype
        specs[leaf.path] = ArraySpec(leaf.shape, stored_dtype(dtypes.pop(), wanted))
    if mixed:
        raise UserError(f"{source.path}: layers of different types: {', '.join(mixed[:8])}; "
                        "choose one with --dtype")  # fmt: skip
    packing = None
    if source.packed is not None:
        codes = (leaf.path for leaf in leaves if is_part(leaf.path) and leaf.path[-1] == "codes")
        packing = source.packed.record(["/".join(path[:-1]) for path in codes])
    return _Plan(component, table.name, source, leaves, config, specs, packing)


def _fit(
    component: Component, table: KeyTable, found: Collected, hints: Mapping[str, Any]
) -> tuple[list[Leaf], Any]:
    """Leaves and settings; shapes give the settings, and those say what else must be there."""
    try:
        config = component.settings(dense(found.shapes), hints)
    except KeyError as error:  # the path of an array without which nothing can be told
        if error.args[0] not in found.paths:
            found.report.missing += table.unmatched(found)
        found.report.check(table.name)
        raise
    expected = expected_shapes(component, config)
    if expected is not None:
        table.compare(found, with_parts(expected, found.paths))
    found.report.check(table.name)
    return found.leaves, config


def stored_dtype(dtype: np.dtype, wanted: DTypeLike | None) -> np.dtype:
    """The type a tensor is stored in: `wanted` concerns floating-point tensors only."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.dtype(wanted) if wanted is not None and floating else dtype


def _distinct(plans: Sequence[_Plan]) -> None:
    seen: dict[str, FilePath] = {}
    for plan in plans:
        name = plan.component.name
        if name in seen:
            raise UserError(
                f"{plan.source.path} and {seen[name]} are both the {name}; "
                "give --source one file at a time"
            )
        seen[name] = plan.source.path


def _write(writer: CheckpointWriter, plan: _Plan, adapters: "Adapters | None") -> Iterator[int]:
    """Writes a component, and yields the bytes of every array when it is in."""
    provenance = {
        "source": plan.source.path.name,
        "part": plan.source.part,
        "naming": plan.naming,
        "converted_by": f"longlive-jax {__version__}",
        "merged_lora": adapters.path.name if adapters else "",
    }
    name, config = plan.component.name, saved(plan.config)
    filler = writer.component(
        name, plan.specs, config, provenance=provenance, quantization=plan.packing
    )
    for leaf in plan.leaves:
        filler.fill(leaf.path, _pieces(plan, leaf, adapters), stacked=leaf.rule.stacked)
        yield sum(plan.source.tensors[key].nbytes for key in leaf.keys)


def _pieces(plan: _Plan, leaf: Leaf, adapters: "Adapters | None") -> Iterator[np.ndarray]:
    dtype = plan.specs[leaf.path].dtype
    for layer, key in enumerate(leaf.keys):
        value = leaf.place(plan.source.tensors[key].read())
        if adapters is not None:
            value = adapters.merged(leaf.path, layer, value)
        yield value.astype(dtype, copy=False)


def _report(plan: _Plan) -> Converted:
    parameters = sum(math.prod(leaf.shape) for leaf in plan.leaves)
    return Converted(
        component=plan.component.name,
        naming=plan.naming,
        source=plan.source.path,
        tensors=len(plan.source.tensors),
        parameters=parameters,
        config=saved(plan.config),
    )


@dataclasses.dataclass(frozen=True)
class Adapters:
    """A LoRA file, ready to be merged into kernels."""

    path: FilePath
    leaves: Mapping[Path, Leaf]
    tensors: Mapping[str, LazyTensor]
    scale: float

    @classmethod
    def open(cls, path: FilePath, *, alpha: float | None = None) -> "Adapters":
        """Reads and checks the file; UserError if it is no LoRA."""
        sources = find_sources(path)
        hints = {} if alpha is None else {"lora_alpha": alpha}
        plan = _plan(sources[0], {**_peft_alpha(sources[0]), **hints}, None)
        if len(sources) != 1 or plan.component is not COMPONENTS["lora"]:
            raise UserError(f"{path}: is no LoRA file ({keys_lora.PREFIX}blocks.… expected)")
        leaves = {leaf.path: leaf for leaf in plan.leaves}
        scale = plan.config["alpha"] / plan.config["rank"]
        return cls(path, leaves, plan.source.tensors, scale)

    def check(self, shapes: Mapping[Path, Shape]) -> None:
        """UserError unless every adapter fits a kernel among the arrays of a DiT."""
        report = KeyReport()
        for path, leaf in self.leaves.items():
            kernel = shapes.get((*path[:-1], "kernel"))
            side = None if kernel is None else kernel[1 if path[-1] == "a" else 2]
            if kernel is None:
                report.extra.append(leaf.keys[0])
            elif (leaf.shape[0], leaf.shape[1 if path[-1] == "a" else 2]) != (kernel[0], side):
                report.misshapen.append(f"{leaf.keys[0]} {leaf.shape} for kernel {kernel}")
        report.check(f"{self.path}: LoRA for this DiT")

    def merged(self, path: Path, layer: int, kernel: np.ndarray) -> np.ndarray:
        """kernel + a @ b * alpha / r, summed in float32; or the kernel itself."""
        sides = [self.leaves.get((*path[:-1], side)) for side in "ab"]
        if path[-1] != "kernel" or sides[0] is None or sides[1] is None:
            return kernel
        a, b = (self.layer(leaf, layer) for leaf in sides if leaf)
        update = a.astype(np.float32) @ b.astype(np.float32)
        return (kernel.astype(np.float32) + update * self.scale).astype(kernel.dtype)

    def layer(self, leaf: Leaf, layer: int) -> np.ndarray:
        """One half of one adapter."""
        return leaf.place(self.tensors[leaf.keys[layer]].read())

    def layers(self, path: Path) -> Iterator[np.ndarray]:
        """One half, `(..., "a")` or `(..., "b")`, in all layers."""
        leaf = self.leaves[path]
        return (self.layer(leaf, layer) for layer in range(len(leaf.keys)))


def _peft_alpha(source: Source) -> dict[str, Any]:
    """PEFT's adapter_config.json lies beside adapters that were saved by PEFT itself."""
    alpha = source.hints.get("lora_alpha")
    return {} if alpha is None else {"lora_alpha": alpha}
