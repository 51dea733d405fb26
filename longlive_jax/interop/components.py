"""What a checkpoint can consist of: names of weights, and settings read off shapes."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import nnx

from longlive_jax.interop import keys_dit, keys_lora, keys_umt5, keys_vae
from longlive_jax.interop.keytable import KeyTable
from longlive_jax.io.arrays import Path, Shape, flatten
from longlive_jax.models.params import abstract
from longlive_jax.models.umt5 import UMT5, UMT5Config
from longlive_jax.models.vae import VAE, VAEConfig
from longlive_jax.models.wan import DiT, DiTConfig
from longlive_jax.spec import UserError

__all__ = ["COMPONENTS", "Component", "expected_shapes", "identify"]

Hints = Mapping[str, Any]
# how a run computes, not what the weights are
RUN_FIELDS = ("dtype", "stream_dtype", "param_dtype", "reference_bf16")


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of a checkpoint.

    Attributes:
      namings: "original" and "diffusers" to the key table for a file's keys.
      settings: from shapes and hints (a config.json beside the file, options) to a config.
      make: a model of that config; None for a part that is no model of its own.
    """

    name: str
    namings: Mapping[str, Callable[[Iterable[str]], KeyTable]]
    settings: Callable[[Mapping[Path, Shape], Hints], Any]
    make: Callable[[Any], nnx.Module] | None


def expected_shapes(component: Component, config: Any) -> dict[Path, Shape] | None:
    """Shapes of all parameters of the component's model, without allocating it."""
    make = component.make
    if make is None:
        return None
    _, params = abstract(lambda: make(config))
    return {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}


def identify(keys: Iterable[str], where: str) -> tuple[Component, KeyTable]:
    """The component and naming that know most of the keys; UserError if none knows half."""
    keys = list(keys)
    candidates = [
        (table.score(keys), component, table)
        for component in COMPONENTS.values()
        for table in (naming(keys) for naming in component.namings.values())
    ]
    score, component, table = max(candidates, key=lambda item: item[0])
    if not keys or 2 * score < len(keys):
        raise UserError(
            f"{where}: no weights of a Wan2.2 DiT, VAE, UMT5 encoder or LoRA; it holds "
            f"{len(keys)} tensors{': ' + ', '.join(keys[:4]) if keys else ''}"
        )
    return component, table


def saved_settings(config: Any) -> dict[str, Any]:
    """The fields of a config that describe weights."""
    if not dataclasses.is_dataclass(config):
        return dict(config)
    fields = (f.name for f in dataclasses.fields(config) if f.name not in RUN_FIELDS)
    return {name: getattr(config, name) for name in fields}


def _agree(found: Mapping[str, Any], hints: Hints, names: Mapping[str, str], what: str) -> None:
    """UserError if a config.json contradicts the shapes; `names` maps its fields to ours."""
    wrong = [
        f"{theirs} {hints[theirs]} instead of {found[ours]}"
        for theirs, ours in names.items()
        if hints.get(theirs) is not None and hints[theirs] != found[ours]
    ]
    if wrong:
        raise UserError(
            f"{what}: config.json does not fit the weights: {', '.join(wrong)} "
            "(a file of another model, or layers that are missing)"
        )


def _dit(shapes: Mapping[Path, Shape], hints: Hints) -> DiTConfig:
    dim = shapes["patch_embedding", "kernel"][1]
    found: dict[str, Any] = {
        "dim": dim,
        "ffn_dim": shapes["blocks", "ffn", "up", "kernel"][-1],
        "freq_dim": shapes["time_embedding", "fc1", "kernel"][0],
        "text_dim": shapes["text_embedding", "fc1", "kernel"][0],
        "layers": shapes["blocks", "modulation"][0],
        "in_channels": shapes["patch_embedding", "kernel"][0] // 4,
        "out_channels": shapes["head", "linear", "kernel"][1] // 4,
    }
    if not {"ffn_dim", "num_layers"} <= set(hints):
        hints = {k: v for k, v in hints.items() if k in ("heads", "text_len")}
    same = {name: name for name in ("dim", "ffn_dim", "freq_dim", "text_dim")}
    theirs = {"in_dim": "in_channels", "out_dim": "out_channels", "num_layers": "layers"}
    theirs |= {name: name for name in ("in_channels", "out_channels")}
    _agree(found, hints, same | theirs, "DiT")
    heads = hints.get("heads") or hints.get("num_heads") or hints.get("num_attention_heads")
    if heads is None and dim % 128:
        raise UserError(
            f"DiT: the weights do not tell the number of heads (width {dim} is no multiple of "
            "128); put its config.json beside the file or say --heads=N"
        )
    text_len, eps = hints.get("text_len") or 512, hints.get("eps") or 1e-6
    return DiTConfig(**found, heads=heads or dim // 128, text_len=text_len, eps=eps)


def _vae(shapes: Mapping[Path, Shape], hints: Hints) -> VAEConfig:
    found = keys_vae.config_of(shapes)
    if hints.get("latents_mean") and hints.get("latents_std"):
        mean, std = tuple(hints["latents_mean"]), tuple(hints["latents_std"])
        _agree(found, hints, {"z_dim": "z_dim", "base_dim": "encoder_dim"}, "VAE")
    elif found["z_dim"] == VAEConfig.z_dim:
        mean, std = VAEConfig.latent_mean, VAEConfig.latent_std
    else:
        mean, std = (0.0,) * found["z_dim"], (1.0,) * found["z_dim"]
    return VAEConfig(**found, latent_mean=mean, latent_std=std)


def _umt5(shapes: Mapping[Path, Shape], hints: Hints) -> UMT5Config:
    try:
        config = keys_umt5.config_of(shapes)
    except ValueError as error:
        raise error.__cause__ or error from error  # the KeyError that says what is missing
    if "d_model" not in hints:
        return config
    names = {"d_model": "dim", "d_ff": "ffn_dim", "num_heads": "heads", "num_layers": "layers"}
    _agree(dataclasses.asdict(config), hints, names, "UMT5")
    return dataclasses.replace(
        config,
        max_distance=hints.get("relative_attention_max_distance", config.max_distance),
        eps=hints.get("layer_norm_epsilon", config.eps),
    )


def _lora(shapes: Mapping[Path, Shape], hints: Hints) -> dict[str, Any]:
    ranks = {shape[2] if path[-1] == "a" else shape[1] for path, shape in shapes.items()}
    if len(ranks) != 1:
        raise UserError(f"LoRA: adapters of different ranks ({sorted(ranks)}); only one is read")
    halves: dict[Path, set[str]] = {path[:-1]: set() for path in shapes}
    for path in shapes:
        halves[path[:-1]].add(path[-1])
    lonely = [".".join(path) for path, sides in halves.items() if sides != {"a", "b"}]
    if lonely:
        raise UserError(f"LoRA: only one of lora_A and lora_B for {', '.join(lonely[:8])}")
    rank = ranks.pop()
    targets = sorted(".".join(path) for path in halves)
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
    )
}
