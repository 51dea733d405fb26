"""LoRA adapters in files, read layer by layer: our directories, safetensors, and `.pt` files."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.interop.components import COMPONENTS
from longlive_jax.interop.finite import check_finite
from longlive_jax.interop.keys_lora import PEFT, PEFT_PREFIX
from longlive_jax.interop.keytable import Leaf
from longlive_jax.interop.lora_dialects import LoraInfo
from longlive_jax.interop.sources import Source, find_sources
from longlive_jax.io.arrays import ArraySpec, Shape, TreePath
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, open_component, read_manifest
from longlive_jax.spec import UserError

__all__ = ["WEIGHTS", "LoraFile", "check_fits", "component_of", "lora_config", "lora_info"]
__all__ += ["merged"]

WEIGHTS = "adapter_model.safetensors"
"""PEFT's file of an adapter's weights."""
_INFO_FIELDS = ("role", "settings", "base")


def component_of(role: str) -> str:
    """The component of a checkpoint directory that holds an adapter of this role."""
    return "critic_lora" if role == "critic" else "lora"


def lora_config(config: Mapping[str, Any], info: LoraInfo) -> dict[str, Any]:
    """Settings of an adapter's component: rank, alpha, targets, and those of `LoraInfo`."""
    return {**config, **{name: info.values()[name] for name in (*_INFO_FIELDS, "is_partial")}}


def lora_info(config: Mapping[str, Any], provenance: Mapping[str, Any], where: str) -> LoraInfo:
    """What the settings and the provenance of an adapter's component say: of `lora_config`."""
    values = {name: config.get(name) for name in ("alpha", *_INFO_FIELDS, "is_partial")}
    return LoraInfo.parse({**values, "provenance": provenance}, where)


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """An adapter whose factors stay in their file until they are read.

    Attributes:
      path: file or directory.
      specs: shapes and dtypes of the factors by path, `(..., "a")` [l, i, r] and `(..., "b")`
        [l, r, o].
      layer: function from a path and the index of a layer to its factor; UserError if values are
        not finite.
      rank: rank of all factors.
      alpha: numerator of the scale.
      info: what the file says besides.
    """

    path: Path
    specs: Mapping[TreePath, ArraySpec]
    layer: Callable[[TreePath, int], np.ndarray] = dataclasses.field(repr=False)
    rank: int
    alpha: float
    info: LoraInfo

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied with: alpha / rank."""
        return self.alpha / self.rank

    @classmethod
    def open(cls, path: Path, *, alpha: float | None = None, role: str | None = None) -> "LoraFile":
        """Opens and checks an adapter; raises UserError if it is not one.

        Args:
          path: directory of ours, folder of PEFT, safetensors file, or `.pt` file.
          alpha: alpha in place of the file's own.
          role: "critic" takes the critic's adapter where there are several.
        """
        if (path / CHECKPOINT_MANIFEST).is_file():
            return _open_directory(cls, path, alpha, role)
        sources = find_sources(path / WEIGHTS if (path / WEIGHTS).is_file() else path, role=role)
        if len(sources) != 1 or sources[0].lora is None:
            raise UserError(
                f"{path}: is not a LoRA file (its keys must start with {PEFT_PREFIX}blocks.)"
            )
        return _open_source(cls, sources[0], alpha)

    def layers(self, path: TreePath) -> Iterator[np.ndarray]:
        """A factor in all layers."""
        return (self.layer(path, layer) for layer in range(self.specs[path].shape[0]))

    def check(self, shapes: Mapping[TreePath, Shape]) -> None:
        """Raises UserError unless every adapter fits a kernel among a DiT's parameter shapes."""
        factors = {path: spec.shape for path, spec in self.specs.items()}
        check_fits(factors, shapes, str(self.path), is_partial=self.info.is_partial)

    def update(self, path: TreePath, layer: int) -> np.ndarray | None:
        """`a @ b * alpha / r` in float32 for a layer of a kernel; None without an adapter."""
        spec = self.specs.get((*path[:-1], "a"))
        if path[-1] != "kernel" or spec is None or layer >= spec.shape[0]:
            return None
        a, b = (self.layer((*path[:-1], name), layer).astype(np.float32) for name in "ab")
        return (a @ b) * self.scale

    def merged(self, path: TreePath, layer: int, kernel: np.ndarray) -> np.ndarray:
        """`kernel + a @ b * alpha / r`, summed in float32; the kernel itself if it has no adapter.

        Args:
          path: path of the array.
          layer: index of the layer.
          kernel: values of this layer `[i, o]`.
        """
        return merged([(self, 1.0)], path, layer, kernel)


