"""Brings LoRA files of several programs to one form: PEFT's names, one alpha, all layers.

Programs differ in the prefix of their keys, in the names of the two factors (`lora_A`, `lora_down`,
`lora.down`), in the names of modules (Wan's, diffusers', kohya's with underscores), and in where
alpha is: a scalar per module, the file's metadata, or a JSON file next to it. An adapter of some
layers only has zeros for the others.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax.interop.keys_lora import PEFT_PREFIX
from longlive_jax.interop.tensors import LazyTensor
from longlive_jax.io.json_files import read_json_object
from longlive_jax.spec import UserError

__all__ = ["ADAPTER_CONFIG", "INFO_KEY", "LoraInfo", "is_lora", "lora_key", "normalise_lora"]

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's file next to the weights of an adapter."""
INFO_KEY = "longlive_adapter"
"""Metadata of a safetensors file, or entry of a .pt file, with the `LoraInfo` of our adapters."""

_PREFIXES = re.compile(
    r"^(?:base_model\.model\.|model\.|diffusion_model\.|transformer\.|module\.)+"
)
_PARTS = re.compile(
    r"^(.+)\.(?:(lora_A|lora_down|lora\.down)|lora_B|lora_up|lora\.up)(\..*)?\.weight$"
)
_KOHYA = re.compile(r"^lora_(?:unet|transformer|dit)_blocks_(\d+)_(\w+)$")
_LAYER = re.compile(r"^(.*\bblocks\.)(\d+)(\..*)$")
_MODULES = {
    **{f"attn1.to_{m}": f"self_attn.{m}" for m in "qkv"},
    **{f"attn2.to_{m}": f"cross_attn.{m}" for m in "qkv"},
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""Names of linears in diffusers -> Wan's."""
_ORIGINAL = [f"{attn}.{m}" for attn in ("self_attn", "cross_attn") for m in "qkvo"]
_KOHYA_MODULES = {
    name.replace(".", "_"): name for name in (*_ORIGINAL, "ffn.0", "ffn.2", *_MODULES)
}
_REFUSED = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoKr": re.compile(r"lokr_w"),
    "LoHa": re.compile(r"hada_w"),
    "diff (changes of biases and norms)": re.compile(r"\.diff(_b|_m)?$"),
}
"""Kinds of adapters that are not read -> pattern of their keys."""
_UNSUPPORTED = ("use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern")
"""Fields of adapter_config.json that change the result and are not read."""
_MAX_GAP = 64
"""Layers that an adapter may leave out beyond four for each that it has; more are damage."""


@dataclasses.dataclass(frozen=True)
class LoraInfo:
    """What a LoRA file says besides its factors.

    Attributes:
      alpha: numerator of the scale; None if the file does not say.
      role: "generator" or "critic" of a distillation, or "adapter".
      settings: sampling settings that the adapter was made for, fields of `SampleSpec`.
      base: fingerprint of the model that it was made on, or "".
      provenance: how it was made.
      is_partial: whether the model may have more layers than the file.
    """

    alpha: float | None = None
    role: str = "adapter"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: str = ""
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_partial: bool = True

    @classmethod
    def parse(cls, values: Any, where: str) -> "LoraInfo":
        """The info in metadata; UserError, naming the file `where`, for values of other types."""
        if not isinstance(values, Mapping):
            raise UserError(f"{where}: {INFO_KEY} must be a JSON object; export the adapter again")
        fields: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value: Any = values.get(field.name)
            default = getattr(cls(), field.name)
            kind: Any = type(default)
            if field.name == "alpha":
                kind = int | float
            elif isinstance(default, Mapping):
                kind = Mapping
            if value is not None and not isinstance(value, kind):
                raise UserError(
                    f"{where}: {INFO_KEY}.{field.name} is {value!r:.60}; export the adapter again"
                )
            if value is not None:
                fields[field.name] = dict(value) if kind is Mapping else value
        return cls(**fields)

    def values(self) -> dict[str, Any]:
        """The fields as plain values, for JSON; the inverse of `parse`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def is_lora(keys: Any) -> bool:
    """Whether a state dict is an adapter: at least one key is that of a factor."""
    return any(_PARTS.match(str(key)) for key in keys)


def lora_key(key: str) -> str:
    """A key of an adapter in PEFT's naming; keys of no module that we know keep their names."""
    matched = _PARTS.match(key)
    module = matched[1] if matched else key.removesuffix(".alpha")
    module = _PREFIXES.sub("", module)
    if kohya := _KOHYA.match(module):
        name = _KOHYA_MODULES.get(kohya[2], kohya[2])
        module = f"blocks.{kohya[1]}.{name}"
    if layer := _LAYER.match(module):
        name = layer[3].removeprefix(".").removesuffix(".processor")
        module = f"{layer[1]}{layer[2]}.{_MODULES.get(name, name)}"
    end = f"lora_{'A' if matched[2] else 'B'}.weight" if matched else "alpha"
    return f"{PEFT_PREFIX}{module}.{end}" if matched or key.endswith(".alpha") else key


