"""Converts weights of other libraries to our checkpoint directory, tensor by tensor.

Everything that follows from names and shapes is checked before the first byte is written. After
that, memory holds one tensor and what TensorStore has not written yet. Values are copied bit for
bit, unless `dtype` or `merge_lora` changes them.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from longlive_jax import __version__
from longlive_jax.interop.components import (
    COMPONENTS,
    Component,
    expected_shapes,
    identify,
    saved_settings,
)
from longlive_jax.interop.finite import check_finite
from longlive_jax.interop.keys_lora import PEFT_PREFIX
from longlive_jax.interop.keytable import KeyReport, KeyTable, Leaf, TableMatch
from longlive_jax.interop.sources import Source, find_sources, find_tokenizer
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.io.arrays import ArraySpec, Shape, TreePath
from longlive_jax.io.checkpoint import TOKENIZER, CheckpointWriter, is_packed_array
from longlive_jax.io.packed_kernels import QuantizationRecord, dense_shapes, with_packed_shapes
from longlive_jax.io.progress import ProgressCallback, no_progress
from longlive_jax.spec import UserError

__all__ = ["Adapters", "ConvertedComponent", "convert"]


@dataclasses.dataclass(frozen=True)
class ConvertedComponent:
    """What was written for one source.

    Attributes:
      component: name of the component.
      naming: name of the key table that matched.
      source: file, or index of a sharded checkpoint.
      tensors: number of tensors in the source.
      parameters: number of parameters written.
      config: settings of the component.
      entry: name of the state dict in a file of several, or "".
      is_packed: whether its kernels are packed.
    """

    component: str
    naming: str
    source: Path
    tensors: int
    parameters: int
    config: Mapping[str, Any]
    entry: str = ""
    is_packed: bool = False


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A source that matches its component, checked but not converted.

    Attributes:
      component: component of the source.
      naming: name of the key table that matched.
      source: state dict.
      leaves: parameters and the keys they consist of.
      config: config of the component.
      specs: specs of the arrays to be written, by path.
      quantization: record of the packed kernels, or None.
    """

    component: Component
    naming: str
    source: Source
    leaves: Sequence[Leaf]
    config: Any
    specs: Mapping[TreePath, ArraySpec]
    quantization: QuantizationRecord | None = None

    @property
    def nbytes(self) -> int:
        """Size of the source's tensors in bytes."""
        return sum(self.source.tensors[key].nbytes for leaf in self.leaves for key in leaf.keys)


def convert(
    source: Path,
    out: Path,
    *,
    use_ema: bool = False,
    heads: int | None = None,
    text_len: int | None = None,
    dtype: DTypeLike | None = None,
    merge_lora: Path | None = None,
    lora_alpha: float | None = None,
    overwrite: bool = False,
    progress: ProgressCallback = no_progress,
) -> list[ConvertedComponent]:
    """Converts a file or folder of weights into the checkpoint directory `out`, or adds it to it.

    Args:
      use_ema: take `generator_ema` of a LongLive checkpoint instead of `generator`.
      heads: attention heads of the DiT, if config.json is missing and the head width is not 128.
      text_len: text tokens of the DiT; from config.json, or 512, if None.
      dtype: floating-point dtype to store; that of the source if None.
      merge_lora: LoRA file; the stored kernels are W + B A alpha / r, summed in float32.
      lora_alpha: alpha of that file, or of a LoRA that is converted itself; its rank if None.
      overwrite: replace components that `out` already has.
      progress: callback after every array.

    Raises UserError, with all problems of the keys at once, before anything is written. If
    anything fails, `out` is unchanged.
    """
    # 1. Check names and shapes.
    options = {"heads": heads, "text_len": text_len, "lora_alpha": lora_alpha}
    hints = {name: value for name, value in options.items() if value is not None}
    plans = [_plan(state, hints, dtype) for state in find_sources(source, use_ema=use_ema)]
    _check_distinct(plans)
    adapters = None
    if merge_lora is not None:
        adapters = Adapters.open(merge_lora, alpha=lora_alpha)
        adapters.check(_mergeable_shapes(plans))
    # 2. Write.
    tokenizer = find_tokenizer(source) if source.is_dir() else None
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        _write_components(writer, plans, adapters, progress)
        if tokenizer is not None and (overwrite or not (out / TOKENIZER).exists()):
            writer.add_tokenizer(tokenizer)
        writer.commit()
    return [_report(plan) for plan in plans]


