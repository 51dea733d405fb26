"""The models that `longlive compare` samples from: a checkpoint each, with settings of its own.

A model is written `CHECKPOINT,KEY=VALUE,...`, for example `small_world,steps=2,quant=nvfp4`. Keys
are settings of `longlive settings sample` without `sample.`, the plain options of `longlive
sample`, `adapter=PATH[:SCALE]`, several times if need be, and `name`, the label. Commas within
brackets and quotes belong to a value. Without a checkpoint, as in `steps=2`, it is the one of the
recipe.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from longlive_jax.cli.options import PLAIN_OPTIONS
from longlive_jax.cli.recipes import override
from longlive_jax.cli.setting_groups import find_group
from longlive_jax.spec import UserError, nearest

if TYPE_CHECKING:
    from longlive_jax.adapters import Adapter
    from longlive_jax.sampling.script import ShotScript
    from longlive_jax.sampling.settings import SampleSpec

MIN_MODELS, MAX_MODELS = 2, 16
"""Fewest and most models of one comparison."""

ADAPTER = "adapter"
"""Key of an adapter."""

JOIN = " + "
"""What joins the adapters of one model in its text."""

_SETTING = re.compile(r"[A-Za-z_][\w.]*=")


@dataclasses.dataclass(frozen=True)
class ComparedModel:
    """A model of a comparison.

    Attributes:
      name: its label.
      folder: its checkpoint directory.
      given: settings that the command line states for it alone, as text by key.
      settings: fields of `SampleSpec` that differ from the checkpoint's own, nested.
      spec: all of its sampling settings, before those of its adapters.
      adapters: its adapters and their strengths.
      chosen: names of settings that adapters do not change.
    """

    name: str
    folder: Path
    given: Mapping[str, str]
    settings: Mapping[str, Any]
    spec: "SampleSpec"
    adapters: "tuple[tuple[Adapter, float], ...]"
    chosen: frozenset[str]

    @property
    def weights(self) -> tuple:
        """What determines the weights in memory; models that agree share them."""
        from longlive_jax.sampling.settings import LOADED_WITH

        loaded = (getattr(self.spec, name) for name in sorted(LOADED_WITH))
        return (self.folder.resolve(), *loaded)


def find_models(
    texts: Sequence[str],
    checkpoint: str | None,
    sample: Mapping[str, Any],
    chosen: Iterable[str] = (),
) -> list[ComparedModel]:
    """The models of a command line.

    Args:
      texts: one for each model; see the module's docstring.
      checkpoint: checkpoint of those that name none.
      sample: settings of all of them.
      chosen: names of those in `sample` that adapters do not change.

    Raises UserError for too few or too many of them, unknown settings, wrong values, checkpoints
    that cannot be sampled from, adapters that do not fit, and equal names. Reads no weights but
    those of adapters.
    """
    if not MIN_MODELS <= len(texts) <= MAX_MODELS:
        raise UserError(
            f"compare takes {MIN_MODELS} to {MAX_MODELS} models, got {len(texts)}; write them like "
            "small_world small_world,steps=2"
        )
    models = []
    for text in texts:
        try:
            models.append(_find_model(text, checkpoint, sample, frozenset(chosen)))
        except UserError as error:
            raise UserError(f"{text}: {error}") from error
    names = [model.name for model in models]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"two models are named {name!r}; add name=LABEL to one of them")
    return models


def _find_model(
    text: str, checkpoint: str | None, sample: Mapping[str, Any], chosen: frozenset[str]
) -> ComparedModel:
    """One model. Raises UserError for what cannot be sampled from."""
    from longlive_jax.io.builtin import BUILTIN, find_checkpoint
    from longlive_jax.io.completeness import require_components
    from longlive_jax.sampling.load import check_quantization
    from longlive_jax.sampling.settings import spec_for

    # 1. The checkpoint and the settings as text.
    first, *rest = _split(text)
    if _SETTING.match(first):
        rest, first = [first, *rest], checkpoint or BUILTIN
    given = _settings(rest)
    name = given.pop("name", "") or ", ".join(
        [first.rstrip("/").rpartition("/")[2], *(f"{k}={v}" for k, v in given.items())]
    )
    # 2. What they mean.
    config = ConfigDict({"sample": dict(sample)})
    targets = {key: _target(key) for key in given if key != ADAPTER}
    for key, target in targets.items():
        override(config, target, given[key])
    settings = config.to_dict()["sample"]
    folder = find_checkpoint(first)
    require_components(folder)
    spec = spec_for(folder, settings)
    check_quantization(folder, spec.quant)
    adapters = _adapters(given.get(ADAPTER, ""), folder)
    chosen |= {target.split(".")[1] for target in targets.values()}
    return ComparedModel(name, folder, given, settings, spec, adapters, chosen)


def _adapters(text: str, folder: Path) -> "tuple[tuple[Adapter, float], ...]":
    """Adapters and strengths of `PATH[:SCALE] + ...`.

    Raises UserError for a missing or damaged adapter, and one that does not fit the checkpoint.
    """
    from longlive_jax.adapters import load_adapter, parse_strength
    from longlive_jax.io.checkpoint import open_component
    from longlive_jax.io.packed_kernels import dense_shapes

    reader, _ = open_component(folder, "dit")
    shapes = dense_shapes({path: spec.shape for path, spec in reader.specs.items()})
    kernels = {p: s for p, s in shapes.items() if p[0] == "blocks" and p[-1] == "kernel"}
    adapters = []
    for path, scale in map(parse_strength, text.split(JOIN) if text else ()):
        adapters.append((load_adapter(path), scale))
        adapters[-1][0].check_fits(kernels)
    return tuple(adapters)


def _split(text: str) -> list[str]:
    """The parts of a model between commas, except those within brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _settings(parts: Sequence[str]) -> dict[str, str]:
    """The settings of a model as text. Raises UserError for anything but KEY=VALUE, once each."""
    settings: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UserError(f"expected KEY=VALUE after the checkpoint, got {part!r}")
        if key in settings and key != ADAPTER:
            raise UserError(f"{key} is given twice; remove one")
        settings[key] = f"{settings[key]}{JOIN}{value}" if key in settings else value
    return settings


