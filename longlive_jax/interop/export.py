"""Exports our checkpoint directory to safetensors, in the original or diffusers naming.

A packed DiT is written as `model_4o6.pt`, the format of LongLive-2.0's release.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.interop import diffusers_folder, keys_vae, released
from longlive_jax.interop.components import COMPONENTS
from longlive_jax.interop.finite import check_finite
from longlive_jax.interop.keytable import KeyTable, Leaf
from longlive_jax.interop.lora_file import lora_info
from longlive_jax.interop.lora_writer import lora_metadata, write_peft_config
from longlive_jax.interop.safetensors_file import (
    DEFAULT_SHARD_BYTES,
    OutputTensor,
    write_safetensors,
)
from longlive_jax.interop.torch_writer import write_torch
from longlive_jax.io.arrays import ArrayReader
from longlive_jax.io.checkpoint import TOKENIZER, is_packed_array, open_component, read_manifest
from longlive_jax.io.packed_kernels import QuantizationRecord, read_quantization
from longlive_jax.io.parts import MODELS_FILE, SETTINGS_FILE
from longlive_jax.io.progress import ProgressCallback, no_progress
from longlive_jax.spec import UserError

__all__ = ["NAMINGS", "RELEASED_FILE", "atomic_folder", "export", "slice_shape"]

NAMINGS = ("original", "diffusers")
RELEASED_FILE = "model_4o6.pt"
FILES = {
    "original": {
        "dit": (".", "diffusion_pytorch_model"),
        "vae": (".", "Wan2.2_VAE"),
        "umt5": (".", "models_t5_umt5-xxl-enc"),
        "lora": ("lora", "adapter_model"),
        "critic_lora": ("critic_lora", "adapter_model"),
    },
    "diffusers": {
        "dit": ("transformer", "diffusion_pytorch_model"),
        "vae": ("vae", "diffusion_pytorch_model"),
        "umt5": ("text_encoder", "model"),
        "lora": ("lora", "adapter_model"),
        "critic_lora": ("critic_lora", "adapter_model"),
    },
}
"""Folder and file stem of each component, by naming."""
UNTOLD = {
    "vae": {"latents_mean": "latent_mean", "latents_std": "latent_std", "z_dim": "z_dim"},
    "umt5": {
        "d_model": "dim",
        "layer_norm_epsilon": "eps",
        "relative_attention_max_distance": "max_distance",
    },
}
"""Settings that the original files cannot tell: diffusers' names and ours, by component."""
TOKENIZER_FILE = {
    "original": "google/umt5-xxl/spiece.model",
    "diffusers": diffusers_folder.TOKENIZER_FILE,
}