def _mergeable_shapes(plans: Sequence[_Plan]) -> dict[TreePath, Shape]:
    """Shapes of the DiT's parameters, for merging a LoRA; raises UserError if they are packed."""
    dit = next((plan for plan in plans if plan.component.name == "dit"), None)
    if dit is not None and dit.quantization is not None:
        raise UserError(
            f"{dit.source.path}: a LoRA cannot be merged into packed weights; merge it into the "
            "bfloat16 checkpoint and pack that with `longlive quantize`, or add it as a branch: "
            "`longlive quantize --lora=FILE --lora_mode=branch`"
        )
    return {leaf.path: leaf.shape for leaf in dit.leaves} if dit is not None else {}


def _plan(source: Source, hints: Mapping[str, Any], dtype: DTypeLike | None) -> _Plan:
    """Identifies a source and checks it; raises UserError if it does not match its component."""
    # 1. Component, parameters and config.
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    component, table = identify(shapes, str(source.path))
    match = table.match_keys(shapes)
    match.report.add(source.report)
    try:
        known = source.exported.get(component.name, source.hints)
        leaves, config = _resolve(component, table, match, {**known, **hints})
    except ValueError as error:
        raise UserError(f"{source.path}: {error}") from error
    # 2. Dtypes to store; layers are stacked, so all layers of a parameter need the same one.
    specs, mixed = {}, []
    for leaf in leaves:
        dtypes = {source.tensors[key].dtype for key in leaf.keys}
        if len(dtypes) > 1 and dtype is None:
            mixed.append(f"{leaf.keys[0]} ({', '.join(sorted(map(str, dtypes)))})")
        target = None if is_packed_array(leaf.path) else dtype
        specs[leaf.path] = ArraySpec(leaf.shape, stored_dtype(dtypes.pop(), target))
    if mixed:
        raise UserError(
            f"{source.path}: layers of different dtypes: {', '.join(mixed[:8])}; choose one with "
            "--dtype"
        )
    # 3. Packed kernels.
    record = None
    if source.quantization is not None:
        kernels = [path[:-1] for path in specs if is_packed_array(path) and path[-1] == "codes"]
        record = source.quantization.record(["/".join(kernel) for kernel in kernels])
    return _Plan(component, table.name, source, leaves, config, specs, record)


def _resolve(
    component: Component, table: KeyTable, match: TableMatch, hints: Mapping[str, Any]
) -> tuple[list[Leaf], Any]:
    """Leaves and config: shapes determine the config, which determines the expected shapes."""
    try:
        config = component.settings(dense_shapes(match.shapes), hints)
    except KeyError as error:  # the path of an array that the config depends on
        if error.args[0] not in match.paths:
            match.report.missing += table.unmatched(match)
        match.report.check(table.name)
        raise
    expected = expected_shapes(component, config)
    if expected is not None:
        table.compare(match, with_packed_shapes(expected, match.paths))
    match.report.check(table.name)
    return match.leaves, config


def stored_dtype(dtype: np.dtype, target: DTypeLike | None) -> np.dtype:
    """The dtype in which a tensor is stored: `target`, if both are given and it is floating."""
    is_floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.dtype(target) if target is not None and is_floating else dtype


def _check_distinct(plans: Sequence[_Plan]) -> None:
    """Raises UserError if two sources are the same component."""
    sources: dict[str, Path] = {}
    for plan in plans:
        name = plan.component.name
        if name in sources:
            raise UserError(
                f"{plan.source.path} and {sources[name]} are both the {name}; pass one of these "
                "files as --source"
            )
        sources[name] = plan.source.path


def _write_components(
    writer: CheckpointWriter,
    plans: Sequence[_Plan],
    adapters: "Adapters | None",
    progress: ProgressCallback,
) -> None:
    done, total = 0, sum(plan.nbytes for plan in plans)
    for plan in plans:
        name = plan.component.name
        for size in _write(writer, plan, adapters if name == "dit" else None):
            done += size
            progress(name, done, total)


def _write(writer: CheckpointWriter, plan: _Plan, adapters: "Adapters | None") -> Iterator[int]:
    """Writes a component, and yields the size in bytes of every array that was written."""
    provenance = {
        "source": plan.source.path.name,
        "part": plan.source.entry,
        "naming": plan.naming,
        "converted_by": f"longlive-jax {__version__}",
        "merged_lora": adapters.path.name if adapters else "",
    }
    array_writer = writer.add_component(
        plan.component.name,
        plan.specs,
        saved_settings(plan.config),
        provenance=provenance,
        quantization=plan.quantization,
    )
    for leaf in plan.leaves:
        array_writer.write(leaf.path, _slices(plan, leaf, adapters), stacked=leaf.rule.stacked)
        yield sum(plan.source.tensors[key].nbytes for key in leaf.keys)


