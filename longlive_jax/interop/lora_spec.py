"""Adapters to be merged into kernels before packing, or to be stored beside packed ones."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longlive_jax.interop.lora_file import LoraFile
from longlive_jax.io.arrays import Shape, TreePath

__all__ = ["LoraSpec", "LoraStack"]


@dataclasses.dataclass(frozen=True)
class LoraStack:
    """Adapters that are applied together.

    Attributes:
      files: adapters and their strengths.
    """

    files: Sequence[tuple[LoraFile, float]]

    @property
    def name(self) -> str:
        """Names of the files, with strengths other than 1."""
        return ", ".join(
            file.path.name + (f":{strength:g}" if strength != 1 else "")
            for file, strength in self.files
        )

    @property
    def scale(self) -> float:
        """Scale of the branches: that of a single adapter; 1 for several, whose B has theirs."""
        file, strength = self.files[0]
        return file.scale * strength if len(self.files) == 1 else 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """The sampling settings of all adapters, the last one's first."""
        settings: dict[str, Any] = {}
        for file, _ in self.files:
            if {"steps", "shift"} & set(file.info.settings):
                settings.pop("levels", None)  # they belong to the steps that are replaced
            settings |= file.info.settings
        return settings

    def shapes(self) -> dict[TreePath, Shape]:
        """Shapes of the branches' factors by path."""
        joined: dict[TreePath, Shape] = {}
        for file, _ in self.files:
            for path, spec in file.specs.items():
                axis, shape = (2 if path[-1] == "a" else 1), list(spec.shape)
                if path in joined:
                    shape[axis] += joined[path][axis]
                    shape[0] = max(shape[0], joined[path][0])
                joined[path] = tuple(shape)
        return joined

    def layer(self, path: TreePath, index: int) -> np.ndarray:
        """One layer of a branch's factor: that of the adapters next to each other."""
        axis, parts = (1 if path[-1] == "a" else 0), []
        for file, strength in self.files:
            if path not in file.specs:
                continue
            shape = file.specs[path].shape
            if index >= shape[0]:
                parts.append(np.zeros(shape[1:], np.float32))
                continue
            value = file.layer(path, index)
            if len(self.files) > 1 and path[-1] == "b":
                value = value.astype(np.float32) * np.float32(file.scale * strength)
            parts.append(value)
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Adapters and how to apply them.

    Attributes:
      path: adapter: a directory of ours, or a LoRA file.
      mode: "merge" all adapters into the kernels before packing, or store them as a "branch" next
        to the packed kernels, in high precision.
      alpha: alpha of the adapter; that of its file, or its rank, if None.
      strength: what its scale is multiplied by.
      more: further adapters and their strengths.
    """

    path: Path
    mode: Literal["merge", "branch"] = "merge"
    alpha: float | None = None
    strength: float = 1.0
    more: Sequence[tuple[Path, float]] = ()

    def open(self) -> LoraStack:
        """The adapters, opened; raises UserError for one that cannot be read."""
        first = LoraFile.open(self.path, alpha=self.alpha)
        rest = [(LoraFile.open(path), strength) for path, strength in self.more]
        return LoraStack([(first, self.strength), *rest])