def export(
    source: Path,
    out: Path,
    naming: str,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: ProgressCallback = no_progress,
) -> list[Path]:
    """Writes all components of the checkpoint directory `source` to the new folder `out`.

    Values are copied bit for bit: converting `out` gives the same arrays. Memory is bounded by one
    tensor. `out` is renamed into place at the end, so it is complete or missing.

    Args:
      naming: "original" or "diffusers"; a packed DiT has the original naming only.
      shard_bytes: largest size of a safetensors file.
      progress: callback after every tensor.

    Returns:
      The files with weights.

    Raises UserError if `out` exists and is not empty, or if a component has no equivalent in this
    naming.
    """
    # 1. Check, and plan all tensors.
    if naming not in NAMINGS:
        raise UserError(f"naming must be {' or '.join(NAMINGS)}, got {naming!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose a new folder")
    names = [n for n in read_manifest(source)["components"] if n in COMPONENTS]
    record = read_quantization(source) if "dit" in names else None
    if record is not None:
        _check_releasable(source, record, naming)
    opened = {name: open_component(source, name) for name in names}
    components = {name: _output_tensors(name, naming, *opened[name]) for name in names}
    # 2. Write.
    with atomic_folder(out) as temporary:
        for name, (_, config) in opened.items():
            _write_config(temporary / FILES[naming][name][0], naming, name, config)
        written = _write_weights(
            temporary, naming, components, record, _metadata(source, opened), shard_bytes, progress
        )
        _copy_tokenizer(source, temporary / TOKENIZER_FILE[naming])
        _write_settings(source, temporary, naming, {n: config for n, (_, config) in opened.items()})
    return [out / path.relative_to(temporary) for path in written]


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out`, or removed if the block fails."""
    temporary = out.parent / f".{out.name}.writing-{os.getpid()}"
    try:
        yield temporary
        if out.is_dir():
            out.rmdir()
        temporary.replace(out)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_weights(
    out: Path,
    naming: str,
    components: Mapping[str, Mapping[str, OutputTensor]],
    record: QuantizationRecord | None,
    metadata: Mapping[str, Mapping[str, str]],
    shard_bytes: int,
    progress: ProgressCallback,
) -> list[Path]:
    """Writes the tensors of every component and returns the files.

    `record` is that of a packed DiT, `metadata` the metadata of files by component.
    """
    total = sum(tensor.nbytes for tensors in components.values() for tensor in tensors.values())
    count, written = _byte_counter(total, progress), []
    for name, tensors in components.items():
        folder, stem = FILES[naming][name]
        report = functools.partial(count, name)
        if name == "dit" and record is not None:
            written.append(out / RELEASED_FILE)
            write_torch(written[-1], released.checkpoint_dict(tensors, record), progress=report)
        else:
            written += write_safetensors(
                out / folder,
                stem,
                tensors,
                shard_bytes=shard_bytes,
                metadata=metadata.get(name),
                progress=report,
            )
    return written


def _metadata(
    source: Path, opened: Mapping[str, tuple[ArrayReader, Mapping[str, Any]]]
) -> dict[str, dict[str, str]]:
    """Metadata of the files of adapters, by component."""
    provenance = read_manifest(source)["provenance"]
    return {
        name: lora_metadata(lora_info(config, provenance.get(name, {}), str(source)))
        for name, (_, config) in opened.items()
        if name.endswith("lora")
    }


def _check_releasable(source: Path, record: QuantizationRecord, naming: str) -> None:
    """Raises UserError for packed kernels that the released format cannot represent."""
    formats = {(kernel.kind, kernel.tile) for kernel in record.kernels.values()}
    problem = ""
    if naming != "original":
        problem = f"packed kernels have no names in the {naming} naming; pass --naming=original"
    elif formats != {("nvfp4", 1)} or len(set(record.kernels.values())) > 1:
        problem = f"the released format is NVFP4 in 1x16 blocks, this is {record.describe()}"
    elif record.branch_lora:
        problem = f"the released format cannot store the LoRA branch {record.branch_lora}"
    if problem:
        raise UserError(f"{source}: {problem}; or export the checkpoint it was packed from")


def _byte_counter(total: int, progress: ProgressCallback) -> Callable[[str, int], None]:
    """A callback (name, size) that reports the running sum of sizes to `progress`."""
    done = 0

    def count(name: str, size: int) -> None:
        nonlocal done
        done += size
        progress(name, done, total)

    return count


def _copy_tokenizer(source: Path, target: Path) -> None:
    if (source / TOKENIZER).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / TOKENIZER, target)


def _write_settings(
    source: Path, out: Path, naming: str, configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes the sampling settings, and what the files of the naming cannot hold.

    In the original naming, these are settings of models, such as the mean and the standard
    deviation of the latents; in diffusers naming, the files that make a pipeline of the folder. A
    later conversion takes the settings from there.
    """
    sampling = read_manifest(source).get("sampling", {})
    if sampling:
        (out / SETTINGS_FILE).write_text(json.dumps(sampling, indent=2) + "\n")
    models = {
        name: {theirs: configs[name][ours] for theirs, ours in names.items()}
        for name, names in UNTOLD.items()
        if naming == "original" and name in configs
    }
    if models:
        (out / MODELS_FILE).write_text(json.dumps(models, indent=2) + "\n")
    if naming == "diffusers":
        diffusers_folder.write_pipeline_files(
            out,
            list(configs),
            shift=sampling.get("shift", 5.0),
            text_len=configs.get("dit", {}).get("text_len", 512),
            has_tokenizer=(source / TOKENIZER).is_file(),
        )


def _output_tensors(
    name: str, naming: str, reader: ArrayReader, config: Mapping[str, Any]
) -> dict[str, OutputTensor]:
    """The tensors of a component by key; raises UserError if its arrays are not in the table."""
    table = _table(name, naming, config)
    try:
        leaves = table.backward({path: spec.shape for path, spec in reader.specs.items()})
    except ValueError as error:
        raise UserError(f"{reader.folder}: {error}") from error
    tensors: dict[str, OutputTensor] = {}
    for leaf in leaves:
        if is_packed_array(leaf.path):
            tensors |= _released_tensors(reader, leaf) if leaf.path[-1] == "codes" else {}
            continue
        dtype = reader.specs[leaf.path].dtype
        shape = leaf.to_tensor(np.broadcast_to(np.zeros((), np.uint8), slice_shape(leaf))).shape
        for i, key in enumerate(leaf.keys):
            layer = i if leaf.rule.stacked else None
            make = functools.partial(_make, reader, leaf, layer)
            tensors[key] = OutputTensor(shape, dtype, make)
    # Natural order: block 10 after block 9.
    return dict(sorted(tensors.items(), key=lambda item: _natural(item[0])))


def _released_tensors(reader: ArrayReader, codes: Leaf) -> dict[str, OutputTensor]:
    """The tensors of a packed kernel in all layers, given the leaf of its codes `[l, n, k/2]`."""
    _, rows, half_columns = codes.shape
    tensors: dict[str, OutputTensor] = {}
    for layer, key in enumerate(codes.keys):

        def read(name: str, layer: int = layer) -> np.ndarray:
            return reader.read((*codes.path[:-1], name), layer)

        shape = (rows, 2 * half_columns)
        tensors |= released.to_released(released.module_name(key), shape, read)
    return tensors


def slice_shape(leaf: Leaf) -> tuple[int, ...]:
    """Shape of one layer of a leaf, or of all of it if it is not stacked."""
    return leaf.shape[1:] if leaf.rule.stacked else leaf.shape


def _make(reader: ArrayReader, leaf: Leaf, layer: int | None) -> np.ndarray:
    value = reader.read(leaf.path, layer)
    return leaf.to_tensor(check_finite(value, ".".join(leaf.path), str(reader.folder)))


def _natural(key: str) -> list[tuple[int, int, str]]:
    """A sort key that orders the numbers in a state-dict key by value."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in key.split(".")]


def _table(name: str, naming: str, config: Mapping[str, Any]) -> KeyTable:
    if name == "vae" and naming == "original":
        encoder = config["res_blocks"]
        decoder = config.get("decoder_res_blocks")
        return keys_vae.original(encoder, encoder + 1 if decoder is None else decoder)
    namings = COMPONENTS[name].namings
    return namings.get(naming, namings["original"])([])


def _write_config(folder: Path, naming: str, name: str, config: Mapping[str, Any]) -> None:
    """Creates the folder of a component and writes its config.json.

    In the original naming, VAE and UMT5 have no config.json: the folder's is the DiT's. Adapters
    have PEFT's adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith("lora"):
        write_peft_config(folder, config)
        return
    if naming == "original":
        fields = _original_dit(config) if name == "dit" else {}
    else:
        fields = diffusers_folder.CONFIGS[name](config)
    if fields:
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def _original_dit(config: Mapping[str, Any]) -> dict[str, Any]:
    same = ("dim", "ffn_dim", "freq_dim", "text_dim", "text_len", "eps")
    return {
        "_class_name": "WanModel",
        "model_type": "ti2v",
        **{name: config[name] for name in same},
        "in_dim": config["in_channels"],
        "out_dim": config["out_channels"],
        "num_heads": config["heads"],
        "num_layers": config["layers"],
    }
