"""Our checkpoint directory back to safetensors, under the original or the diffusers names.

A packed DiT becomes `model_4o6.pt`, the layout in which LongLive-2.0 releases it.
"""

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.interop import keys_vae, released
from longlive_jax.interop.components import COMPONENTS
from longlive_jax.interop.keytable import KeyTable, Leaf
from longlive_jax.interop.safetensors_file import DEFAULT_SHARD_BYTES, Outgoing, write_safetensors
from longlive_jax.interop.torch_writer import write_torch
from longlive_jax.io.arrays import ArrayReader
from longlive_jax.io.checkpoint import TOKENIZER, is_part, open_component, read_manifest
from longlive_jax.io.packed_kernels import Record, record_of
from longlive_jax.spec import UserError

__all__ = ["NAMINGS", "export"]

NAMINGS = ("original", "diffusers")
PACKED = "model_4o6.pt"
# component -> folder and stem of its files
PLACES = {
    "original": {
        "dit": (".", "diffusion_pytorch_model"),
        "vae": (".", "Wan2.2_VAE"),
        "umt5": (".", "models_t5_umt5-xxl-enc"),
        "lora": ("lora", "longlive_lora"),
    },
    "diffusers": {
        "dit": ("transformer", "diffusion_pytorch_model"),
        "vae": ("vae", "diffusion_pytorch_model"),
        "umt5": ("text_encoder", "model"),
        "lora": ("lora", "adapter_model"),
    },
}
TOKENIZER_PLACE = {
    "original": "google/umt5-xxl/spiece.model",
    "diffusers": "tokenizer/spiece.model",
}

Progress = Callable[[str, int, int], None]


def export(
    source: Path,
    out: Path,
    naming: str,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = lambda what, done, total: None,
) -> list[Path]:
    """Writes every component of the checkpoint directory `source` into the new folder `out`.

    Bits are kept: converting `out` gives the same arrays again. Memory stays at one tensor. Returns
    the files of weights. Raises UserError if `out` exists and is not empty, or if a component
    cannot be said in that naming (a packed one has the original only); `out` appears only when
    everything is written.
    """
    if naming not in NAMINGS:
        raise UserError(f"naming {naming!r}; choose {' or '.join(NAMINGS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty; choose a new folder")
    names = [n for n in read_manifest(source)["components"] if n in COMPONENTS]
    packing = record_of(source) if "dit" in names else None
    if packing is not None:
        _check_releasable(source, packing, naming)
    opened = {name: open_component(source, name) for name in names}
    jobs = {name: _outgoing(name, naming, *opened[name]) for name in names}
    temporary = out.parent / f".{out.name}.writing-{os.getpid()}"
    try:
        for name, (_, config) in opened.items():
            _write_config(temporary / PLACES[naming][name][0], naming, name, config)
        written = _write_weights(temporary, naming, jobs, packing, shard_bytes, progress)
        _copy_tokenizer(source, temporary / TOKENIZER_PLACE[naming])
        if out.is_dir():
            out.rmdir()
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [out / path.relative_to(temporary) for path in written]


def _write_weights(
    out: Path,
    naming: str,
    jobs: Mapping[str, Mapping[str, Outgoing]],
    packing: Record | None,
    shard_bytes: int,
    progress: Progress,
) -> list[Path]:
    """The tensors of every component, in its folder of `out`; the files they are in."""
    total = sum(tensor.nbytes for tensors in jobs.values() for tensor in tensors.values())
    count, written = _counter(total, progress), []
    for name, tensors in jobs.items():
        folder, stem = PLACES[naming][name]
        report = functools.partial(count, name)
        if name == "dit" and packing is not None:
            written.append(out / PACKED)
            write_torch(written[-1], released.whole(tensors, packing), progress=report)
        else:
            written += write_safetensors(
                out / folder, stem, tensors, shard_bytes=shard_bytes, progress=report
            )
    return written


def _check_releasable(source: Path, packing: Record, naming: str) -> None:
    """UserError for packed kernels that the released layout cannot hold."""
    forms = {(kernel.kind, kernel.tile) for kernel in packing.kernels.values()}
    why = ""
    if naming != "original":
        why = f"packed kernels have no names in naming {naming!r}; say --naming=original"
    elif forms != {("nvfp4", 1)} or len(set(packing.kernels.values())) > 1:
        why = f"the released layout holds NVFP4 in 1x16 blocks, this is {packing.describe()}"
    elif packing.branch_lora:
        why = f"the released layout has no place for the LoRA {packing.branch_lora} beside"
    if why:
        raise UserError(f"{source}: {why}; or export the checkpoint it was packed from")


def _counter(total: int, progress: Progress) -> Callable[[str, int], None]:
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