def normalise_lora(
    tensors: Mapping[str, LazyTensor], path: Path, metadata: Mapping[str, str], info: Any
) -> tuple[dict[str, LazyTensor], LoraInfo]:
    """Factors of all layers by PEFT's names, and what the file says about them.

    Args:
      tensors: tensors by the names of `lora_key`.
      path: the file.
      metadata: metadata of a safetensors file.
      info: the `INFO_KEY` entry of a .pt file, or None.

    Raises UserError for adapters of a kind that is not read, and for damaged metadata.
    """
    # 1. What is not read.
    for kind, pattern in _REFUSED.items():
        keys = [key for key in tensors if pattern.search(key)]
        if keys:
            raise UserError(
                f"{path}: {len(keys)} {kind} weights are not read ({keys[0]}); only plain LoRA is"
            )
    # 2. Alpha: of the modules, or of the file.
    alphas = _module_alphas(tensors, path)
    factors = {key: x for key, x in tensors.items() if not key.endswith(".alpha")}
    if INFO_KEY in metadata:
        info = _json(metadata[INFO_KEY], path)
    known = LoraInfo() if info is None else LoraInfo.parse(info, str(path))
    rank = next((x.shape[0] for key, x in factors.items() if ".lora_A." in key and x.shape), None)
    alpha = _file_alpha(path, metadata, rank) if known.alpha is None else known.alpha
    if alphas:
        alpha = max(alphas.values())
        factors = _with_alphas(factors, alphas, alpha)
    # 3. Layers without an adapter.
    return _filled(factors), dataclasses.replace(known, alpha=alpha)


def _module_alphas(tensors: Mapping[str, LazyTensor], path: Path) -> dict[str, float]:
    """alpha by module."""
    alphas = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            value = tensor.read().reshape(-1)
            if value.size != 1 or not np.isfinite(value[0]) or value[0] <= 0:
                raise UserError(f"{path}: {key} must be a number > 0, got {value[:4].tolist()}")
            alphas[key.removesuffix(".alpha")] = float(value[0])
    return alphas


def _with_alphas(
    factors: Mapping[str, LazyTensor], alphas: Mapping[str, float], alpha: float
) -> dict[str, LazyTensor]:
    """The factors for one alpha: B of modules with another one is scaled."""
    result = dict(factors)
    for key, tensor in factors.items():
        module, _, end = key.rpartition(".lora_B")
        ratio = alphas.get(module, alpha) / alpha
        if end and ratio != 1:
            result[key] = dataclasses.replace(
                tensor, read=functools.partial(_scaled, tensor, ratio)
            )
    return result


def _scaled(tensor: LazyTensor, ratio: float) -> np.ndarray:
    return (tensor.read().astype(np.float32) * np.float32(ratio)).astype(tensor.dtype)


def _file_alpha(path: Path, metadata: Mapping[str, str], rank: int | None) -> float | None:
    """alpha from the metadata or from adapter_config.json; UserError for what is not read."""
    # 1. adapter_config.json must be of a plain LoRA of this rank.
    config = read_json_object(path.parent / ADAPTER_CONFIG) or {}
    where = path.parent / ADAPTER_CONFIG
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise UserError(f"{where}: peft_type {config['peft_type']} is not read; only LORA is")
    if used := [name for name in _UNSUPPORTED if config.get(name)]:
        raise UserError(f"{where}: {', '.join(used)} is not read; merge the adapter with PEFT")
    if rank is not None and config.get("r", rank) != rank:
        raise UserError(
            f"{where}: r is {config['r']}, and the rank in {path.name} is {rank}; use the file of "
            "this adapter"
        )
    # 2. The first alpha.
    nested = _json(metadata.get("lora_adapter_metadata", "{}"), path)
    alphas = [value for key, value in nested.items() if key.rpartition(".")[2] == "lora_alpha"]
    for value in (*alphas, metadata.get("ss_network_alpha"), config.get("lora_alpha")):
        if value is not None:
            return _number(value, path)
    return None


def _number(value: Any, path: Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"{path}: alpha must be a number > 0, got {value!r:.40}")
    return number


def _json(text: str, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged metadata ({error}); copy the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: damaged metadata ({text[:40]!r}); copy the file again")
    return values


def _filled(factors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The factors, with zeros in the layers that have no adapter of a module."""
    # 1. Layers by module and factor.
    layers: dict[tuple[str, str], dict[int, LazyTensor]] = {}
    for key, tensor in factors.items():
        if matched := _LAYER.match(key):
            layers.setdefault((matched[1], matched[3]), {})[int(matched[2])] = tensor
    depth = 1 + max((max(group) for group in layers.values()), default=-1)
    # 2. Zeros, where both factors are missing.
    result = dict(factors)
    for (head, tail), group in layers.items():
        other = tail.replace(".lora_A.", ".lora_B.") if "_A." in tail else _a_of(tail)
        present = set(group) | set(layers.get((head, other), {}))
        if depth <= 4 * len(group) + _MAX_GAP:
            like = next(iter(group.values()))
            zeros = functools.partial(np.zeros, like.shape, like.dtype)
            for layer in set(range(depth)) - present:
                result[f"{head}{layer}{tail}"] = dataclasses.replace(like, read=zeros)
    return result


def _a_of(tail: str) -> str:
    return tail.replace(".lora_B.", ".lora_A.")
