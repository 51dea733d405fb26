"""Trained adapters as files: where a run ends, and where the next one starts."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from longlive_jax.adapters import SETTINGS, Adapter, load_adapter, save_adapter
from longlive_jax.interop.lora_file import component_of
from longlive_jax.io.checkpoint import CHECKPOINT_MANIFEST, read_manifest, weights_fingerprint
from longlive_jax.quant.lora import LoRASpec, check_adapter, init_adapter
from longlive_jax.spec import UserError
from longlive_jax.training.objectives.dmd.roles import CRITIC, GENERATOR
from longlive_jax.typing import Params

__all__ = ["export_adapter", "read_adapters"]


def read_adapters(path: Path, shapes: Params, lora: LoRASpec) -> dict[str, Params]:
    """Adapters by group, float32, to go on from.

    A directory of ours gives those of student and critic, if it has both; other files give the
    student's alone.

    Args:
      path: directory or file of an adapter.
      shapes: shapes of the model's parameters.
      lora: settings of the run's adapters.

    Raises UserError if there is no adapter of a student, or one of another model, rank or scale.
    """
    loaded = {GENERATOR: load_adapter(path)}
    if loaded[GENERATOR].role == CRITIC:
        raise UserError(f"{path}: has the adapter of a critic alone; give one of a student")
    manifest = read_manifest(path) if (path / CHECKPOINT_MANIFEST).is_file() else {}
    if component_of(CRITIC) in manifest.get("components", {}):
        loaded[CRITIC] = load_adapter(path, role=CRITIC)
    for adapter in loaded.values():
        _check(adapter, shapes, lora)
    return {
        group: jax.tree.map(lambda x: np.asarray(x, np.float32), adapter.branches)
        for group, adapter in loaded.items()
    }


def _check(adapter: Adapter, shapes: Params, lora: LoRASpec) -> None:
    """Raises UserError for an adapter that does not fit the run."""
    try:
        check_adapter(shapes, adapter.branches)
        expected = jax.eval_shape(lambda key: init_adapter(key, shapes, lora), jax.random.key(0))
    except ValueError as error:
        raise UserError(f"{adapter.name}: {error}") from error
    got, want = (
        jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (adapter.branches, expected)
    )
    if got != want or not np.isclose(adapter.scale, lora.scale):
        raise UserError(
            f"{adapter.name}: has rank {adapter.rank}, alpha {adapter.alpha:g} and "
            f"{len(adapter.targets)} linears, which config.lora (rank {lora.rank}, alpha "
            f"{lora.scale * lora.rank:g}) does not; give config.lora of that run"
        )


def export_adapter(
    directory: Path,
    branches: Params,
    spec: LoRASpec,
    *,
    base: Path,
    sampling: Mapping[str, Any],
    provenance: Mapping[str, Any],
    role: str = "adapter",
) -> tuple[str, ...]:
    """Writes an adapter to a directory, replacing one of its role; returns notes on its use.

    Args:
      directory: new, or with adapters.
      branches: low-rank factors.
      spec: settings of the adapter.
      base: checkpoint whose DiT it adapts.
      sampling: fields of `SampleSpec` that suit the trained model.
      provenance: how it was made.
      role: one of `ROLES`.

    Raises UserError for values that are not finite.
    """
    adapter = Adapter(
        jax.tree.map(np.asarray, branches),
        spec.scale,
        {name: sampling[name] for name in SETTINGS if name in sampling},
        role,
        weights_fingerprint(base, "dit"),
        provenance,
        name=str(directory),
    )
    save_adapter(directory, adapter, overwrite=True)
    source, path = (shlex.quote(str(x)) for x in (base, directory))
    return (f"use it: longlive sample --checkpoint={source} --adapter={path} --script=SCRIPT",)
