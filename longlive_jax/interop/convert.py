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
from longlive_jax.interop.keytable import KeyTable, Leaf, TableMatch
from longlive_jax.interop.lora_file import LoraFile, component_of, lora_config
from longlive_jax.interop.sources import Source, find_sources, find_tokenizer, with_critics
from longlive_jax.io.arrays import ArraySpec, TreePath
from longlive_jax.io.checkpoint import TOKENIZER, CheckpointWriter, is_packed_array
from longlive_jax.io.packed_kernels import QuantizationRecord, dense_shapes, with_packed_shapes
from longlive_jax.io.progress import ProgressCallback, no_progress
from longlive_jax.spec import UserError

__all__ = ["ConvertedComponent", "convert"]


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
    role: str | None = None,
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
      lora_alpha: alpha of the LoRA that is merged or converted; its own, or its rank, if None.
      role: "critic" takes `critic_lora` alone of a file with two adapters; None takes both.
      overwrite: replace components that `out` already has.
      progress: callback after every array.

    Raises UserError, with all problems of the keys at once, before anything is written. If
    anything fails, `out` is unchanged.
    """
    # 1. Check names and shapes.
    options = {"heads": heads, "text_len": text_len, "lora_alpha": lora_alpha}
    hints = {name: value for name, value in options.items() if value is not None}
    states = _sources(source, use_ema, role)
    plans = [_plan(state, hints, dtype) for state in states]
    _check_distinct(plans)
    adapter = None if merge_lora is None else _mergeable(merge_lora, lora_alpha, plans)
    # 2. Write.
    tokenizer = find_tokenizer(source) if source.is_dir() else None
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        _write_components(writer, plans, adapter, progress)
        if tokenizer is not None and (overwrite or not (out / TOKENIZER).exists()):
            writer.add_tokenizer(tokenizer)
        writer.commit()
    return [_report(plan) for plan in plans]


def _sources(source: Path, use_ema: bool, role: str | None) -> list[Source]:
    """What is converted: without a role both adapters of a file."""
    states = find_sources(source, use_ema=use_ema, role=role)
    return with_critics(states) if role is None else states


def _mergeable(path: Path, alpha: float | None, plans: Sequence[_Plan]) -> LoraFile:
    """A LoRA that fits the DiT; raises UserError if it does not, or if the DiT is packed."""
    adapter = LoraFile.open(path, alpha=alpha)
    dit = next((plan for plan in plans if plan.component.name == "dit"), None)
    if dit is not None and dit.quantization is not None:
        raise UserError(
            f"{dit.source.path}: a LoRA cannot be merged into packed weights; merge it into the "
            "bfloat16 checkpoint and pack that with `longlive quantize`, or add it as a branch: "
            "`longlive quantize --adapter=FILE --adapter_mode=branch`"
        )
    adapter.check({leaf.path: leaf.shape for leaf in dit.leaves} if dit is not None else {})
    return adapter


def _plan(source: Source, hints: Mapping[str, Any], dtype: DTypeLike | None) -> _Plan:
    """Identifies a source and checks it; raises UserError if it does not match its component."""
    # 1. Component, parameters and config.
    shapes = {key: tensor.shape for key, tensor in source.tensors.items()}
    component, table = identify(shapes, str(source.path))
    if source.lora is not None:
        component = COMPONENTS[component_of(source.lora.role)]
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
    if source.lora is not None:
        config = lora_config(config, source.lora)
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
    adapter: LoraFile | None,
    progress: ProgressCallback,
) -> None:
    done, total = 0, sum(plan.nbytes for plan in plans)
    for plan in plans:
        name = plan.component.name
        for size in _write(writer, plan, adapter if name == "dit" else None):
            done += size
            progress(name, done, total)


def _write(writer: CheckpointWriter, plan: _Plan, adapter: LoraFile | None) -> Iterator[int]:
    """Writes a component, and yields the size in bytes of every array that was written."""
    provenance: dict[str, Any] = {
        "source": plan.source.path.name,
        "part": plan.source.entry,
        "naming": plan.naming,
        "converted_by": f"longlive-jax {__version__}",
        "merged_lora": adapter.path.name if adapter else "",
    }
    if plan.source.lora is not None and plan.source.lora.provenance:
        provenance["from"] = plan.source.lora.values()["provenance"]
    array_writer = writer.add_component(
        plan.component.name,
        plan.specs,
        saved_settings(plan.config),
        provenance=provenance,
        quantization=plan.quantization,
    )
    for leaf in plan.leaves:
        array_writer.write(leaf.path, _slices(plan, leaf, adapter), stacked=leaf.rule.stacked)
        yield sum(plan.source.tensors[key].nbytes for key in leaf.keys)


def _slices(plan: _Plan, leaf: Leaf, adapter: LoraFile | None) -> Iterator[np.ndarray]:
    """The layers of a parameter, or all of it if it is not stacked."""
    dtype = plan.specs[leaf.path].dtype
    for layer, key in enumerate(leaf.keys):
        tensor = check_finite(plan.source.tensors[key].read(), key, str(plan.source.path))
        value = leaf.to_param(tensor)
        if adapter is not None:
            value = adapter.merged(leaf.path, layer, value)
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