def merged(
    files: Sequence[tuple[LoraFile, float]], path: TreePath, layer: int, kernel: np.ndarray
) -> np.ndarray:
    """A layer of a kernel with the updates of several adapters at their strengths.

    Summed in float32, in the dtype of the kernel; the kernel itself if none adapts it.
    """
    total = None
    for file, strength in files:
        update = file.update(path, layer)
        if update is not None:
            total = kernel.astype(np.float32) if total is None else total
            total = total + (update if strength == 1 else update * np.float32(strength))
    return kernel if total is None else total.astype(kernel.dtype)


def check_fits(
    factors: Mapping[TreePath, Shape],
    shapes: Mapping[TreePath, Shape],
    where: str,
    *,
    is_partial: bool = False,
) -> None:
    """Raises UserError unless every factor fits a kernel among a DiT's parameter shapes.

    Args:
      factors: shapes of the factors by path, `(..., "a")` and `(..., "b")`.
      shapes: shapes of the parameters by path.
      where: name of the adapter for messages.
      is_partial: whether the model may have more layers than the adapter.
    """
    for path, shape in factors.items():
        name, kernel = ".".join(path[:-1]), shapes.get((*path[:-1], "kernel"))
        side = 1 if path[-1] == "a" else 2
        if kernel is None or len(kernel) != 3:
            raise UserError(
                f"{where}: is for another model: it adapts {name}, which this one has not"
            )
        problem = ""
        if shape[side] != kernel[side]:
            problem = f"{'inputs' if side == 1 else 'outputs'} of {name}"
        elif shape[0] > kernel[0] or (shape[0] < kernel[0] and not is_partial):
            problem = "layers"
        if problem:
            got, want = (x[0 if problem == "layers" else side] for x in (shape, kernel))
            raise UserError(
                f"{where}: is for another model: it has {got} {problem}, this one has {want}; "
                "choose the model that it was made for"
            )


def _open_source(cls: type[LoraFile], source: Source, alpha: float | None) -> LoraFile:
    """A file of another library."""
    # 1. Factors.
    where = str(source.path)
    match = PEFT.match_keys({key: tensor.shape for key, tensor in source.tensors.items()})
    match.report.add(source.report)
    try:
        match.report.check(PEFT.name)
        hints = source.hints if alpha is None else {**source.hints, "lora_alpha": alpha}
        config = COMPONENTS["lora"].settings(match.shapes, hints)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    leaves = {leaf.path: leaf for leaf in match.leaves}
    # 2. Their dtypes; layers are stacked, so those of different dtypes become float32.
    specs = {}
    for path, leaf in leaves.items():
        dtypes = {source.tensors[key].dtype for key in leaf.keys}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        specs[path] = ArraySpec(leaf.shape, dtype)

    def layer(path: TreePath, index: int) -> np.ndarray:
        leaf: Leaf = leaves[path]
        key = leaf.keys[index]
        tensor = check_finite(source.tensors[key].read(), key, where)
        return leaf.to_param(tensor).astype(specs[path].dtype, copy=False)

    assert source.lora is not None
    return cls(source.path, specs, layer, config["rank"], float(config["alpha"]), source.lora)


def _open_directory(
    cls: type[LoraFile], path: Path, alpha: float | None, role: str | None
) -> LoraFile:
    """An adapter in a checkpoint directory."""
    name, names = component_of(role or ""), read_manifest(path)["components"]
    if role is None and "lora" not in names and "critic_lora" in names:
        name = "critic_lora"
    if name not in names:
        raise UserError(f"{path}: has no adapter ({name}); it has {', '.join(names) or 'nothing'}")
    reader, config = open_component(path, name)
    where = f"{path}: settings of {name}"
    info = lora_info(config, read_manifest(path)["provenance"].get(name, {}), where)
    if not isinstance(config.get("rank"), int) or not isinstance(config.get("alpha"), int | float):
        raise UserError(f"{where}: rank and alpha are missing; save the adapter again")
    factors = dict(reader.specs)
    if odd := [x for x in factors if x[-1] not in "ab" or len(factors[x].shape) != 3]:
        raise UserError(f"{where}: {'.'.join(odd[0])} is not a factor; save the adapter again")

    read = functools.lru_cache(maxsize=2)(reader.read)  # completely, to verify its fingerprint

    def layer(key: TreePath, index: int) -> np.ndarray:
        return check_finite(read(key)[index], ".".join(key), str(path))

    chosen = float(config["alpha"] if alpha is None else alpha)
    return cls(path, factors, layer, config["rank"], chosen, info)
