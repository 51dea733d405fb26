"""Kinds of video models, and the sampling settings that suit each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlive_jax.captions import NEGATIVE_PROMPT
from longlive_jax.io.json_files import read_json_object
from longlive_jax.io.parts import SETTINGS_FILE
from longlive_jax.sampling.settings import RENAMED_SETTINGS, SampleSpec
from longlive_jax.spec import build, with_renamed

__all__ = ["KINDS", "describe", "exported_settings", "kind_of", "settings_of"]

_COMMON = {"solver": "unipc", "shift": 5.0}
KINDS: dict[str, dict[str, Any]] = {
    "base": _COMMON | {"steps": 50, "guidance": 5.0, "negative_prompt": NEGATIVE_PROMPT},
    "ar": _COMMON | {"steps": 50, "guidance": 3.0, "negative_prompt": NEGATIVE_PROMPT},
    "distilled": _COMMON | {"steps": 4, "guidance": 1.0},
    "two_step": _COMMON | {"steps": 2, "guidance": 1.0},
}
"""Settings by kind: Wan2.2-TI2V-5B as released (bidirectional, not trained to continue its own
chunks), an autoregressive model before distillation, and distilled models of 4 and 2 steps."""


def kind_of(source: Path, *, entry: str, is_packed: bool) -> str:
    """The kind of a DiT, as far as its source tells.

    LongLive releases a distilled model, whose files hold it as `generator`; folders of its training
    are called `checkpoint_model_<step>`, and the two-step release ends in `-S2`. Everything else is
    a base model.

    Args:
      source: file of the weights.
      entry: name of the state dict in the file, or "".
      is_packed: whether the weights are packed as in LongLive's release.
    """
    if not is_packed and not entry.startswith(("generator", "model")):
        return "base"
    parts = source.resolve().parts
    if any(part.upper().endswith("-S2") for part in parts):
        return "two_step"
    is_training = any(part.startswith("checkpoint_model_") for part in parts)
    return "ar" if is_training and not is_packed else "distilled"


def settings_of(kind: str) -> dict[str, Any]:
    """Sampling settings of a kind of model."""
    return dict(KINDS[kind])


def describe(settings: Mapping[str, Any]) -> str:
    """Steps, guidance and solver of settings, in words."""
    spec = build(SampleSpec, with_renamed(settings, RENAMED_SETTINGS), path="sampling")
    return f"{spec.steps} steps, guidance {spec.guidance:g}, solver {spec.solver}"


def exported_settings(folder: Path) -> dict[str, Any] | None:
    """The sampling settings in an exported folder; None if it has none.

    Raises UserError if they are damaged.
    """
    path = folder / SETTINGS_FILE
    settings = read_json_object(path)
    if settings is None:
        return None
    settings = with_renamed(settings, RENAMED_SETTINGS)
    build(SampleSpec, settings, path=str(path))
    return settings