def _target(key: str) -> str:
    """The dotted setting that a key names; UserError for an unknown one."""
    plain = PLAIN_OPTIONS["sample"]
    if key in plain:
        return plain[key][0]
    paths = [row.path for row in find_group("sample").rows if row.path.startswith("sample.")]
    if f"sample.{key}" not in paths:
        names = {*plain, "name", ADAPTER, *(path.removeprefix("sample.") for path in paths)}
        raise UserError(f"unknown setting {key!r}{nearest(key, names)}")
    return f"sample.{key}"


def check_comparable(models: Sequence[ComparedModel], script: "ShotScript") -> None:
    """UserError unless all models make frames of the same shape and rate from the same noise."""
    for what, values, remedy in (
        ("size", [script.size or model.spec.size for model in models], "size=HEIGHTxWIDTH"),
        ("fps", [model.spec.fps for model in models], "fps=NUMBER"),
        ("chunk_frames", [model.spec.chunk_frames for model in models], "chunk_frames=N"),
        ("temporal stride", [_vae(model).temporal_stride for model in models], ""),
        ("latent channels", [_vae(model).z_dim for model in models], ""),
    ):
        for model, value in zip(models, values, strict=True):
            if value != values[0]:
                hint = f"add {remedy} to one of them" if remedy else "sample them one by one"
                raise UserError(
                    f"models must have the same {what}, got {_text(values[0])} of "
                    f"{models[0].name!r} and {_text(value)} of {model.name!r}; {hint}"
                )


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"


def _vae(model: ComparedModel) -> Any:
    """Configuration of a model's VAE."""
    from longlive_jax.io.checkpoint import read_manifest
    from longlive_jax.models.vae import VAEConfig
    from longlive_jax.spec import build

    settings = read_manifest(model.folder)["components"]["vae"]
    return build(VAEConfig, settings, path=f"{model.folder}: vae")
