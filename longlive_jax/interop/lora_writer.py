"""Writes adapters as other programs read them: PEFT's folder, and the original's `.pt` file."""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.interop.keys_lora import PEFT, PEFT_PREFIX
from longlive_jax.interop.keytable import Leaf
from longlive_jax.interop.lora_dialects import ADAPTER_CONFIG, INFO_KEY, LoraInfo
from longlive_jax.interop.safetensors_file import OutputTensor
from longlive_jax.interop.torch_writer import write_torch
from longlive_jax.io.arrays import ArraySpec, TreePath
from longlive_jax.spec import UserError

__all__ = ["lora_metadata", "lora_tensors", "write_lora_pt", "write_peft_config"]


def lora_tensors(
    specs: Mapping[TreePath, ArraySpec], layer: Callable[[TreePath, int], np.ndarray]
) -> dict[str, OutputTensor]:
    """The tensors of an adapter by PEFT's names, block 10 after block 9.

    Args:
      specs: shapes and dtypes of the factors by path.
      layer: function from a path and the index of a layer to its factor.

    Raises UserError for factors of linears that have no names there.
    """
    tensors: dict[str, OutputTensor] = {}
    for leaf in PEFT.backward({path: spec.shape for path, spec in specs.items()}):
        _, rows, columns = leaf.shape
        for index, key in enumerate(leaf.keys):
            make = functools.partial(_make, leaf, layer, index)
            tensors[key] = OutputTensor((columns, rows), specs[leaf.path].dtype, make)
    return dict(sorted(tensors.items(), key=lambda item: _order(item[0])))


def _make(leaf: Leaf, layer: Callable[[TreePath, int], np.ndarray], index: int) -> np.ndarray:
    return leaf.to_tensor(np.asarray(layer(leaf.path, index)))


def _order(key: str) -> tuple[int, str]:
    """A sort key: the number of the block, then the rest."""
    block, _, rest = key.removeprefix(f"{PEFT_PREFIX}blocks.").partition(".")
    return int(block), rest


def lora_metadata(info: LoraInfo) -> dict[str, str]:
    """What the header of a safetensors file says about its adapter."""
    return {INFO_KEY: json.dumps(info.values())}


def write_peft_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes PEFT's adapter_config.json for an adapter with this `rank`, `alpha` and `targets`."""
    keys = (leaf.keys[0] for leaf in PEFT.backward(_one_layer(config["targets"])))
    modules = {".".join(key.split(".")[4:-2]) for key in keys}
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config["rank"],
        "lora_alpha": config["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(modules),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n")


def _one_layer(targets: list[str]) -> dict[TreePath, tuple[int, ...]]:
    """Shapes that stand for one factor of every target."""
    return {(*target.split("."), "a"): (1, 1, 1) for target in targets}


def write_lora_pt(
    path: Path, adapters: Mapping[str, tuple[Mapping[str, OutputTensor], LoraInfo]], *, step: int
) -> None:
    """Writes a checkpoint of the original's training.

    Args:
      path: file to write; it is complete or missing.
      adapters: tensors and info by entry, "generator_lora" or "critic_lora".
      step: number of updates.

    Raises UserError if the file exists or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path}: exists; choose a new file")
    contents: dict[str, Any] = {name: dict(tensors) for name, (tensors, _) in adapters.items()}
    contents |= {
        "step": step,
        INFO_KEY: {name: info.values() for name, (_, info) in adapters.items()},
    }
    temporary = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_torch(temporary, contents)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
