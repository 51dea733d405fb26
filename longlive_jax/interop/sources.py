"""What lies at a path: state dicts of other libraries, found, unwrapped and with plain names."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlive_jax.interop import released
from longlive_jax.interop.keys_lora import PREFIX
from longlive_jax.interop.keytable import KeyReport
from longlive_jax.interop.safetensors_file import read_index, read_safetensors
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.interop.torch_file import read_torch
from longlive_jax.spec import UserError

__all__ = ["Source", "find_sources", "find_tokenizer", "open_file"]

SUBFOLDERS = ("transformer", "vae", "text_encoder")
TOKENIZERS = ("spiece.model", "tokenizer.model")
TOKENIZER_FOLDERS = (".", "tokenizer", "google/umt5-xxl")
INDEX = ".safetensors.index.json"
TORCH = (".pt", ".pth", ".bin")

_SHARD = re.compile(r"(.*)-\d{5}-of-\d{5}\.safetensors$")
# words that wrappers of training frameworks put between the parts of a name
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\."
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One state dict: plain names to tensors, and what config.json beside it says."""

    path: Path
    tensors: Mapping[str, LazyTensor]
    hints: Mapping[str, Any]
    part: str  # which of several state dicts in the file, for the record
    report: KeyReport  # of names that collide and values that are no tensors
    packed: released.Packed | None = None  # rules of matrices in NVFP4


def find_sources(path: Path, *, use_ema: bool = False) -> list[Source]:
    """The state dicts in a file or a folder (also of diffusers' layout); UserError if none."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        return [open_file(_whole(path), use_ema=use_ema)]
    folders = [path / name for name in SUBFOLDERS if (path / name).is_dir()] or [path]
    files = [file for folder in folders for file in _files(folder)]
    if not files:
        raise UserError(
            f"{path}: holds no weights; expected safetensors (with or without an index), .pt or "
            f".pth files, or the folders {', '.join(SUBFOLDERS)}"
        )
    return [open_file(file, use_ema=use_ema and file.suffix in TORCH) for file in files]


def find_tokenizer(path: Path) -> Path | None:
    """The SentencePiece model in a folder of weights, if there is one."""
    places = (path / folder / name for folder in TOKENIZER_FOLDERS for name in TOKENIZERS)
    return next((place for place in places if place.is_file()), None)


def _whole(path: Path) -> Path:
    """The index of the checkpoint that a shard belongs to, else the path itself."""
    shard = _SHARD.match(path.name)
    index = path.with_name(f"{shard[1]}{INDEX}") if shard else path
    return index if index.is_file() else path


def _files(folder: Path) -> list[Path]:
    names = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    found = {_whole(p) for p in names if p.suffix == ".safetensors"}
    found |= {p for p in names if p.name.endswith(INDEX) or p.suffix in TORCH}
    return sorted(found)


def open_file(path: Path, *, use_ema: bool = False) -> Source:
    """One file (or the index of several) as a state dict with plain names.

    Raises UserError for an unreadable file and for packed weights of another kind than LongLive's.
    """
    state: Mapping[str, Any]
    around: Any = None
    try:
        if path.name.endswith(INDEX):
            state, part = read_index(path), ""
        elif path.suffix == ".safetensors":
            state, part = read_safetensors(path), ""
        else:
            around = read_torch(path)
            state, part = _unwrap(around, path, use_ema)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if use_ema and part != "generator_ema":
        raise UserError(f"{path}: has no generator_ema; leave out --use_ema")
    packed = released.header_of(around, str(path)) if released.is_packed(state) else None
    tensors, report = _plain(state)
    if packed is not None:
        tensors = released.parts_of(tensors, str(path))
    return Source(path, tensors, _hints(path.parent), part, report, packed)


def _unwrap(value: Any, path: Path, use_ema: bool) -> tuple[Mapping[str, Any], str]:
    """The state dict inside the containers that training code saves, and its name there."""
    wanted = ("generator_ema",) if use_ema else ("generator_lora", "generator")
    names = (*wanted, "model", "state_dict", "gen_model")
    part = ""
    for _ in range(4):
        if not isinstance(value, dict):
            break
        if any(isinstance(v, LazyTensor) for v in value.values()):
            return value, part
        name = next((n for n in names if isinstance(value.get(n), dict)), None)
        if name is None:
            break
        value, part = value[name], part or name
    inside = (
        ", ".join(map(str, list(value)[:8])) if isinstance(value, dict) else type(value).__name__
    )
    hint = "; say --use_ema" if isinstance(value, dict) and "generator_ema" in value else ""
    raise UserError(f"{path}: no weights under {', '.join(names)}; it holds {inside}{hint}")


def _plain(state: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], KeyReport]:
    plain: dict[str, LazyTensor] = {}
    report = KeyReport(duplicate=list(getattr(state, "duplicates", [])))
    for key, value in state.items():
        name = _plain_name(str(key))
        if not isinstance(value, LazyTensor):
            report.extra.append(f"{key} (no tensor)")
        elif name in plain:
            report.duplicate.append(f"{key} (again {name})")
        else:
            plain[name] = value
    return plain, report


def _plain_name(key: str) -> str:
    key = _WRAPPERS.sub("", key)
    adapter = ".lora_A." in key or ".lora_B." in key
    bare = key.removeprefix(PREFIX).removeprefix("model.")
    return PREFIX + bare.replace(".default.weight", ".weight") if adapter else bare


def _hints(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        hints = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({error})") from error
    if not isinstance(hints, dict):
        raise UserError(f"{path}: expected a JSON object")
    return hints
