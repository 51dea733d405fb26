"""Adapters in files: read from all forms that are known, written in three of them."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.adapters.adapter import Adapter
from longlive_jax.interop.export import atomic_folder
from longlive_jax.interop.lora_dialects import LoraInfo
from longlive_jax.interop.lora_file import WEIGHTS, LoraFile, component_of, lora_config
from longlive_jax.interop.lora_writer import (
    lora_metadata,
    lora_tensors,
    write_lora_pt,
    write_peft_config,
)
from longlive_jax.interop.safetensors_file import write_safetensors
from longlive_jax.interop.sources import TORCH_SUFFIXES, has_critic
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.io.arrays import ArraySpec, TreePath, nest
from longlive_jax.io.builtin import find_adapter
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, read_manifest, save_component
from longlive_jax.spec import UserError

__all__ = ["export_original", "export_peft", "is_adapter", "load_adapter", "load_adapters"]
__all__ += ["parse_strength", "save_adapter"]


def load_adapter(
    path: str | os.PathLike, *, role: str | None = None, alpha: float | None = None
) -> Adapter:
    """Reads an adapter; layers that a file lacks are zeros.

    Args:
      path: directory of ours, PEFT's folder, a safetensors file in one of several namings, a
        `.pt` file of the original, or the name of the built-in adapter.
      role: "critic" takes the critic's adapter where a file has two.
      alpha: alpha in place of the file's own; without either, it is the rank.

    Raises UserError for a missing or damaged file, and for values that are not finite.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"an adapter is a path or an Adapter, got {type(path).__name__}")
    file = LoraFile.open(find_adapter(path), alpha=alpha, role=role)
    factors = {key: np.stack(list(file.layers(key))) for key in file.specs}
    info = file.info
    return Adapter(
        nest(factors),
        file.scale,
        info.settings,
        info.role,
        info.base,
        info.provenance,
        name=str(path),
        is_partial=info.is_partial,
    )


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a path is an adapter alone: a file, PEFT's folder, or a directory without models."""
    folder = Path(path)
    if (folder / CHECKPOINT_MANIFEST).is_file():
        names = set(read_manifest(folder)["components"])
        return bool(names) and names <= {"lora", "critic_lora"}
    return folder.is_file() or (folder / WEIGHTS).is_file()


def load_adapters(path: str | os.PathLike) -> dict[str, Adapter]:
    """All adapters at a path by role, "generator" and "critic"; the first is that of others, too.

    Raises UserError like `load_adapter`.
    """
    folder = Path(path)
    if (folder / CHECKPOINT_MANIFEST).is_file():
        components = read_manifest(folder)["components"]
        names = {component_of(role): role for role in ("generator", "critic")}
        roles = [role for name, role in names.items() if name in components]
    elif folder.suffix in TORCH_SUFFIXES and folder.is_file():
        is_alone = has_critic(folder) and "generator_lora" not in read_torch(folder)
        roles = [] if is_alone else ["generator"]
        roles += ["critic"] * has_critic(folder)
    else:
        adapter = load_adapter(path)
        return {"critic" if adapter.role == "critic" else "generator": adapter}
    return {role: load_adapter(path, role=role) for role in roles}


def save_adapter(folder: str | os.PathLike, adapter: Adapter, *, overwrite: bool = False) -> None:
    """Writes an adapter to a directory of ours, or adds it to one; atomic.

    Raises UserError if the directory has one of this role (without `overwrite`) or holds other
    files, and for values that are not finite.
    """
    adapter.check_finite()
    config = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": list(adapter.targets)}
    save_component(
        folder,
        component_of(adapter.role),
        adapter.branches,
        lora_config(config, _info(adapter)),
        provenance=adapter.provenance,
        overwrite=overwrite,
    )


def export_peft(folder: str | os.PathLike, adapter: Adapter) -> list[Path]:
    """Writes `adapter_model.safetensors` and `adapter_config.json` to a new folder.

    Settings and origin are in the metadata of the first. Returns both files. Raises UserError if
    the folder exists and is not empty, and for values that are not finite.
    """
    adapter.check_finite()
    out = Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose a new folder")
    config = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": list(adapter.targets)}
    tensors = lora_tensors(*_source(adapter))
    with atomic_folder(out) as temporary:
        temporary.mkdir(parents=True)
        write_peft_config(temporary, config)
        write_safetensors(
            temporary, "adapter_model", tensors, metadata=lora_metadata(_info(adapter))
        )
    return [out / "adapter_model.safetensors", out / "adapter_config.json"]


def export_original(
    path: str | os.PathLike,
    *,
    generator: Adapter | None = None,
    critic: Adapter | None = None,
    step: int = 0,
) -> None:
    """Writes the `.pt` file of the original's training: `generator_lora`, `critic_lora`, `step`.

    Raises UserError without an adapter, if the file exists, and for values that are not finite.
    """
    given = {"generator_lora": generator, "critic_lora": critic}
    adapters = {}
    for name, adapter in given.items():
        if adapter is not None:
            adapter.check_finite()
            adapters[name] = (lora_tensors(*_source(adapter)), _info(adapter))
    if not adapters:
        raise UserError(f"{path}: no adapter to write; give generator or critic")
    write_lora_pt(Path(path), adapters, step=step)


def parse_strength(text: str) -> tuple[str, float]:
    """Path and strength of `PATH[:SCALE]`; the strength is 1 without a scale.

    Raises UserError for a scale that is not a finite number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not path or not math.isfinite(strength):
        raise UserError(
            f"adapter {text!r}: the scale must be a finite number, got {number!r}; write "
            "PATH or PATH:SCALE, such as lora.safetensors:0.8"
        )
    return path, strength


def _info(adapter: Adapter) -> LoraInfo:
    return LoraInfo(
        alpha=adapter.alpha,
        role=adapter.role,
        settings=json.loads(json.dumps(adapter.settings)),  # lists for tuples
        base=adapter.base,
        provenance=adapter.provenance,
        is_partial=adapter.is_partial,
    )


def _source(
    adapter: Adapter,
) -> tuple[dict[TreePath, ArraySpec], Callable[[TreePath, int], np.ndarray]]:
    """Specs of the factors, and the function that gives one layer of one of them."""
    factors: dict[TreePath, Any] = adapter.factors
    specs = {k: ArraySpec(tuple(x.shape), np.dtype(x.dtype)) for k, x in factors.items()}
    return specs, lambda key, layer: np.asarray(factors[key][layer])
