"""Finds the state dicts at a path, unwraps them and normalises their keys."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlive_jax.interop import released
from longlive_jax.interop.keys_lora import PEFT_PREFIX
from longlive_jax.interop.keytable import KeyReport
from longlive_jax.interop.lora_dialects import (
    INFO_KEY,
    LoraInfo,
    is_lora,
    lora_key,
    normalise_lora,
)
from longlive_jax.interop.safetensors_file import read_index, read_metadata, read_safetensors
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.io.json_files import read_json_object
from longlive_jax.io.parts import MODELS_FILE
from longlive_jax.spec import UserError

__all__ = ["Source", "find_sources", "find_tokenizer", "open_file"]

SUBFOLDERS = ("transformer", "vae", "text_encoder")
TOKENIZERS = ("spiece.model", "tokenizer.model")
TOKENIZER_FOLDERS = (".", "tokenizer", "google/umt5-xxl")
INDEX_SUFFIX = ".safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")

_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors$")
# Components that FSDP, activation checkpointing and torch.compile insert into module names.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One state dict.

    Attributes:
      path: file, or index of a sharded checkpoint.
      tensors: tensors by normalised key.
      hints: contents of the config.json in the same folder, or {}.
      exported: settings by component, from an export of ours in the same folder, or {}.
      entry: name of the state dict in a file of several, such as "generator_ema", or "".
      report: keys that collide and values that are not tensors.
      quantization: metadata of packed NVFP4 kernels, or None if there are none.
      lora: what the file of an adapter says besides its factors, or None for other files.
    """

    path: Path
    tensors: Mapping[str, LazyTensor]
    hints: Mapping[str, Any]
    exported: Mapping[str, Mapping[str, Any]]
    entry: str
    report: KeyReport
    quantization: released.ReleasedHeader | None = None
    lora: LoraInfo | None = None


