"""The components of a checkpoint: their key tables, and configs derived from shapes."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import nnx

from longlive_jax.interop import keys_dit, keys_lora, keys_umt5, keys_vae
from longlive_jax.interop.keytable import KeyTable
from longlive_jax.io.arrays import Shape, TreePath, flatten
from longlive_jax.models.params import abstract
from longlive_jax.models.umt5 import UMT5, UMT5Config
from longlive_jax.models.vae import VAE, VAEConfig
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.spec import UserError

__all__ = [
    "COMPONENTS",
    "RUN_FIELDS",
    "Component",
    "expected_shapes",
    "identify",
    "saved_settings",
]

Hints = Mapping[str, Any]
"""Settings from a config.json next to the weights, and from command-line options."""
RUN_FIELDS = ("dtype", "stream_dtype", "param_dtype", "reference_bf16")
"""Config fields that say how a run computes; they do not describe the weights."""


@dataclasses.dataclass(frozen=True)
class Component:
    """One component of a checkpoint: "dit", "vae", "umt5", "lora" or "critic_lora".

    Attributes:
      name: name of the component.
      namings: for "original" and "diffusers", the function from a file's keys to the key table.
      settings: function from parameter shapes and hints to the config.
      make: function from the config to the model; None for LoRA, which has no model of its own.
    """

    name: str
    namings: Mapping[str, Callable[[Iterable[str]], KeyTable]]
    settings: Callable[[Mapping[TreePath, Shape], Hints], Any]
    make: Callable[[Any], nnx.Module] | None


def expected_shapes(component: Component, config: Any) -> dict[TreePath, Shape] | None:
    """Shapes of all parameters of the component's model, without allocating them.

    None if the component has no model.
    """
    make = component.make
    if make is None:
        return None
    _, params = abstract(lambda: make(config))
    return {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}


def identify(keys: Iterable[str], where: str) -> tuple[Component, KeyTable]:
    """The component and the key table that match most of the keys.

    Raises UserError, naming the file `where`, if no table matches at least half of them.
    """
    keys = list(keys)
    candidates = [
        (table.score(keys), component, table)
        for component in COMPONENTS.values()
        for table in (naming(keys) for naming in component.namings.values())
    ]
    score, component, table = max(candidates, key=lambda item: item[0])
    if not keys or 2 * score < len(keys):
        raise UserError(
            f"{where}: no weights of a Wan2.2 DiT, VAE, UMT5 encoder or LoRA; the file has "
            f"{len(keys)} tensors{': ' + ', '.join(keys[:4]) if keys else ''}; choose another file"
        )
    return component, table


def saved_settings(config: Any) -> dict[str, Any]:
    """The fields of a config that describe the weights, for the manifest."""
    if not dataclasses.is_dataclass(config):
        return dict(config)
    fields = (f.name for f in dataclasses.fields(config) if f.name not in RUN_FIELDS)
    return {name: getattr(config, name) for name in fields}


def _check_hints(
    settings: Mapping[str, Any], hints: Hints, names: Mapping[str, str], what: str
) -> None:
    """Raises UserError if config.json contradicts the shapes; `names` maps its fields to ours."""
    conflicts = [
        f"{theirs} {hints[theirs]} instead of {settings[ours]}"
        for theirs, ours in names.items()
        if hints.get(theirs) is not None and hints[theirs] != settings[ours]
    ]
    if conflicts:
        raise UserError(
            f"{what}: config.json does not match the weights: {', '.join(conflicts)}; use the "
            "config.json of this model, and all of its layers"
        )


def _dit(shapes: Mapping[TreePath, Shape], hints: Hints) -> DiTConfig:
    # 1. Settings that follow from shapes.
    dim = shapes["patch_embedding", "kernel"][1]
    settings: dict[str, Any] = {
        "dim": dim,
        "ffn_dim": shapes["blocks", "ffn", "up", "kernel"][-1],
        "freq_dim": shapes["time_embedding", "fc1", "kernel"][0],
        "text_dim": shapes["text_embedding", "fc1", "kernel"][0],
        "layers": shapes["blocks", "modulation"][0],
        "in_channels": shapes["patch_embedding", "kernel"][0] // 4,
        "out_channels": shapes["head", "linear", "kernel"][1] // 4,
    }
    # 2. They must agree with config.json, if that is a DiT's.
    if not {"ffn_dim", "num_layers"} <= set(hints):
        hints = {k: v for k, v in hints.items() if k in ("heads", "text_len")}
    same = {name: name for name in ("dim", "ffn_dim", "freq_dim", "text_dim")}
    theirs = {"in_dim": "in_channels", "out_dim": "out_channels", "num_layers": "layers"}
    theirs |= {name: name for name in ("in_channels", "out_channels")}
    _check_hints(settings, hints, same | theirs, "DiT")
    # 3. Settings that only hints give, or Wan's values.
    heads = hints.get("heads") or hints.get("num_heads") or hints.get("num_attention_heads")
    if heads is None and dim % 128:
        raise UserError(
            f"DiT: the number of heads is unknown, since the width {dim} is not a multiple of "
            "128; put the model's config.json next to the file, or pass --heads=N"
        )
    text_len, eps = hints.get("text_len") or 512, hints.get("eps") or 1e-6
    return DiTConfig(**settings, heads=heads or dim // 128, text_len=text_len, eps=eps)


def _vae(shapes: Mapping[TreePath, Shape], hints: Hints) -> VAEConfig:
    settings = keys_vae.config_of(shapes)
    if hints.get("latents_mean") and hints.get("latents_std"):
        mean, std = _statistics(hints["latents_mean"]), _statistics(hints["latents_std"])
        _check_hints(settings, hints, {"z_dim": "z_dim", "base_dim": "encoder_dim"}, "VAE")
    elif settings["z_dim"] == VAEConfig.z_dim:
        mean, std = VAEConfig.latent_mean, VAEConfig.latent_std
    else:
        mean, std = (0.0,) * settings["z_dim"], (1.0,) * settings["z_dim"]
    return VAEConfig(**settings, latent_mean=mean, latent_std=std)


def _statistics(values: Any) -> tuple[float, ...]:
    """A sequence of finite numbers as a tuple. Raises UserError for anything else."""
    if not isinstance(values, list | tuple) or not all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    ):
        raise UserError(
            "VAE: latents_mean and latents_std must be lists of finite numbers, got "
            f"{str(values)[:60]}; copy the JSON file next to the weights again"
        )
    return tuple(values)


def _umt5(shapes: Mapping[TreePath, Shape], hints: Hints) -> UMT5Config:
    try:
        config = keys_umt5.config_of(shapes)
    except ValueError as error:
        raise error.__cause__ or error from error  # the KeyError that names the missing array
    if "d_model" not in hints:
        return config
    names = {"d_model": "dim", "d_ff": "ffn_dim", "num_heads": "heads", "num_layers": "layers"}
    _check_hints(dataclasses.asdict(config), hints, names, "UMT5")
    return dataclasses.replace(
        config,
        max_distance=hints.get("relative_attention_max_distance", config.max_distance),
        eps=hints.get("layer_norm_epsilon", config.eps),
    )


def _lora(shapes: Mapping[TreePath, Shape], hints: Hints) -> dict[str, Any]:
    ranks = {shape[2] if path[-1] == "a" else shape[1] for path, shape in shapes.items()}
    if len(ranks) != 1:
        raise UserError(
            f"LoRA: all adapters must have the same rank, got {sorted(ranks)}; choose another file"
        )
    factors: dict[TreePath, set[str]] = {path[:-1]: set() for path in shapes}
    for path in shapes:
        factors[path[:-1]].add(path[-1])
    incomplete = [".".join(path) for path, names in factors.items() if names != {"a", "b"}]
    if incomplete:
        raise UserError(
            f"LoRA: lora_A or lora_B is missing for {', '.join(incomplete[:8])}; copy or download "
            "the file again"
        )
    rank = ranks.pop()
    targets = sorted(".".join(path) for path in factors)
    return {"rank": rank, "alpha": hints.get("lora_alpha") or rank, "targets": targets}


COMPONENTS: dict[str, Component] = {
    component.name: component
    for component in (
        Component(
            "dit",
            {"original": lambda _: keys_dit.ORIGINAL, "diffusers": lambda _: keys_dit.DIFFUSERS},
            _dit,
            lambda cfg: DiT(cfg, rngs=nnx.Rngs(0)),
        ),
        Component(
            "vae",
            {"original": keys_vae.original_for, "diffusers": lambda _: keys_vae.DIFFUSERS},
            _vae,
            lambda cfg: VAE(cfg, rngs=nnx.Rngs(0)),
        ),
        Component(
            "umt5",
            {
                "original": lambda _: keys_umt5.ORIGINAL,
                "diffusers": lambda _: keys_umt5.TRANSFORMERS,
            },
            _umt5,
            lambda cfg: UMT5(cfg, rngs=nnx.Rngs(0)),
        ),
        Component("lora", {"original": lambda _: keys_lora.PEFT}, _lora, None),
        Component("critic_lora", {"original": lambda _: keys_lora.PEFT}, _lora, None),
    )
}