def _outgoing(
    name: str, naming: str, reader: ArrayReader, config: Mapping[str, Any]
) -> dict[str, Outgoing]:
    table = _table(name, naming, config)
    try:
        leaves = table.backward({path: spec.shape for path, spec in reader.specs.items()})
    except ValueError as error:
        raise UserError(f"{reader.folder}: {error}") from error
    tensors: dict[str, Outgoing] = {}
    for leaf in leaves:
        if is_part(leaf.path):
            tensors |= _packed(reader, leaf) if leaf.path[-1] == "codes" else {}
            continue
        dtype = reader.specs[leaf.path].dtype
        shape = leaf.extract(np.broadcast_to(np.zeros((), np.uint8), piece_shape(leaf))).shape
        for i, key in enumerate(leaf.keys):
            layer = i if leaf.rule.stacked else None
            make = functools.partial(_make, reader, leaf, layer)
            tensors[key] = Outgoing(shape, dtype, make)
    # files list layer after layer, as the model runs
    return dict(sorted(tensors.items(), key=lambda item: _natural(item[0])))


def _packed(reader: ArrayReader, codes: Leaf) -> dict[str, Outgoing]:
    """The tensors of one packed kernel in all layers, found by its codes `[layers, n, k/2]`."""
    _, rows, half = codes.shape
    tensors: dict[str, Outgoing] = {}
    for layer, key in enumerate(codes.keys):

        def read(part: str, layer: int = layer) -> np.ndarray:
            return reader.read((*codes.path[:-1], part), layer)

        tensors |= released.tensors_of(released.module_of(key), (rows, 2 * half), read)
    return tensors


def piece_shape(leaf: Leaf) -> tuple[int, ...]:
    """Shape of one layer of a stacked leaf, or of the whole leaf."""
    return leaf.shape[1:] if leaf.rule.stacked else leaf.shape


def _make(reader: ArrayReader, leaf: Leaf, layer: int | None) -> np.ndarray:
    return leaf.extract(reader.read(leaf.path, layer))


def _natural(key: str) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in key.split(".")]


def _table(name: str, naming: str, config: Mapping[str, Any]) -> KeyTable:
    if name == "vae" and naming == "original":
        encoder = config["res_blocks"]
        decoder = config.get("decoder_res_blocks")
        return keys_vae.original(encoder, encoder + 1 if decoder is None else decoder)
    namings = COMPONENTS[name].namings
    return namings.get(naming, namings["original"])([])


def _write_config(folder: Path, naming: str, name: str, config: Mapping[str, Any]) -> None:
    """The folder, and the config.json that goes with the weights; the original VAE, UMT5 and LoRA
    have none."""
    folder.mkdir(parents=True, exist_ok=True)
    if naming == "original":
        fields = _original_dit(config) if name == "dit" else {}
    else:
        fields = _DIFFUSERS[name](config)
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


def _diffusers_dit(config: Mapping[str, Any]) -> dict[str, Any]:
    same = ("ffn_dim", "freq_dim", "text_dim", "in_channels", "out_channels", "eps")
    return {
        "_class_name": "WanTransformer3DModel",
        **{name: config[name] for name in same},
        "attention_head_dim": config["dim"] // config["heads"],
        "num_attention_heads": config["heads"],
        "num_layers": config["layers"],
        "text_len": config["text_len"],
        "patch_size": [1, 2, 2],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }


def _diffusers_vae(config: Mapping[str, Any]) -> dict[str, Any]:
    blocks, decoder = config["res_blocks"], config.get("decoder_res_blocks")
    if config.get("decoder_mult") is not None or decoder not in (None, blocks + 1):
        raise UserError("VAE: diffusers has no setting for a decoder that is not the encoder's "
                        "mirror; export it with --naming=original")  # fmt: skip
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": config["encoder_dim"],
        "decoder_base_dim": config["decoder_dim"],
        "dim_mult": config["dim_mult"],
        "in_channels": 12,
        "out_channels": 12,
        "is_residual": True,
        "latents_mean": config["latent_mean"],
        "latents_std": config["latent_std"],
        "num_res_blocks": blocks,
        "patch_size": 2,
        "scale_factor_spatial": 16,
        "scale_factor_temporal": 4,
        "temperal_downsample": config["temporal_down"],
        "z_dim": config["z_dim"],
    }


def _diffusers_umt5(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "vocab_size": config["vocab_size"],
        "d_model": config["dim"],
        "d_kv": config["dim_attn"] // config["heads"],
        "d_ff": config["ffn_dim"],
        "num_heads": config["heads"],
        "num_layers": config["layers"],
        "relative_attention_num_buckets": config["buckets"],
        "relative_attention_max_distance": config["max_distance"],
        "layer_norm_epsilon": config["eps"],
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
    }


def _adapter(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"lora_rank": config["rank"], "lora_alpha": config["alpha"]}


_DIFFUSERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "dit": _diffusers_dit,
    "vae": _diffusers_vae,
    "umt5": _diffusers_umt5,
    "lora": _adapter,
}