def _slices(plan: _Plan, leaf: Leaf, adapters: "Adapters | None") -> Iterator[np.ndarray]:
    """The layers of a parameter, or all of it if it is not stacked."""
    dtype = plan.specs[leaf.path].dtype
    for layer, key in enumerate(leaf.keys):
        tensor = check_finite(plan.source.tensors[key].read(), key, str(plan.source.path))
        value = leaf.to_param(tensor)
        if adapters is not None:
            value = adapters.merged(leaf.path, layer, value)
        yield value.astype(dtype, copy=False)


def _report(plan: _Plan) -> ConvertedComponent:
    parameters = sum(math.prod(leaf.shape) for leaf in plan.leaves)
    return ConvertedComponent(
        component=plan.component.name,
        naming=plan.naming,
        source=plan.source.path,
        tensors=len(plan.source.tensors),
        parameters=parameters,
        config=saved_settings(plan.config),
        entry=plan.source.entry,
        is_packed=plan.quantization is not None,
    )


@dataclasses.dataclass(frozen=True)
class Adapters:
    """A LoRA file, ready to be merged into kernels.

    Attributes:
      path: LoRA file.
      leaves: adapter factors by path, `(..., "a")` and `(..., "b")`.
      tensors: tensors of the file by key.
      scale: alpha / r.
    """

    path: Path
    leaves: Mapping[TreePath, Leaf]
    tensors: Mapping[str, LazyTensor]
    scale: float

    @classmethod
    def open(cls, path: Path, *, alpha: float | None = None) -> "Adapters":
        """Opens and checks a LoRA file; raises UserError if it is not one.

        `alpha` defaults to `lora_alpha` of a config.json in the same folder, or else to the rank.
        """
        sources = find_sources(path)
        hints = {} if alpha is None else {"lora_alpha": alpha}
        plan = _plan(sources[0], {**_peft_alpha(sources[0]), **hints}, None)
        if len(sources) != 1 or plan.component is not COMPONENTS["lora"]:
            raise UserError(
                f"{path}: is not a LoRA file (its keys must start with {PEFT_PREFIX}blocks.)"
            )
        leaves = {leaf.path: leaf for leaf in plan.leaves}
        scale = plan.config["alpha"] / plan.config["rank"]
        return cls(path, leaves, plan.source.tensors, scale)

    def check(self, shapes: Mapping[TreePath, Shape]) -> None:
        """Raises UserError unless every adapter fits a kernel among a DiT's parameter shapes."""
        report = KeyReport()
        for path, leaf in self.leaves.items():
            kernel = shapes.get((*path[:-1], "kernel"))
            width = None if kernel is None else kernel[1 if path[-1] == "a" else 2]
            if kernel is None:
                report.extra.append(leaf.keys[0])
            elif (leaf.shape[0], leaf.shape[1 if path[-1] == "a" else 2]) != (kernel[0], width):
                report.misshapen.append(f"{leaf.keys[0]} {leaf.shape} for kernel {kernel}")
        report.check(f"{self.path}: LoRA for this DiT")

    def merged(self, path: TreePath, layer: int, kernel: np.ndarray) -> np.ndarray:
        """`kernel + a @ b * alpha / r`, summed in float32; the kernel itself if it has no adapter.

        Args:
          path: path of the array.
          layer: index of the layer.
          kernel: values of this layer `[i, o]`.
        """
        factors = [self.leaves.get((*path[:-1], name)) for name in "ab"]
        if path[-1] != "kernel" or factors[0] is None or factors[1] is None:
            return kernel
        a, b = (self.layer(leaf, layer) for leaf in factors if leaf)
        update = a.astype(np.float32) @ b.astype(np.float32)
        return (kernel.astype(np.float32) + update * self.scale).astype(kernel.dtype)

    def layer(self, leaf: Leaf, layer: int) -> np.ndarray:
        """One factor, `[i, r]` or `[r, o]`, of one adapter."""
        key = leaf.keys[layer]
        return leaf.to_param(check_finite(self.tensors[key].read(), key, str(self.path)))

    def layers(self, path: TreePath) -> Iterator[np.ndarray]:
        """The factor `(..., "a")` or `(..., "b")` in all layers."""
        leaf = self.leaves[path]
        return (self.layer(leaf, layer) for layer in range(len(leaf.keys)))


def _peft_alpha(source: Source) -> dict[str, Any]:
    """`lora_alpha` of the config.json next to a LoRA file, if there is one."""
    alpha = source.hints.get("lora_alpha")
    return {} if alpha is None else {"lora_alpha": alpha}
