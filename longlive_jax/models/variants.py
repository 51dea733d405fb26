"""Named model configurations: `variant("wan2_2_ti2v_5b")["dit"]`."""

import difflib
from typing import Any

from longlive_jax.models.wan.config import DiTConfig

VARIANTS: dict[str, dict[str, Any]] = {
    "wan2_2_ti2v_5b": {"dit": DiTConfig()},
}
"""Maps a model name to its configs by component ("dit", "vae" or "umt5")."""


def variant(name: str) -> dict[str, Any]:
    """The configs of a named model by component.

    Raises ValueError, naming the nearest known model, for an unknown name.
    """
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0.0)
        raise ValueError(f"unknown model {name!r}; nearest is {near[0]!r}, all: {sorted(VARIANTS)}")
    return dict(VARIANTS[name])