def find_sources(path: Path, *, use_ema: bool = False, role: str | None = None) -> list[Source]:
    """The state dicts in a file, a folder, or a folder in diffusers' layout.

    `use_ema` takes the EMA weights of PyTorch files (`generator_ema`), `role` "critic" their
    adapter of the critic (`critic_lora`). Raises UserError if there are no weights, or if a file
    cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; check the path")
    if path.is_file():
        return [open_file(_index_or_file(path), use_ema=use_ema, role=role)]
    folders = [path / name for name in SUBFOLDERS if (path / name).is_dir()] or [path]
    files = [file for folder in folders for file in _files(folder)]
    if not files:
        raise UserError(
            f"{path}: contains no weights; expected safetensors (with or without an index), .pt or "
            f".pth files, or the folders {', '.join(SUBFOLDERS)}"
        )
    return [
        open_file(file, use_ema=use_ema and file.suffix in TORCH_SUFFIXES, role=role)
        for file in files
    ]


def with_critics(sources: list[Source]) -> list[Source]:
    """The sources, and the critic's adapter of every file that has it beside the generator's."""
    critics = [
        open_file(source.path, role="critic")
        for source in sources
        if source.entry == "generator_lora" and has_critic(source.path)
    ]
    return sources + critics


def has_critic(path: Path) -> bool:
    """Whether a file of PyTorch has the adapter of a critic."""
    contents = read_torch(path)
    return isinstance(contents, dict) and isinstance(contents.get("critic_lora"), dict)


def find_tokenizer(path: Path) -> Path | None:
    """The SentencePiece model in a folder of weights, or None."""
    candidates = (path / folder / name for folder in TOKENIZER_FOLDERS for name in TOKENIZERS)
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _index_or_file(path: Path) -> Path:
    """The index of the sharded checkpoint that a file belongs to, or else the file itself."""
    shard = _SHARD.match(path.name)
    index = path.with_name(f"{shard[1]}{INDEX_SUFFIX}") if shard else path
    return index if index.is_file() else path


def _files(folder: Path) -> list[Path]:
    """The checkpoints in a folder, a sharded one represented by its index."""
    paths = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    files = {_index_or_file(p) for p in paths if p.suffix == ".safetensors"}
    files |= {p for p in paths if p.name.endswith(INDEX_SUFFIX) or p.suffix in TORCH_SUFFIXES}
    return sorted(files)


def open_file(path: Path, *, use_ema: bool = False, role: str | None = None) -> Source:
    """A file, or the index of a sharded checkpoint, as a state dict with normalised keys.

    Raises UserError for an unreadable file, for `use_ema` without EMA weights, for `role` without
    its adapter, and for packed weights in another format than LongLive's.
    """
    # 1. The state dict.
    state: Mapping[str, Any]
    contents: Any = None
    metadata: Mapping[str, str] = {}
    try:
        _check_downloaded(path)
        if path.name.endswith(INDEX_SUFFIX):
            state, entry = read_index(path), ""
        elif path.suffix == ".safetensors":
            state, entry, metadata = read_safetensors(path), "", read_metadata(path)
        else:
            contents = read_torch(path)
            state, entry = _unwrap(contents, path, use_ema, role)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the file and its permissions"
        ) from error
    if use_ema and entry != "generator_ema":
        raise UserError(f"{path}: has no generator_ema; leave out --use_ema")
    # 2. Packed kernels.
    header = released.read_header(contents, str(path)) if released.is_packed(state) else None
    tensors, report = _normalise_keys(state)
    if header is not None:
        tensors = released.from_released(tensors, str(path))
    hints, exported = read_json_object(path.parent / "config.json") or {}, _exported(path.parent)
    # 3. Adapters.
    lora = None
    if is_lora(state):
        tensors, lora = normalise_lora(tensors, path, metadata, _info(contents, entry))
        hints = hints if lora.alpha is None else {**hints, "lora_alpha": lora.alpha}
    return Source(path, tensors, hints, exported, entry, report, header, lora)


def _info(contents: Any, entry: str) -> Any:
    """What a .pt file says about one of its adapters, or None."""
    if not isinstance(contents, Mapping):
        return None
    known = contents.get(INFO_KEY)
    role = entry.removesuffix("_lora") if entry.endswith("_lora") else "adapter"
    info = known.get(entry) if isinstance(known, Mapping) else None
    step = contents.get("step")
    provenance = {"step": step} if isinstance(step, int) else {}
    return {"role": role, "provenance": provenance} if info is None else info


def _check_downloaded(path: Path) -> None:
    """Raises UserError for a pointer that Git LFS puts in place of a file."""
    with open(path, "rb") as file:
        is_pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
    if is_pointer:
        raise UserError(
            f"{path}: is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )


def _unwrap(
    value: Any, path: Path, use_ema: bool, role: str | None
) -> tuple[Mapping[str, Any], str]:
    """The state dict inside the dictionaries that training code saves, and its key there."""
    generators = ("generator_ema",) if use_ema else ("generator_lora", "generator")
    names = (*generators, "model", "state_dict", "gen_model")
    if role == "critic":
        names = ("critic_lora",)
    entry = ""
    for _ in range(4):
        if not isinstance(value, dict):
            break
        if any(isinstance(v, LazyTensor) for v in value.values()):
            return value, entry
        name = next((n for n in names if isinstance(value.get(n), dict)), None)
        if name is None:
            break
        value, entry = value[name], entry or name
    # There are no tensors under any of these names.
    contents = (
        ", ".join(map(str, list(value)[:8])) if isinstance(value, dict) else type(value).__name__
    )
    options = {"generator_ema": "--use_ema", "critic_lora": "--role=critic"}
    other = next((o for k, o in options.items() if isinstance(value, dict) and k in value), None)
    hint = "" if other is None or role == "critic" else f"; pass {other}"
    raise UserError(f"{path}: no weights under {', '.join(names)}; it contains {contents}{hint}")


def _normalise_keys(state: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], KeyReport]:
    tensors: dict[str, LazyTensor] = {}
    report = KeyReport(duplicate=list(getattr(state, "duplicates", [])))
    rename = lora_key if is_lora(state) else _without_prefixes
    for key, value in state.items():
        name = rename(_WRAPPERS.sub("", str(key)))
        if not isinstance(value, LazyTensor):
            report.extra.append(f"{key} (not a tensor)")
        elif name in tensors:
            report.duplicate.append(f"{key} (same key as {name})")
        else:
            tensors[name] = value
    return tensors, report


def _without_prefixes(key: str) -> str:
    return key.removeprefix(PEFT_PREFIX).removeprefix("model.")


def _exported(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings of models in an exported folder, by component, or {}."""
    path = folder / MODELS_FILE
    models = read_json_object(path) or {}
    wrong = next((name for name, values in models.items() if not isinstance(values, dict)), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong} must be a JSON object; copy it again or remove it")
    return models
